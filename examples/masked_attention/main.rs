//! One attention layer of a diffusion transformer over several steps, dense against varlen, checked against an f64 oracle.
//!
//! The layer has the shape of Qwen-Image's: a fused q/k/v projection of text and image tokens, attention under the key mask, an
//! output projection. Weights and inputs are random. The projections run on the host, so that only attention touches the device.

mod layer;
mod measure;
mod product;
mod scores;
mod seen_keys;

use std::io::Write;
use std::num::NonZeroUsize;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;
use varlen_fa::{Config, Device, bf16, f16};

use measure::{Measured, run};
use scores::Scores;
use seen_keys::SeenKeys;
use varlen_fa_harness::arguments::{ElementType, Problem, ProblemArguments, workload_help};
use varlen_fa_harness::record::Record;
use varlen_fa_harness::report::{Report, exit_code};
use varlen_fa_harness::times::milliseconds;

/// Four prompts with a small image each: about a second on two cores.
const SOFTWARE_DEFAULT: &str = "joint:text=256:image=256:valid=12,37,80,211:heads=8:dim=128";

/// Two prompts with an image of 512² pixels at the real width; the host's projections take most of the time.
const HARDWARE_DEFAULT: &str = "joint:text=512:image=1024:valid=37,211:heads=24:dim=128";

/// Run an attention layer shaped like Qwen-Image's under a key mask, dense against varlen, and check the results.
///
/// Each step projects random hidden states to q, k and v (on the host), attends on the device with the key mask alone (dense) and
/// with metadata that was built once (varlen), and projects the varlen result back. Both may be causal or have
/// a window, a soft cap and ALiBi. Fails if a sampled row is too far from
/// an f64 oracle, or if varlen leaves a masked row that is not exactly zero.
#[derive(Debug, Parser)]
#[command(name = "masked_attention", version, after_help = workload_help())]
struct Arguments {
    #[command(flatten)]
    problem: ProblemArguments,
    #[command(flatten)]
    seen: SeenKeys,
    #[command(flatten)]
    scores: Scores,
    /// Steps of each workload; times are their median. On a GPU each step times enough calls back to back that the clock is up
    #[arg(long, value_name = "N", default_value = "3")]
    steps: NonZeroUsize,
}

/// One line of the JSON.
#[derive(Debug, Serialize)]
struct Line {
    #[serde(flatten)]
    record: Record,
    /// Which keys a query sees.
    keys: String,
    /// What happens to scores.
    scores: String,
}

fn main() -> ExitCode {
    env_logger::init();
    exit_code(run_all(&Arguments::parse()))
}

fn run_all(arguments: &Arguments) -> Result<()> {
    let device = arguments.problem.open_device()?;
    let default = if device.capabilities().is_software { SOFTWARE_DEFAULT } else { HARDWARE_DEFAULT };
    let problems = arguments.problem.problems(&device, &[default])?;
    let mut report = Report::new(arguments.problem.json.as_deref())?;

    let steps = arguments.steps.get();
    print_device(&mut report.text, &device)?;
    let mut failed = 0;
    let mask = (&arguments.seen, &arguments.scores);
    for problem in &problems {
        let measured = match problem.element_type {
            ElementType::F32 => run::<f32>(&device, problem, mask, steps),
            ElementType::F16 => run::<f16>(&device, problem, mask, steps),
            ElementType::Bf16 => run::<bf16>(&device, problem, mask, steps),
        }
        .with_context(|| format!("workload {}", problem.workload.name))?;
        print_measured(&mut report.text, problem, mask, &measured)?;
        let Measured { varlen, dense, masked_rows, .. } = &measured;
        let ms = (milliseconds(varlen.times.median), milliseconds(dense.times.median));
        let record = Record::new(&device, problem, varlen.plan, ms, &varlen.comparison, masked_rows.is_ok());
        let (keys, scores) = (arguments.seen.to_string(), arguments.scores.to_string());
        report.json(&Line { record, keys, scores })?;
        failed += usize::from(!measured.is_correct());
    }
    ensure!(failed == 0, "{failed} of {} workloads failed a check", problems.len());
    Ok(())
}

fn print_device(text: &mut dyn Write, device: &Device) -> Result<()> {
    let capabilities = device.capabilities();
    writeln!(text, "device     {} ({})", capabilities.backend, capabilities.adapter)?;
    if device.config().force_dense {
        let variable = Config::VARLEN_VARIABLE;
        writeln!(
            text,
            "note       {variable}=0 forces dense attention; varlen calls still write zeros to masked rows"
        )?;
    }
    Ok(())
}

fn print_measured(
    text: &mut dyn Write,
    problem: &Problem,
    (seen, scores): (&SeenKeys, &Scores),
    measured: &Measured,
) -> Result<()> {
    let Measured { varlen, dense, .. } = measured;
    let (workload, dtype) = (&problem.workload, problem.element_type.precision());
    let (q, kv) = (problem.shape(), problem.kv_shape());
    let (valid, tokens) = (workload.total_valid(), workload.mask.len());
    let percent = 100.0 * workload.valid_fraction();
    let built = measured.meta_time.as_secs_f64() * 1e6;

    writeln!(text, "\nworkload   {}", workload.name)?;
    writeln!(text, "tensors    {dtype}, q {q:?}, k and v {kv:?}: slices of one fused projection")?;
    writeln!(text, "metadata   {valid} of {tokens} tokens valid ({percent:.1}%), built once in {built:.0} µs")?;
    writeln!(text, "keys       {seen}")?;
    writeln!(text, "scores     {scores}")?;
    writeln!(text, "varlen     {}", varlen.plan.with_estimate())?;
    writeln!(text, "dense      {}", dense.plan.with_estimate())?;

    let clock = if varlen.by_device { "the device's clock" } else { "the host's clock" };
    writeln!(text, "\n{:<10} {:>12} {:>12} {:>12}   {clock}", "attention", "median ms", "min ms", "max ms")?;
    for (name, call) in [("dense", dense), ("varlen", varlen)] {
        let [median, min, max] = [call.times.median, call.times.min, call.times.max].map(milliseconds);
        writeln!(text, "{name:<10} {median:>12.3} {min:>12.3} {max:>12.3}")?;
    }
    let speedup = dense.times.median.as_secs_f64() / varlen.times.median.as_secs_f64();
    // Writing zeros may be too quick for the device's clock.
    let speedup = if speedup.is_finite() { format!("{speedup:.2}x") } else { "-".to_owned() };
    let pairs = workload.batch as f64 * (workload.seq as f64).powi(2);
    let valid_pairs = 100.0 * seen.valid_pairs(workload) as f64 / pairs;
    writeln!(text, "speed-up   {speedup:>12}   ({valid_pairs:.1}% of the query and key pairs are valid)")?;

    let rows = varlen.comparison.rows;
    writeln!(text, "\n{:<10} {:>12} {:>12}   {rows} sampled rows against f64", "check", "max error", "relative")?;
    for (name, call) in [("dense", dense), ("varlen", varlen)] {
        let comparison = &call.comparison;
        let verdict = comparison.failure.as_ref().map_or("ok".to_owned(), |why| format!("FAILED: {why}"));
        writeln!(text, "{name:<10} {:>12.2e} {:>12.2e}   {verdict}", comparison.max_abs_err, comparison.rel_err)?;
    }
    let masked = format!("{} masked tokens exactly zero", tokens - valid);
    let verdict = measured.masked_rows.as_ref().map_or_else(|why| format!("FAILED: {why}"), |()| "ok".to_owned());
    writeln!(text, "{masked:<36}   {verdict}")?;
    Ok(())
}
