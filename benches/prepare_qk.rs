//! `cargo bench --bench prepare_qk -- --help`. The bench is `prepare_qk` of the harness, since `varlen-fa bench` runs it too.

use std::process::ExitCode;

use varlen_fa_harness::benches::prepare_qk::PrepareQk;
use varlen_fa_harness::benches::program;
use varlen_fa_harness::comparison;

fn main() -> ExitCode {
    program(comparison::run::<PrepareQk>)
}
