//! Benches that `cargo bench` runs one by one, and the program `varlen-fa` as `varlen-fa bench`: the
//! options of each, and a function that runs it.

pub mod attention;
pub mod device_meta;
pub mod key_mask;
pub mod metadata;
pub mod prepare_qk;
pub mod ranges;
pub mod regret;
pub mod segments;
pub mod sequence_parallel;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser};

use crate::report::exit_code;
use crate::sizes::Sizes;

// No documentation comment: help would begin with it instead of with that of the bench.
#[derive(Debug, Parser)]
#[command(version)]
struct Program<A: Args> {
    #[command(flatten)]
    arguments: A,
    /// One tiny workload, once: shows that the bench runs
    #[arg(long)]
    smoke: bool,
    /// `cargo bench` passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Runs a bench as a program of its own. `cargo test` runs benches too, without `--bench`: there it is
/// enough that they work.
pub fn program<A: Args>(run: impl FnOnce(&A, Sizes) -> Result<()>) -> ExitCode {
    env_logger::init();
    let program = Program::<A>::parse();
    let sizes = if program.bench && !program.smoke { Sizes::Full } else { Sizes::Smoke };
    exit_code(run(&program.arguments, sizes))
}
