//! The program `varlen-fa`: what this machine's devices can do, how fast they are, and whether they
//! compute right.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod check;
mod doctor;
mod variables;
mod verdict;

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use varlen_fa_harness::benches::{
    attention, device_meta, key_mask, metadata, prepare_qk, ranges, regret, segments, sequence_parallel,
};
use varlen_fa_harness::comparison;
use varlen_fa_harness::report;
use varlen_fa_harness::sizes::Sizes;

use crate::verdict::Verdict;

/// Attention over padded batches: what this machine's devices can do, how fast they are, and whether
/// they compute right
#[derive(Debug, Parser)]
#[command(name = "varlen-fa", version, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes:
  0  all is well
  1  a device computed a wrong result, or something failed
  2  the arguments were not understood
  3  the device that was asked for is not available

Environment:
  VARLEN_FA_DEVICE picks the device, NO_COLOR turns colours off, RUST_LOG=varlen_fa=debug logs each
  call's path (but for doctor, which has the log's warnings in its report).";

#[derive(Debug, Subcommand)]
enum Command {
    /// Report what works here: each device, why it is not there, its kernels, a check, its speed
    ///
    /// Takes a few seconds for each device. The report is what to paste into a bug report.
    Doctor(doctor::Arguments),
    /// Compute random calls and compare each with an answer in f64
    ///
    /// A call follows from its seed; seeds count up. Stops at the first wrong result, and prints the
    /// command that repeats it. Every kernel and path of the device comes up.
    Check(check::Arguments),
    /// Time attention and what it is made of, as `cargo bench` does in the sources
    Bench(BenchArguments),
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
}

// No documentation comment: clap would take it for the help of `bench`.
#[derive(Debug, Args)]
struct BenchArguments {
    #[command(subcommand)]
    bench: Bench,
    /// One tiny workload, once: shows that the bench runs
    #[arg(long, global = true)]
    smoke: bool,
}

#[derive(Debug, Subcommand)]
enum Bench {
    Attention(attention::Arguments),
    DeviceMeta(comparison::Arguments<device_meta::DeviceMetadata>),
    KeyMask(comparison::Arguments<key_mask::KeyMasked>),
    Metadata(metadata::Arguments),
    PrepareQk(comparison::Arguments<prepare_qk::PrepareQk>),
    Ranges(comparison::Arguments<ranges::Ranges>),
    Regret(regret::Arguments),
    Segments(comparison::Arguments<segments::TextAndImage>),
    SequenceParallel(sequence_parallel::Arguments),
}

/// The device that was asked for is not available.
const NOT_AVAILABLE: u8 = 3;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments.command) {
        Ok(Verdict::Well) => ExitCode::SUCCESS,
        Ok(Verdict::Wrong) => ExitCode::FAILURE,
        Err(error) => {
            let is_unavailable = matches!(error.downcast_ref(), Some(varlen_fa::Error::DeviceUnavailable { .. }));
            let code = report::exit_code(Err(error));
            if is_unavailable { NOT_AVAILABLE.into() } else { code }
        }
    }
}

fn run(command: &Command) -> Result<Verdict> {
    if !matches!(command, Command::Doctor(_)) {
        env_logger::init();
    }
    match command {
        Command::Doctor(arguments) => return doctor::run(arguments),
        Command::Check(arguments) => return check::run(arguments),
        Command::Bench(arguments) => bench(arguments)?,
        Command::Completions { shell } => completions(*shell)?,
    }
    Ok(Verdict::Well)
}

fn bench(arguments: &BenchArguments) -> Result<()> {
    let sizes = if arguments.smoke { Sizes::Smoke } else { Sizes::Full };
    match &arguments.bench {
        Bench::Attention(arguments) => attention::run(arguments, sizes),
        Bench::DeviceMeta(arguments) => comparison::run(arguments, sizes),
        Bench::KeyMask(arguments) => comparison::run(arguments, sizes),
        Bench::Metadata(arguments) => metadata::run(arguments, sizes),
        Bench::PrepareQk(arguments) => comparison::run(arguments, sizes),
        Bench::Ranges(arguments) => comparison::run(arguments, sizes),
        Bench::Regret(arguments) => regret::run(arguments, sizes),
        Bench::Segments(arguments) => comparison::run(arguments, sizes),
        Bench::SequenceParallel(arguments) => sequence_parallel::run(arguments, sizes),
    }
}

/// clap panics where it cannot write, so it writes to memory.
fn completions(shell: Shell) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "varlen-fa", &mut text);
    Ok(io::stdout().write_all(&text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_in_order() {
        Arguments::command().debug_assert();
    }
}
