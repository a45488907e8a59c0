//! `cargo bench --bench key_mask -- --help`. The bench is `key_mask` of the harness, since `varlen-fa bench` runs it too.

use std::process::ExitCode;

use varlen_fa_harness::benches::{key_mask, program};

fn main() -> ExitCode {
    program(key_mask::run)
}
