//! The suite on the first CUDA device, and what only CUDA devices have.

#[cfg(feature = "cuda")]
#[path = "suite/foreign_cuda.rs"]
mod foreign_cuda;
mod suite;

use std::process::ExitCode;

use varlen_fa::DeviceChoice;

#[cfg(feature = "cuda")]
use self::foreign_cuda::register as own_trials;

fn main() -> ExitCode {
    suite::run(DeviceChoice::Cuda(0), own_trials)
}

#[cfg(not(feature = "cuda"))]
fn own_trials(_: &mut suite::trials::Trials) {}
