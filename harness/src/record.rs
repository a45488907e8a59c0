//! One line of JSON output.

use serde::Serialize;
use varlen_fa::{Device, Path, Plan};

use crate::arguments::Problem;
use crate::check::Comparison;

/// What was measured of a workload. Numbers that are not finite become `null`.
#[derive(Debug, Serialize)]
pub struct Record {
    /// The workload's text.
    pub workload: String,
    /// `cpu`, `wgpu` or `cuda`.
    pub device: &'static str,
    /// The hardware's name.
    pub adapter: String,
    /// The varlen call's path.
    pub path: &'static str,
    /// Why it was taken.
    pub reason: String,
    /// What computed it, or `none`.
    pub kernel: &'static str,
    /// Element type.
    pub dtype: String,
    /// B.
    pub batch: usize,
    /// S.
    pub seq: usize,
    /// H.
    pub heads: usize,
    /// D.
    pub head_dim: usize,
    /// Valid tokens over all.
    pub valid_fraction: f64,
    /// Median time of attention with metadata.
    pub varlen_ms: f64,
    /// Median time of attention with the key mask alone.
    pub dense_ms: f64,
    /// The second over the first.
    pub speedup: f64,
    /// Largest difference from the f64 oracle.
    pub max_abs_err: f64,
    /// Norm of the difference over the norm of the answer.
    pub rel_err: f64,
    /// Whether masked rows were exactly zero.
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
