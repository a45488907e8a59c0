//! What benches that time a few calls beside one another have in common: one table for each workload.

use std::io::Write;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use varlen_fa::{Device, Element, Plan, bf16, f16};

use crate::arguments::{ElementType, Problem, ProblemArguments, RoundArguments, workload_help};
use crate::report::Report;
use crate::sizes::Sizes;
use crate::times::{Times, milliseconds};

/// Calls that are timed in turns. The type holds the options that this bench alone has.
pub trait Comparison {
    /// The workloads, if the command line names none.
    const DEFAULTS: &'static [&'static str];
    /// The workload where the bench only checks that it runs.
    const SMOKE: &'static str;

    /// Why this kind of device has none of the calls. `cargo test` runs benches on whatever device there is.
    fn not_on(_device: &Device) -> Option<&'static str> {
        None
    }

    /// Times them on one workload, so many rounds, and reports each.
    ///
    /// # Errors
    /// A call fails, or the report cannot be written.
    fn time<T: Element>(&self, device: &Device, problem: &Problem, rounds: usize, report: &mut Report) -> Result<()>;
}

// No documentation comment: help would begin with it instead of with that of the comparison.
#[expect(missing_docs, reason = "as above")]
#[derive(Debug, Args)]
#[command(after_help = workload_help())]
pub struct Arguments<C: Args> {
    #[command(flatten)]
    problem: ProblemArguments,
    #[command(flatten)]
    rounds: RoundArguments,
    #[command(flatten)]
    comparison: C,
}

/// Times the comparison on the workloads of the command line and writes the report.
///
/// # Errors
/// The device or a workload is refused, or [`Comparison::time`] fails.
pub fn run<C: Comparison + Args>(arguments: &Arguments<C>, sizes: Sizes) -> Result<()> {
    let Arguments { problem, rounds, comparison } = arguments;
    let device = problem.open_device()?;
    if sizes == Sizes::Smoke
        && let Some(reason) = C::not_on(&device)
    {
        println!("skipped on {}: {reason}", device.name());
        return Ok(());
    }
    let smoke = [C::SMOKE];
    let (defaults, rounds) = rounds.of_run(sizes, C::DEFAULTS, &smoke);
    let mut report = Report::new(problem.json.as_deref())?;
    writeln!(report.text, "{}, {rounds} rounds", device.capabilities())?;
    for problem in problem.problems(&device, defaults)? {
        match problem.element_type {
            ElementType::F32 => comparison.time::<f32>(&device, &problem, rounds, &mut report)?,
            ElementType::F16 => comparison.time::<f16>(&device, &problem, rounds, &mut report)?,
            ElementType::Bf16 => comparison.time::<bf16>(&device, &problem, rounds, &mut report)?,
        }
    }
    Ok(())
}

/// One line of the JSON of a bench that reports ratios.
#[derive(Debug, Serialize)]
struct Record<'a> {
    device: String,
    workload: [usize; 4],
    valid: usize,
    row: &'a str,
    plan: String,
    median_ms: f64,
    /// Time over that of the first row.
    time_ratio: f64,
}

/// Reports each row's time for one call, and its ratio to that of the first. Times are those of `repeats` calls; `valid` tokens
/// count.
///
/// # Errors
/// The report cannot be written.
pub fn report_ratios<'a>(
    (report, device, problem): (&mut Report, &Device, &Problem),
    (valid, repeats): (usize, u32),
    rows: impl IntoIterator<Item = (&'a str, (Plan, Times))>,
) -> Result<()> {
    let mut first_ms = None;
    for (row, (plan, times)) in rows {
        let median_ms = milliseconds(times.median / repeats);
        let time_ratio = median_ms / *first_ms.get_or_insert(median_ms);
        writeln!(report.text, "  {row:<14} {median_ms:>9.3} ms   {time_ratio:>6.3} of the time   {plan}")?;
        report.json(&Record {
            device: device.capabilities().to_string(),
            workload: problem.shape(),
            valid,
            row,
            plan: plan.to_string(),
            median_ms,
            time_ratio,
        })?;
    }
    Ok(())
}
