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
    #[cfg(feature = "emulated-sm100")]
    if let Err(error) = emulated_sm100() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    suite::run(DeviceChoice::Cuda(0), own_trials)
}

/// The fatbin that `cargo xtask kernels --emulated` makes, so that compute capability 9.0 has kernel sm100, too.
#[cfg(feature = "emulated-sm100")]
fn emulated_sm100() -> anyhow::Result<()> {
    use anyhow::Context;

    const VARIABLE: &str = "VARLEN_FA_TEST_EMULATED_SM100";
    let Some(path) = std::env::var_os(VARIABLE) else { return Ok(()) };
    let fatbin = std::fs::read(&path).with_context(|| format!("{VARIABLE}: cannot read {}", path.display()))?;
    anyhow::ensure!(varlen_fa::emulation::set_sm100(&fatbin), "the emulated kernel is set twice");
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn own_trials(_: &mut suite::trials::Trials) {}
