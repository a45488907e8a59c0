//! The cost model's formulas against those of the script that fits its constants. A backend's test gives a
//! machine with the tiles that its kernels have.

use std::collections::BTreeMap;
use std::ops::Range;

use super::cost::Machine;
use super::problem::{AttentionProblem, AttentionShape};
use super::segments::Cuts;
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::VarlenMeta;

/// A call of `cost_cases.json`, and nanoseconds by "path by kernel".
#[derive(serde::Deserialize)]
struct Case {
    seq_q: usize,
    seq_k: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    is_cross: bool,
    query_runs: Vec<Vec<[usize; 2]>>,
    key_runs: Vec<Vec<[usize; 2]>>,
    times: BTreeMap<String, f64>,
}

/// Panics unless the machine's estimates for these kernels are those of the script, which
/// `benches/peers/fit_cost.py --cases` writes.
pub(crate) fn check(machine: &Machine, kernels: &[Kernel]) -> Result<()> {
    let Ok(cases) = serde_json::from_str::<Vec<Case>>(include_str!("cost_cases.json")) else {
        unreachable!("the file has cases")
    };
    let mut counts = vec![0; kernels.len()];
    for (number, case) in cases.iter().enumerate() {
        let meta = |seq: usize, runs: &[Vec<[usize; 2]>]| {
            let rows: Vec<Vec<Range<usize>>> =
                runs.iter().map(|row| row.iter().map(|&[start, end]| start..end).collect()).collect();
            VarlenMeta::from_key_mask(&KeyMask::from_runs(seq, &rows)?)
        };
        let query = meta(case.seq_q, &case.query_runs)?;
        let key = if case.is_cross { Some(meta(case.seq_k, &case.key_runs)?) } else { None };
        let key = key.as_ref().unwrap_or(&query);
        let shape = AttentionShape {
            batch: case.query_runs.len(),
            seq_q: case.seq_q,
            seq_k: case.seq_k,
            num_heads: case.heads,
            num_kv_heads: case.kv_heads,
            head_dim: case.head_dim,
        };
        let problem = AttentionProblem {
            shape,
            dtype: DType::Bf16,
            softmax_scale: 1.0,
            bias: None,
            cuts: Cuts::None,
            lse: false,
        };
        let mut choices = machine.choices(&problem, &query, key, None)?.to_vec();
        choices.extend(machine.dense_choices(&problem));
        for (name, &expected) in &case.times {
            let Some(of) = kernels.iter().position(|kernel| name.ends_with(&format!(" by {kernel}"))) else { continue };
            counts[of] += 1;
            let found = choices.iter().find(|choice| format!("{} by {}", choice.path, choice.kernel) == *name);
            let time = found.map_or(f64::NAN, |choice| choice.time);
            assert!((time / expected - 1.0).abs() < 1e-6, "case {number}, {name}: {time}, the script's {expected}");
        }
    }
    assert!(counts.iter().all(|&count| count >= 50), "{kernels:?}: {counts:?} times");
    Ok(())
}
