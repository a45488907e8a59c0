//! Checks of an output, each with what it found.

use anyhow::Result;
use serde::Serialize;
use varlen_fa::Element;
use varlen_fa_testkit::{
    ErrorStats, Oracle, Precision, Value, check_bits_equal, check_field_rule, check_masked_rows_zero, check_relative,
    naive_low_precision_rows,
};

/// Rows that are compared with the oracle, half of them beside masked ones.
const SAMPLED_ROWS: usize = 256;
/// What the field's rule allows on top of twice the error of naive attention in the working precision.
const ATOL: f64 = 1e-5;

/// One thing that was checked.
#[derive(Debug, Serialize)]
pub struct Check {
    /// What.
    pub name: String,
    /// What came out.
    pub found: String,
    /// Whether that is right.
    pub ok: bool,
}

impl Check {
    /// A check that says what it found, or what is wrong.
    pub fn new<E: std::fmt::Display>(name: impl Into<String>, found: Result<String, E>) -> Self {
        let ok = found.is_ok();
        let found = found.unwrap_or_else(|error| error.to_string());
        Self { name: name.into(), found, ok }
    }
}

/// Some rows against the f64 oracle, which shares no code with the library.
pub fn against_oracle<T: Element + Value>(oracle: &Oracle<'_>, precision: Precision, out: &[T]) -> Result<Check> {
    let head_dim = oracle.problem().shape.head_dim;
    let rows = oracle.sample_rows(0, SAMPLED_ROWS);
    let reference: Vec<f64> = oracle.attend_rows(&rows)?.into_iter().flat_map(|row| row.out).collect();
    let naive = naive_low_precision_rows(oracle, precision, &rows)?;
    let sampled: Vec<T> = rows.iter().flat_map(|&at| &out[oracle.output_offset(at)..][..head_dim]).copied().collect();
    let shape = [1, rows.len(), 1, head_dim];
    let stats = ErrorStats::measure("oracle", shape, &sampled, &reference)?;
    let verdict = check_field_rule("oracle", shape, &sampled, &naive, &reference, ATOL)
        .and_then(|_| check_relative("oracle", shape, &sampled, &reference, rel_bound(precision)));
    let name = format!("{} sampled rows against an f64 oracle", rows.len());
    Ok(Check::new(name, verdict.map(|_| format!("max error {:.2e}, relative {:.2e}", stats.max_abs, stats.rel))))
}

/// Every element against what the library's CPU device computes.
pub fn against_cpu<T: Value>(shape: [usize; 4], precision: Precision, out: &[T], cpu: &[T]) -> Result<Check> {
    let stats = ErrorStats::measure("cpu", shape, out, cpu)?;
    let verdict = check_relative("cpu", shape, out, cpu, rel_bound(precision));
    let name = format!("all {} elements against the CPU device", out.len());
    Ok(Check::new(name, verdict.map(|_| format!("max difference {:.2e}, relative {:.2e}", stats.max_abs, stats.rel))))
}

/// Rows of masked tokens are +0.0.
pub fn masked_rows_are_zero<T: Value>(shape: [usize; 4], keep: &[bool], out: &[T]) -> Check {
    let masked = keep.iter().filter(|&&keep| !keep).count();
    let verdict = check_masked_rows_zero("masked rows", shape, out, keep);
    Check::new("masked tokens exactly zero", verdict.map(|()| format!("{masked} tokens")))
}

/// The same bits, computed in another way.
pub fn same_bits<T: Value>(name: &str, shape: [usize; 4], out: &[T], other: &[T]) -> Check {
    let verdict = check_bits_equal("bits", shape, other, out);
    Check::new(name, verdict.map(|()| "the same bits".to_owned()))
}

/// The largest relative error of a sound kernel, with room.
fn rel_bound(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 1e-5,
        Precision::F16 => 2e-3,
        Precision::Bf16 => 1e-2,
    }
}
