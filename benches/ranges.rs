//! `cargo bench --bench ranges -- --help`. The bench is `ranges` of the harness, since `varlen-fa bench` runs it too.

use std::process::ExitCode;

use varlen_fa_harness::benches::program;
use varlen_fa_harness::benches::ranges::Ranges;
use varlen_fa_harness::comparison;

fn main() -> ExitCode {
    program(comparison::run::<Ranges>)
}
