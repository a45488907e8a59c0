//! `cargo bench --bench metadata -- --help`. The bench is `metadata` of the harness, since `varlen-fa bench` runs it too.

use std::process::ExitCode;

use varlen_fa_harness::benches::{metadata, program};

fn main() -> ExitCode {
    program(metadata::run)
}
