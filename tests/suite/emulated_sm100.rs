//! The sm100 kernel in its emulated form, which a GPU of compute capability 9.0 runs.

use std::{env, fs};

use anyhow::{Context, Result, ensure};
use varlen_fa::{Kernel, emulation};

use super::trials::Trials;

/// Where the fatbin of the emulated form is, if that is to be tested.
const FATBIN: &str = "VARLEN_FA_TEST_EMULATED_SM100";

pub fn register(trials: &mut Trials) {
    if env::var_os(FATBIN).is_none() {
        return;
    }
    // Otherwise its trials would be missing, and nobody would notice.
    trials.once("emulated_sm100/passed_its_self_check", |device| {
        let capabilities = device.capabilities();
        ensure!(capabilities.kernels.contains(&Kernel::CudaSm100), "{capabilities} lacks it");
        Ok(())
    });
}

/// Gives the library the fatbin that `cargo xtask kernels --emulated` makes, if there is one.
pub fn set() -> Result<()> {
    let Some(path) = env::var_os(FATBIN) else { return Ok(()) };
    let fatbin = fs::read(&path).with_context(|| format!("{FATBIN}: cannot read {}", path.display()))?;
    ensure!(emulation::set_sm100(&fatbin), "the emulated kernel is set twice");
    Ok(())
}
