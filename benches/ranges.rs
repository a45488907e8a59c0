//! `cargo bench --bench ranges -- --help`. The bench is `ranges` of the harness, since `varlen-fa bench` runs it too.

use std::process::ExitCode;

use varlen_fa_harness::benches::{program, ranges};

fn main() -> ExitCode {
    program(ranges::run)
}
