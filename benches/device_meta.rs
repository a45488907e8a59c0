//! `cargo bench --bench device_meta -- --help`. The bench is `device_meta` of the harness, since `varlen-fa bench` runs it too.

use std::process::ExitCode;

use varlen_fa_harness::benches::device_meta::DeviceMetadata;
use varlen_fa_harness::benches::program;
use varlen_fa_harness::comparison;

fn main() -> ExitCode {
    program(comparison::run::<DeviceMetadata>)
}
