//! Times QK-norm and rotary embedding of a text and an image beside a copy of the same rows, in turns on one device.
//!
//! ```text
//! cargo bench --bench prepare_qk -- --device cpu
//! ```

use std::io::Write;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use varlen_fa::{
    Device, Element, KeyMask, QkNorm, QkSegment, Rotary, RotaryPairing, Tensor, VarlenMeta, pack_into, prepare_qk,
};

use crate::arguments::Problem;
use crate::comparison::Comparison;
use crate::random::{standard_normal, tensor};
use crate::report::Report;
use crate::times::{in_turns, milliseconds, repeats_of};
use varlen_fa_testkit::WorkloadKind;

/// Time QK-norm and rotary embedding against a copy of q and k.
#[derive(Debug, Args)]
pub struct PrepareQk {}

/// One line of the JSON.
#[derive(Debug, Serialize)]
struct Record<'a> {
    device: String,
    workload: [usize; 4],
    valid: usize,
    row: &'a str,
    median_ms: f64,
    gigabytes_per_second: f64,
    /// Of the copy's bandwidth.
    share: f64,
}

/// q and k of a segment, their outputs, and its tables.
struct Segment {
    tensors: [Tensor; 2],
    outputs: [Tensor; 2],
    tables: [Tensor; 2],
}

impl Segment {
    fn new<T: Element>(device: &Device, problem: &Problem, seq: usize, seed: u64) -> Result<Self> {
        let tensor = |seed, heads| tensor::<T>(device, seed, &[problem.workload.batch, seq, heads, problem.head_dim]);
        let half = problem.head_dim / 2;
        let angles = standard_normal(seed + 4, seq * half);
        let table = |of: fn(f32) -> f32| {
            Tensor::from_slice(device, &angles.iter().map(|&angle| of(angle)).collect::<Vec<_>>(), &[seq, half])
        };
        Ok(Self {
            tensors: [tensor(seed, problem.heads)?, tensor(seed + 1, problem.kv_heads)?],
            outputs: [tensor(seed + 2, problem.heads)?, tensor(seed + 3, problem.kv_heads)?],
            tables: [table(f32::cos)?, table(f32::sin)?],
        })
    }

    fn call<'a>(&'a mut self, weights: &'a [Tensor; 2], pairing: RotaryPairing, in_place: bool) -> QkSegment<'a> {
        let Self { tensors: [q, k], outputs: [q_out, k_out], tables: [cos, sin] } = self;
        let segment = if in_place { QkSegment::in_place(q, k) } else { QkSegment::copied(&*q, &*k, q_out, k_out) };
        let [q_weight, k_weight] = weights;
        segment.with_norm(QkNorm::new(q_weight, k_weight, 1e-6)).with_rotary(Rotary::new(&*cos, &*sin, pairing))
    }
}

impl Comparison for PrepareQk {
    /// Qwen-Image at 1024², and a fourth of it.
    const DEFAULTS: &'static [&'static str] =
        &["joint:text=512:image=4096:valid=512", "joint:text=256:image=1024:valid=37,211"];
    const SMOKE: &'static str = "joint:text=5:image=20:valid=3,5:heads=2:dim=16";

    fn time<T: Element>(&self, device: &Device, problem: &Problem, rounds: usize, report: &mut Report) -> Result<()> {
        let shape @ [batch, seq, heads, dim] = problem.shape();
        let text = match problem.workload.kind {
            WorkloadKind::Joint { text, .. } => text,
            _ => 0,
        };
        let mask = KeyMask::from_bool(batch, seq, &problem.workload.mask)?;
        let meta = VarlenMeta::from_key_mask(&mask)?;
        let mut segments =
            [Segment::new::<T>(device, problem, text, 1)?, Segment::new::<T>(device, problem, seq - text, 11)?];
        let weights = [tensor::<f32>(device, 21, &[dim])?, tensor::<f32>(device, 21, &[dim])?];
        // What is copied: q and k of all tokens, and where their valid rows go.
        let whole = Segment::new::<T>(device, problem, seq, 31)?;
        let rows = meta.total_valid();
        let packed = |heads| Tensor::zeros(device, T::DTYPE, &[rows, heads, dim]);
        let mut packed = [packed(heads)?, packed(problem.kv_heads)?];

        let calls = [
            ("copy", None),
            ("in place, interleaved", Some((RotaryPairing::Interleaved, true))),
            ("in place, halves", Some((RotaryPairing::Halves, true))),
            ("copied, interleaved", Some((RotaryPairing::Interleaved, false))),
            ("copied, halves", Some((RotaryPairing::Halves, false))),
        ];
        let repeats = repeats_of(device);
        let timed = in_turns(device, rounds, calls.len(), |row| {
            (0..repeats).try_for_each(|_| match calls[row].1 {
                None => {
                    whole.tensors.iter().zip(&mut packed).try_for_each(|(from, to)| pack_into(device, from, &meta, to))
                }
                Some((pairing, in_place)) => {
                    let calls = segments.iter_mut().map(|segment| segment.call(&weights, pairing, in_place));
                    prepare_qk(device, calls, &meta)
                }
            })
        })?;
        writeln!(report.text, "\n{shape:?} {}, {rows} of {} tokens valid", T::DTYPE, batch * seq)?;
        // Rows are read and written; a batch shares the tables.
        let row_bytes = 2 * rows * (heads + problem.kv_heads) * dim * T::DTYPE.size();
        let table_bytes = seq * dim * size_of::<f32>();
        let mut of_copy = 0.0;
        for ((row, call), ((), times)) in calls.iter().zip(timed) {
            let median_ms = milliseconds(times.median / repeats);
            let bytes = row_bytes + if call.is_some() { table_bytes } else { 0 };
            let gigabytes_per_second = bytes as f64 / median_ms / 1e6;
            if call.is_none() {
                of_copy = gigabytes_per_second;
            }
            let share = gigabytes_per_second / of_copy;
            writeln!(
                report.text,
                "  {row:<22} {median_ms:>9.3} ms   {gigabytes_per_second:>7.1} GB/s   {:>5.1} % of the copy's",
                100.0 * share
            )?;
            report.json(&Record {
                device: device.capabilities().to_string(),
                workload: shape,
                valid: rows,
                row,
                median_ms,
                gigabytes_per_second,
                share,
            })?;
        }
        Ok(())
    }
}
