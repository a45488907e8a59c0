//! Which kernels of a GPU are used. A newer kernel is used if its results agree with those of the
//! sm80 kernel on that very GPU and driver.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::call::op::Backend;
use crate::call::self_check::{self, Cases, Subject};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernel::Kernel;

use super::driver::capture::RelaxedCapture;
use super::driver::context::Context;
use super::kernels::tiles::ListTile;

/// The kernel that every other is compared with.
const REFERENCE: Kernel = Kernel::CudaSm80;

/// Whether a kernel passed on the GPU with an index. Each GPU is checked once a process, whatever
/// contexts and devices there are on it.
static VERDICTS: Mutex<Option<HashMap<(i32, Kernel), bool>>> = Mutex::new(None);

/// A device to try kernels on: one with its own stream, since the stream of an application takes no
/// other work.
pub trait TrialDevice: Backend {
    fn context(&self) -> &Context;
}

/// Those of a GPU's kernels that can be trusted. `device_name` names it in messages, and `on_trial`
/// makes a device to try them on.
///
/// # Errors
/// [`Error::DeviceUnavailable`] if a kernel lost the context when it was tried.
pub fn trusted<Device: TrialDevice>(
    index: i32,
    device_name: &str,
    kernels: &[Kernel],
    on_trial: impl Fn() -> Result<Device>,
) -> Result<Vec<Kernel>> {
    let mut trusted = Vec::new();
    for &kernel in kernels {
        if kernel == REFERENCE || is_trusted(index, device_name, kernel, &on_trial)? {
            trusted.push(kernel);
        }
    }
    Ok(trusted)
}

fn is_trusted<Device: TrialDevice>(
    index: i32,
    device_name: &str,
    kernel: Kernel,
    on_trial: impl Fn() -> Result<Device>,
) -> Result<bool> {
    // Held during the comparison, so that it is made once. A panic leaves the map as it was.
    let mut verdicts = VERDICTS.lock().unwrap_or_else(PoisonError::into_inner);
    let verdicts = verdicts.get_or_insert_default();
    if let Some(&verdict) = verdicts.get(&(index, kernel)) {
        return Ok(verdict);
    }
    let started = Instant::now();
    let outcome = compare(device_name, kernel, on_trial)?;
    match &outcome {
        Ok(()) => log::debug!("kernel {kernel} passed its self-check on {device_name} in {:?}", started.elapsed()),
        Err(why) => log::warn!(
            "kernel {kernel} failed its self-check on {device_name} and is not used in this process; \
             other kernels take its calls. Please report this line to the authors of varlen-fa, and the \
             output of nvidia-smi: {why}"
        ),
    }
    verdicts.insert((index, kernel), outcome.is_ok());
    Ok(outcome.is_ok())
}

/// Keys of the tiles that a kernel has beside the longest ones of a head dimension.
fn shorter_tiles(kernel: Kernel, head_dim: usize) -> Vec<u16> {
    // Fits: a tile has some hundred keys at most.
    let keys = |tile: ListTile| u16::try_from(tile.keys).ok();
    ListTile::of(kernel, head_dim).into_iter().flat_map(ListTile::short).filter_map(keys).collect()
}

/// Compares a kernel with the reference. The inner result says how it failed.
///
/// # Errors
/// [`Error::DeviceUnavailable`] if the context is lost.
fn compare<Device: TrialDevice>(
    device_name: &str,
    kernel: Kernel,
    on_trial: impl Fn() -> Result<Device>,
) -> Result<Result<(), String>> {
    let device = match on_trial() {
        Ok(device) => device,
        Err(error) => return Ok(Err(error.to_string())),
    };
    // A stream of the application may be captured, by this thread or another.
    let _relaxed = device.context().check(RelaxedCapture::enter(), "leaving captures alone")?;
    let tested = Subject::new(&device, kernel).with_shorter_tiles(shorter_tiles);
    let reference = Subject::new(&device, REFERENCE);
    let outcome = self_check::compare_now(tested, reference, &Cases::COMPLETE);
    device.context().faults.check().map_err(|lost| Error::DeviceUnavailable {
        device: device_name.to_owned(),
        why: format!(
            "trying kernel {kernel} failed, which {REFERENCE} alone ({}={REFERENCE}) avoids: {lost}",
            Config::KERNEL_VARIABLE
        ),
    })?;
    Ok(outcome)
}
