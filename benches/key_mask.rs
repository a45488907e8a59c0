//! `cargo bench --bench key_mask -- --help`. The bench is `key_mask` of the harness, since `varlen-fa bench` runs it too.

use std::process::ExitCode;

use varlen_fa_harness::benches::key_mask::KeyMasked;
use varlen_fa_harness::benches::program;
use varlen_fa_harness::comparison;

fn main() -> ExitCode {
    program(comparison::run::<KeyMasked>)
}
