//! `cargo bench --bench attention -- --help`. The bench is `attention` of the harness, since `varlen-fa bench` runs it too.

use std::process::ExitCode;

use varlen_fa_harness::benches::{attention, program};

fn main() -> ExitCode {
    program(attention::run)
}
