//! What the page shows of a run.

use serde::Serialize;
use varlen_fa::{KeyMask, Plan, Timing};

use crate::check::Check;

/// A run of one workload.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The workload, in full.
    pub workload: String,
    /// The adapter, as the library was told.
    pub adapter: String,
    /// Element type of q, k, v and the output.
    pub dtype: &'static str,
    /// `[B, S, H, D]` of the queries and of the output.
    pub shape: [usize; 4],
    /// Text tokens at the start of each batch row; the rest is image. None if the workload has no image.
    pub text: Option<usize>,
    /// Valid tokens of all batch rows.
    pub valid: usize,
    /// Share of the query and key pairs that are valid.
    pub valid_pairs: f64,
    /// `[start, end]` of each run of valid tokens, batch row by batch row.
    pub runs: Vec<Vec<[usize; 2]>>,
    /// Root mean square of each token's output, batch row by batch row.
    pub magnitude: Vec<Vec<f32>>,
    /// Attention with metadata.
    pub varlen: Timed,
    /// Attention with a key mask and no metadata, which computes every row.
    pub dense: Timed,
    /// Whether the adapter measured the times; the page's clock otherwise.
    pub by_device: bool,
    /// What was checked.
    pub checks: Vec<Check>,
}

/// How a form of attention ran.
#[derive(Debug, Serialize)]
pub struct Timed {
    /// The path taken.
    pub path: &'static str,
    /// The kernel taken.
    pub kernel: &'static str,
    /// Why.
    pub reason: String,
    /// Median time of a call.
    pub milliseconds: f64,
}

impl Timed {
    /// Of some calls that took the same plan.
    pub fn of(plan: &Plan, timings: &[Timing]) -> Self {
        let mut milliseconds: Vec<f64> = timings.iter().map(|timing| timing.duration.as_secs_f64() * 1e3).collect();
        milliseconds.sort_by(f64::total_cmp);
        Self {
            path: plan.path.name(),
            kernel: plan.kernel.name(),
            reason: plan.reason.to_string(),
            milliseconds: milliseconds.get(milliseconds.len() / 2).copied().unwrap_or(f64::NAN),
        }
    }
}

/// The runs of valid tokens of each batch row.
pub fn runs(mask: &KeyMask) -> Vec<Vec<[usize; 2]>> {
    let row = |row| mask.runs(row).map(|run| [run.range().start, run.end()]).collect();
    (0..mask.batch()).map(row).collect()
}

/// Root mean square of each token of an output `[B, S, H, D]`.
pub fn magnitude([batch, seq, heads, dim]: [usize; 4], out: &[f32]) -> Vec<Vec<f32>> {
    let width = heads * dim;
    let token = |values: &[f32]| (values.iter().map(|value| value * value).sum::<f32>() / width as f32).sqrt();
    out.chunks(seq * width).take(batch).map(|row| row.chunks(width).map(token).collect()).collect()
}
