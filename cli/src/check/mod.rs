//! Random calls, each against the f64 oracle.

mod call;
mod judge;
mod run;

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use varlen_fa::{Device, DeviceChoice, Error, Kernel};
use varlen_fa_harness::arguments::{ElementType, parse_device};

pub use self::call::Choices;

use self::call::Call;
use crate::variables;
use crate::verdict::Verdict;

/// What to check, and for how long.
#[derive(Debug, Args)]
pub struct Arguments {
    /// cuda, cuda:N, wgpu or cpu [default: VARLEN_FA_DEVICE, or the best one present]
    #[arg(long, value_name = "DEVICE", value_parser = parse_device)]
    device: Option<DeviceChoice>,
    /// Kernel that computes every call [default: any of the device's]
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<Kernel>,
    /// Element type of every call [default: any of the device's]
    #[arg(long, value_name = "TYPE")]
    dtype: Option<ElementType>,
    /// Seed of the first call
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    /// Stop after so many calls [default: none, but a minute without any of these three]
    #[arg(long, value_name = "N")]
    calls: Option<u64>,
    /// Stop after so many minutes
    #[arg(long, value_name = "N", conflicts_with = "seconds")]
    minutes: Option<u64>,
    /// Stop after so many seconds
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
}

/// How long it takes where nobody says.
const DEFAULT: Duration = Duration::from_secs(60);

/// What became of some calls.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Calls that were compared.
    pub right: u64,
    /// Calls that the device refuses, since the kernel or path that was drawn does not do them.
    pub refused: u64,
    /// The first that was wrong or failed.
    pub failure: Option<Failure>,
}

/// A call that was wrong or failed.
#[derive(Debug)]
pub struct Failure {
    /// Its seed.
    pub seed: u64,
    /// The call.
    pub call: String,
    /// What is wrong.
    pub why: String,
}

/// Checks one device, and writes what came out to standard output.
pub fn run(arguments: &Arguments) -> Result<Verdict> {
    let device = match arguments.device {
        Some(choice) => Device::new(choice)?,
        None => Device::from_env()?,
    };
    let choices = Choices::of(&device, arguments.kernel, arguments.dtype.map(ElementType::dtype))?;
    let limit = match (arguments.minutes, arguments.seconds, arguments.calls) {
        (Some(minutes), ..) => Some(Duration::from_secs(60 * minutes)),
        (None, Some(seconds), _) => Some(Duration::from_secs(seconds)),
        (None, None, None) => Some(DEFAULT),
        (None, None, Some(_)) => None,
    };
    let mut out = io::stdout().lock();
    writeln!(out, "{}, calls from seed {} on", device.capabilities(), arguments.seed)?;
    let progress = io::stderr().is_terminal();
    let started = Instant::now();
    let mut shown = Duration::ZERO;
    let outcome = calls(&device, &choices, arguments.seed, |done| {
        let elapsed = started.elapsed();
        if progress && elapsed.saturating_sub(shown) > Duration::from_secs(1) {
            shown = elapsed;
            // A terminal that is gone is no reason to stop.
            let _ = write!(io::stderr(), "\r{done} calls, {} s ", elapsed.as_secs());
        }
        arguments.calls.is_none_or(|most| done < most) && limit.is_none_or(|limit| elapsed < limit)
    })?;
    if shown > Duration::ZERO {
        let _ = write!(io::stderr(), "\r\x1b[K");
    }
    let Outcome { right, refused, failure } = outcome;
    let seconds = started.elapsed().as_secs_f64();
    writeln!(out, "{right} calls were right, {refused} are none that the device computes, in {seconds:.1} s")?;
    let Some(Failure { seed, call, why }) = failure else { return Ok(Verdict::Well) };
    writeln!(out, "WRONG: {why}\n  the call: {call}\n  repeat:   {}", arguments.repeat(&device, seed))?;
    writeln!(out, "Please report these lines, with what `varlen-fa doctor` prints.")?;
    Ok(Verdict::Wrong)
}

impl Arguments {
    /// The command that repeats a call, with the variables that decide about the device.
    fn repeat(&self, device: &Device, seed: u64) -> String {
        let variables = variables::set().map(|(name, value)| format!("{name}={value} "));
        let choice = match device.config().device {
            DeviceChoice::Auto => DeviceChoice::from(device.capabilities().backend),
            choice => choice,
        };
        let mut line: String = variables.collect();
        line += &format!("varlen-fa check --device {choice} --seed {seed} --calls 1");
        if let Some(kernel) = self.kernel {
            line += &format!(" --kernel {kernel}");
        }
        if let Some(dtype) = self.dtype {
            line += &format!(" --dtype {}", dtype.dtype());
        }
        line
    }
}

/// Computes calls with seeds from `seed` on, as long as `goes_on` says so of the number of those that are done, up to the first
/// that is wrong.
///
/// # Errors
/// What makes no call possible: memory of the host, say.
pub fn calls(device: &Device, choices: &Choices, seed: u64, mut goes_on: impl FnMut(u64) -> bool) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    for done in 0.. {
        if !goes_on(done) {
            break;
        }
        let seed = seed.wrapping_add(done);
        let call = Call::draw(seed, choices);
        let result = run::run(device, &call);
        match result {
            Ok(()) => outcome.right += 1,
            Err(error) if matches!(error.downcast_ref(), Some(Error::NotApplicable { .. })) => outcome.refused += 1,
            Err(error) => {
                outcome.failure = Some(Failure { seed, call: call.to_string(), why: format!("{error:#}") });
                break;
            }
        }
    }
    Ok(outcome)
}
