//! The CUDA device. So far it finds the driver and says what the hardware can do; it has no kernels yet, so it is never
//! selected.

mod probe;

use std::sync::Arc;

use crate::backend::Backend;
use crate::config::DeviceChoice;
use crate::error::{Error, Result};

use probe::CudaDeviceInfo;

/// The CUDA device with an ordinal.
///
/// # Errors
/// [`Error::DeviceUnavailable`] with the reason: no driver, no such device, too old a device, or that there are no kernels for it
/// in this version.
pub(crate) fn open(ordinal: usize) -> Result<Arc<dyn Backend>> {
    let why = match CudaDeviceInfo::probe(ordinal) {
        Ok(info) => format!("found {info}, but this version of varlen-fa has no CUDA kernels yet"),
        Err(why) => why,
    };
    Err(Error::DeviceUnavailable { device: DeviceChoice::Cuda(ordinal).to_string(), why })
}
