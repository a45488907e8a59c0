//! The table for people.

use std::io::Write;

use anyhow::Result;
use varlen_fa::Device;

use super::measure::{Measured, Row, Schedule};
use crate::arguments::Problem;
use crate::times::milliseconds;

/// What all workloads have in common.
pub fn print_device(text: &mut dyn Write, device: &Device, schedule: &Schedule) -> Result<()> {
    let capabilities = device.capabilities();
    let Schedule { samples, warmup, .. } = schedule;
    writeln!(text, "device    {} ({})", capabilities.backend, capabilities.adapter)?;
    writeln!(text, "samples   {samples} of each row; calls to warm up: {warmup}")?;
    if device.config().force_dense {
        writeln!(text, "note      VARLEN_FA=0 forces dense attention where no path is forced")?;
    }
    Ok(())
}

/// One workload.
pub fn print(text: &mut dyn Write, problem: &Problem, measured: &Measured) -> Result<()> {
    let (workload, dtype) = (&problem.workload, problem.element_type.precision());
    let Problem { heads, kv_heads, head_dim, .. } = problem;
    let (batch, seq) = (workload.batch, workload.seq);
    let valid_tokens = 100.0 * workload.valid_fraction();
    let valid_pairs = 100.0 * workload.valid_pairs() as f64 / (batch as f64 * (seq as f64).powi(2));
    let by_device = measured.find(Row::Varlen).is_some_and(|timed| timed.by_device);
    let clock = if by_device { "the device's clock" } else { "the host's clock" };
    let plural = if measured.sets == 1 { "" } else { "s" };

    writeln!(text, "\nworkload  {}", workload.name)?;
    writeln!(
        text,
        "tensors   {dtype}, batch {batch}, seq {seq}, heads {heads}, kv_heads {kv_heads}, head_dim {head_dim}"
    )?;
    writeln!(text, "valid     {valid_tokens:.1}% of the tokens, {valid_pairs:.1}% of the query and key pairs")?;
    writeln!(text, "varlen    {}", measured.plan.with_estimate())?;
    writeln!(text, "timed     by {clock}, on {} input set{plural}", measured.sets)?;
    let [median, min, max, tflops, gbs] = ["median ms", "min ms", "max ms", "TFLOP/s", "GB/s"];
    writeln!(text, "{:<22} {median:>11} {min:>11} {max:>11} {tflops:>10} {gbs:>10}", "")?;
    for timed in &measured.rows {
        let [median, min, max] = [timed.times.median, timed.times.min, timed.times.max].map(milliseconds);
        let tflops = timed.tflops().map_or(String::new(), |rate| format!("{rate:.3}"));
        let gbs = timed.gbs().map_or(String::new(), |rate| format!("{rate:.1}"));
        let line = format!("{:<22} {median:>11.4} {min:>11.4} {max:>11.4} {tflops:>10} {gbs:>10}", timed.row.name());
        writeln!(text, "{}", line.trim_end())?;
    }
    if let (Some(dense), Some(varlen)) = (measured.find(Row::Dense), measured.find(Row::Varlen)) {
        let speedup = dense.times.median.as_secs_f64() / varlen.times.median.as_secs_f64();
        let speedup = if speedup.is_finite() { format!("{speedup:.2}x") } else { "-".to_owned() };
        writeln!(text, "{:<22} {speedup:>11}", "dense / varlen")?;
    }
    let failures: Vec<String> = measured.failures().collect();
    let verdict = if failures.is_empty() { "ok".to_owned() } else { format!("FAILED: {}", failures.join("; ")) };
    let [dense, varlen] = [&measured.dense, &measured.varlen].map(|comparison| comparison.max_abs_err);
    let rows = measured.varlen.rows;
    let errors = format!("max error {dense:.1e} dense, {varlen:.1e} varlen, in {rows} rows each");
    writeln!(text, "check     {verdict} ({errors})")?;
    Ok(())
}
