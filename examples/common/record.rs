//! One line of JSON output.

use serde::Serialize;
use varlen_fa::{Device, Path, Plan};

use super::arguments::Problem;
use super::check::Comparison;

/// What was measured of a workload. Numbers that are not finite become `null`.
#[derive(Debug, Serialize)]
pub struct Record {
    pub workload: String,
    pub device: &'static str,
    pub adapter: String,
    pub path: &'static str,
    pub reason: String,
    pub kernel: &'static str,
    pub dtype: String,
    pub batch: usize,
    pub seq: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub valid_fraction: f64,
    pub varlen_ms: f64,
    pub dense_ms: f64,
    pub speedup: f64,
    pub max_abs_err: f64,
    pub rel_err: f64,
    pub masked_rows_zero: bool,
}

impl Record {
    /// `plan` and `comparison` are those of the varlen call.
    pub fn new(
        device: &Device,
        problem: &Problem,
        plan: Plan,
        (varlen_ms, dense_ms): (f64, f64),
        comparison: &Comparison,
        masked_rows_zero: bool,
    ) -> Self {
        let capabilities = device.capabilities();
        Self {
            workload: problem.workload.name.clone(),
            device: capabilities.backend.name(),
            adapter: capabilities.adapter.clone(),
            path: plan.path.name(),
            reason: plan.reason.to_string(),
            // No kernel runs where the output is zeros.
            kernel: if plan.path == Path::Zero { "none" } else { plan.kernel.name() },
            dtype: problem.element_type.precision().to_string(),
            batch: problem.workload.batch,
            seq: problem.workload.seq,
            heads: problem.heads,
            head_dim: problem.head_dim,
            valid_fraction: problem.workload.valid_fraction(),
            varlen_ms,
            dense_ms,
            speedup: dense_ms / varlen_ms,
            max_abs_err: comparison.max_abs_err,
            rel_err: comparison.rel_err,
            masked_rows_zero,
        }
    }
}
