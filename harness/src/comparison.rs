//! What benches that time a few calls beside one another have in common: one table for each workload.

use std::io::Write;

use anyhow::Result;
use varlen_fa::{Device, Element, bf16, f16};

use crate::arguments::{ElementType, Problem, ProblemArguments, RoundArguments};
use crate::report::Report;
use crate::sizes::Sizes;

/// Calls that are timed in turns.
pub trait Comparison {
    /// Times them on one workload, so many rounds, and reports each.
    ///
    /// # Errors
    /// A call fails, or the report cannot be written.
    fn time<T: Element>(&self, device: &Device, problem: &Problem, rounds: usize, report: &mut Report) -> Result<()>;
}

/// Times them on the workloads of the command line: `defaults` if it names none, `smoke` where the bench only checks that it runs.
///
/// # Errors
/// The device or a workload is refused, or [`Comparison::time`] fails.
pub fn run(
    comparison: &impl Comparison,
    problem: &ProblemArguments,
    rounds: &RoundArguments,
    sizes: Sizes,
    (defaults, smoke): (&[&str], &str),
) -> Result<()> {
    let device = problem.open_device()?;
    let smoke = [smoke];
    let (defaults, rounds) = rounds.of_run(sizes, defaults, &smoke);
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
