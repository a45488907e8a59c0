//! `cargo bench --bench segments -- --help`. The bench is `segments` of the harness, since `varlen-fa bench` runs it too.

use std::process::ExitCode;

use varlen_fa_harness::benches::program;
use varlen_fa_harness::benches::segments::TextAndImage;
use varlen_fa_harness::comparison;

fn main() -> ExitCode {
    program(comparison::run::<TextAndImage>)
}
