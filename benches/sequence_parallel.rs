//! `cargo bench --bench sequence_parallel -- --help`. The bench is `sequence_parallel` of the harness, since
//! `varlen-fa bench` runs it too.

use std::process::ExitCode;

use varlen_fa_harness::benches::{program, sequence_parallel};

fn main() -> ExitCode {
    program(sequence_parallel::run)
}
