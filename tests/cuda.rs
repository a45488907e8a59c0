//! The suite on the first CUDA device.

mod suite;

use std::process::ExitCode;

use varlen_fa::DeviceChoice;

fn main() -> ExitCode {
    suite::run(DeviceChoice::Cuda(0), |_| {})
}
