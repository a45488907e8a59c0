//! `cargo bench --bench regret -- --help`. The bench is `regret` of the harness, since `varlen-fa bench` runs it too.

use std::process::ExitCode;

use varlen_fa_harness::benches::{program, regret};

fn main() -> ExitCode {
    program(regret::run)
}
