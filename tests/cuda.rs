//! The suite on the first CUDA device, and what only CUDA devices have.

#[cfg(feature = "cuda")]
#[path = "suite/foreign_cuda.rs"]
mod foreign_cuda;
mod suite;

use std::process::ExitCode;

use varlen_fa::DeviceChoice;

/// Where the fatbin of the emulated form is, if that is to be tested.
#[cfg(feature = "emulated-sm100")]
const EMULATED_SM100: &str = "VARLEN_FA_TEST_EMULATED_SM100";

#[cfg(feature = "cuda")]
fn own_trials(trials: &mut suite::trials::Trials) {
    foreign_cuda::register(trials);
    #[cfg(feature = "emulated-sm100")]
    if std::env::var_os(EMULATED_SM100).is_some() {
        // Otherwise its trials would be missing, and nobody would notice.
        trials.once("emulated_sm100/passed_its_self_check", |device| {
            let capabilities = device.capabilities();
            anyhow::ensure!(capabilities.kernels.contains(&varlen_fa::Kernel::CudaSm100), "{capabilities} lacks it");
            Ok(())
        });
    }
}

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

    let Some(path) = std::env::var_os(EMULATED_SM100) else { return Ok(()) };
    let fatbin = std::fs::read(&path).with_context(|| format!("{EMULATED_SM100}: cannot read {}", path.display()))?;
    anyhow::ensure!(varlen_fa::emulation::set_sm100(&fatbin), "the emulated kernel is set twice");
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn own_trials(_: &mut suite::trials::Trials) {}
