//! The check of an output against the f64 oracle, on a sample of its rows.

use anyhow::Result;
use varlen_fa::Element;
use varlen_fa_testkit::oracle::Modifiers;
use varlen_fa_testkit::{
    ErrorStats, Oracle, OracleProblem, Precision, Value, check_field_rule, check_relative, naive_low_precision_rows,
};

use crate::arguments::Problem;

/// Rows that are compared, half of them beside masked ones.
const SAMPLED_ROWS: usize = 256;

/// What the field's rule allows on top of twice the error of naive attention in the working precision.
const ATOL: f64 = 1e-5;

/// Which query rows the mask applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queries {
    /// None: those of masked tokens are computed like any other.
    All,
    /// Those of masked tokens are zeros.
    Valid,
}

/// How far the sampled rows of an output are from the oracle's.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    /// Rows that were compared.
    pub rows: usize,
    /// The largest difference; NaN if an output is.
    pub max_abs_err: f64,
    /// The norm of the difference over the norm of the reference.
    pub rel_err: f64,
    /// What is wrong, where the differences are too large.
    pub failure: Option<String>,
}

/// Compares an output `[B, S, H, D]` with the oracle's answer for `q`, `k` and `v`, already rounded to the working precision.
/// `sees`, `[B, S, S]`, says which keys each query sees, all if it is `None`; `modifiers`, what else happens to the scores.
pub fn compare<T: Element + Value>(
    problem: &Problem,
    [q, k, v]: [&[f32]; 3],
    (queries, sees, modifiers): (Queries, Option<&[bool]>, Modifiers<'_>),
    out: &[T],
    seed: u64,
) -> Result<Comparison> {
    let keep = problem.workload.mask.as_slice();
    let oracle = Oracle::new(OracleProblem {
        key_keep: Some(keep),
        query_keep: (queries == Queries::Valid).then_some(keep),
        sees,
        modifiers,
        ..OracleProblem::new(problem.oracle_shape(), q, k, v)
    })?;
    let (precision, head_dim) = (problem.element_type.precision(), problem.head_dim);

    let rows = oracle.sample_rows(seed, SAMPLED_ROWS);
    let reference: Vec<f64> = oracle.attend_rows(&rows)?.into_iter().flat_map(|row| row.out).collect();
    let naive = naive_low_precision_rows(&oracle, precision, &rows)?;
    let sampled: Vec<T> = rows.iter().flat_map(|&at| &out[oracle.output_offset(at)..][..head_dim]).copied().collect();

    let (name, shape) = (problem.workload.name.as_str(), [1, rows.len(), 1, head_dim]);
    let stats = ErrorStats::measure(name, shape, &sampled, &reference)?;
    let field_rule = check_field_rule(name, shape, &sampled, &naive, &reference, ATOL);
    let verdict = field_rule.and_then(|_| check_relative(name, shape, &sampled, &reference, rel_bound(precision)));
    let failure = verdict.err().map(|error| error.to_string());
    Ok(Comparison { rows: rows.len(), max_abs_err: stats.max_abs, rel_err: stats.rel, failure })
}

/// The largest relative error of a sound kernel, with room: probabilities and outputs are rounded to the working precision, and
/// GPUs may approximate the exponential.
fn rel_bound(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 1e-5,
        Precision::F16 => 2e-3,
        Precision::Bf16 => 1e-2,
    }
}
