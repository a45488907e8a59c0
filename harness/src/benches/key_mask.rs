//! Times attention in which every query is computed under a key mask, by every path, beside the same call without a mask.
//!
//! ```text
//! cargo bench --bench key_mask -- --device wgpu
//! ```

use std::io::Write;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use varlen_fa::{AttentionMask, Device, Element, KeyMask, MaskedAttention, Path};

use crate::arguments::Problem;
use crate::comparison::Comparison;
use crate::random::tensor;
use crate::report::Report;
use crate::times::{in_turns, milliseconds};

/// Time a call under a key mask, by the path that the plan takes and by each other one, against a call without a mask.
#[derive(Debug, Args)]
pub struct KeyMasked {}

/// One line of the JSON.
#[derive(Debug, Serialize)]
struct Record<'a> {
    device: String,
    workload: [usize; 4],
    kept: usize,
    row: &'a str,
    plan: String,
    median_ms: f64,
    /// Time over that without a mask.
    time_ratio: f64,
}

impl Comparison for KeyMasked {
    /// Padding at the end, and kept keys that are neighbours by chance.
    const DEFAULTS: &'static [&'static str] =
        &["prefix:len=2048:valid=2048,1229,614,410:heads=12:dim=64", "random:batch=4:len=2048:p=0.5:heads=12:dim=64"];
    const SMOKE: &'static str = "prefix:len=40:valid=40,24:heads=2:dim=16";

    fn time<T: Element>(&self, device: &Device, problem: &Problem, rounds: usize, report: &mut Report) -> Result<()> {
        let (shape, kv_shape) = (problem.shape(), problem.kv_shape());
        let tensor = |seed, shape: [usize; 4]| tensor::<T>(device, seed, &shape);
        let (q, k, v) = (tensor(1, shape)?, tensor(2, kv_shape)?, tensor(3, kv_shape)?);
        let mut out = tensor(4, shape)?;
        let mask = KeyMask::from_bool(shape[0], shape[1], &problem.workload.mask)?;
        let (planned, masked) = (MaskedAttention::new(device), AttentionMask::key(&mask));
        let by = |path| planned.clone().with_path(path);
        let rows = [
            ("no mask", planned.clone(), AttentionMask::none()),
            ("key mask", planned.clone(), masked),
            ("  dense", by(Path::Dense), masked),
            ("  fused", by(Path::Fused), masked),
            ("  packed", by(Path::Packed), masked),
        ];
        let timed = in_turns(device, rounds, rows.len(), |row| {
            let (_, attention, mask) = &rows[row];
            attention.forward_into(&q, &k, &v, *mask, &mut out)
        })?;
        let (kept, keys) = (mask.total_kept(), mask.batch() * mask.seq());
        let share = 100.0 * kept as f64 / keys.max(1) as f64;
        writeln!(report.text, "\n{shape:?} {}, {share:.1} % of the keys kept", T::DTYPE)?;
        let full = milliseconds(timed[0].1.median);
        for ((row, ..), (plan, times)) in rows.iter().zip(timed) {
            let (plan, median_ms) = (plan.to_string(), milliseconds(times.median));
            let time_ratio = median_ms / full;
            writeln!(report.text, "  {row:<10} {median_ms:>9.3} ms   {:>5.1} %   {plan}", 100.0 * time_ratio)?;
            let device = device.capabilities().to_string();
            report.json(&Record { device, workload: shape, kept, row: row.trim(), plan, median_ms, time_ratio })?;
        }
        Ok(())
    }
}
