//! Times attention under ranges of keys beside the same call without ranges, in turns on one device.
//!
//! ```text
//! cargo bench --bench ranges -- --device cpu
//! ```

use std::io::Write;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use varlen_fa::{AttentionMask, Device, Element, KeyMask, KeyRanges, MaskedAttention, VarlenMeta};

use crate::arguments::Problem;
use crate::comparison::Comparison;
use crate::random::tensor;
use crate::report::Report;
use crate::times::{in_turns, milliseconds};

/// Time causal masks and windows against the same call without them.
#[derive(Debug, Args)]
pub struct Ranges {
    /// Keys that windows have on either side
    #[arg(long, value_name = "N", default_value = "64")]
    window: usize,
}

/// One line of the JSON.
#[derive(Debug, Serialize)]
struct Record<'a> {
    device: String,
    workload: [usize; 4],
    valid: usize,
    ranges: &'a str,
    plan: String,
    median_ms: f64,
    /// Time over that without ranges.
    time_ratio: f64,
    /// Pairs of query and key over those without ranges.
    work_ratio: f64,
}

impl Comparison for Ranges {
    /// Padded batches: 12 heads of 64 elements, as encoders have.
    const DEFAULTS: &'static [&'static str] =
        &["prefix:len=2048:valid=2048:heads=12:dim=64", "prefix:len=8192:valid=8192,4915:heads=12:dim=64"];
    const SMOKE: &'static str = "prefix:len=40:valid=40,24:heads=2:dim=16";

    fn time<T: Element>(&self, device: &Device, problem: &Problem, rounds: usize, report: &mut Report) -> Result<()> {
        let window = self.window;
        let (shape, kv_shape) = (problem.shape(), problem.kv_shape());
        let [batch, seq, heads, _] = shape;
        let tensor = |seed, shape: [usize; 4]| tensor::<T>(device, seed, &shape);
        let (q, k, v) = (tensor(1, shape)?, tensor(2, kv_shape)?, tensor(3, kv_shape)?);
        let mut out = tensor(4, shape)?;
        let mask = KeyMask::from_bool(batch, seq, &problem.workload.mask)?;
        let meta = VarlenMeta::from_key_mask(&mask)?;
        let size = [batch, seq, seq];
        let rows = [
            ("none", None),
            ("causal", Some(KeyRanges::causal(size)?)),
            ("window", Some(KeyRanges::window(size, Some(window), Some(window))?)),
            ("causal window", Some(KeyRanges::window(size, Some(window), Some(0))?)),
        ];
        let attention = MaskedAttention::new(device);
        let timed = in_turns(device, rounds, rows.len(), |row| {
            let mask = AttentionMask::varlen(&meta);
            let mask = rows[row].1.as_ref().map_or(mask, |ranges| mask.with_ranges(ranges));
            attention.forward_into(&q, &k, &v, mask, &mut out)
        })?;
        writeln!(
            report.text,
            "\n{shape:?} {}, {} valid, window {window} on either side",
            T::DTYPE,
            meta.total_valid()
        )?;
        let full = milliseconds(timed[0].1.median);
        let pairs = |ranges: Option<&KeyRanges>| -> f64 { pairs(&mask, ranges) as f64 * heads as f64 };
        for ((name, ranges), (plan, times)) in rows.iter().zip(timed) {
            let median_ms = milliseconds(times.median);
            let (time_ratio, work_ratio) = (median_ms / full, pairs(ranges.as_ref()) / pairs(None));
            writeln!(
                report.text,
                "  {name:<14} {median_ms:>9.3} ms   {:>5.1} % of the time, {:>5.1} % of the pairs",
                100.0 * time_ratio,
                100.0 * work_ratio
            )?;
            report.json(&Record {
                device: device.capabilities().to_string(),
                workload: shape,
                valid: meta.total_valid(),
                ranges: name,
                plan: plan.to_string(),
                median_ms,
                time_ratio,
                work_ratio,
            })?;
        }
        Ok(())
    }
}

/// Pairs of a valid query and a valid key that it sees.
fn pairs(mask: &KeyMask, ranges: Option<&KeyRanges>) -> usize {
    let of_row = |b: usize| -> usize {
        let mut before = vec![0; mask.seq() + 1];
        for s in 0..mask.seq() {
            before[s + 1] = before[s] + usize::from(mask.keeps(b, s));
        }
        let seen = |i: usize| match ranges {
            Some(ranges) => {
                let [first, end] = ranges.row(b)[i];
                before[end as usize] - before[first as usize]
            }
            None => before[mask.seq()],
        };
        (0..mask.seq()).filter(|&i| mask.keeps(b, i)).map(seen).sum()
    };
    (0..mask.batch()).map(of_row).sum()
}
