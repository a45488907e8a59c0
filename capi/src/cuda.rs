//! External CUDA contexts, streams and memory, or errors in a build without the feature `cuda`.

use std::ffi::c_void;

use varlen::{Device, DeviceMemory, Result};

/// A device over an external context and a stream of it.
///
/// # Safety
/// As [`Device::from_cuda`].
#[cfg(feature = "cuda")]
pub(crate) unsafe fn device_over(context: *mut c_void, stream: *mut c_void) -> Result<Device> {
    let config = varlen::Config::from_env_for(varlen::DeviceChoice::Cuda(0))?;
    // SAFETY: by this function's contract.
    unsafe { Device::from_cuda(context, stream, config) }
}

/// External memory of a CUDA device.
///
/// # Safety
/// As [`DeviceMemory::from_cuda`].
#[cfg(feature = "cuda")]
pub(crate) unsafe fn memory(device: &Device, address: u64, bytes: u64) -> Result<DeviceMemory> {
    // SAFETY: by this function's contract.
    unsafe { DeviceMemory::from_cuda(device, address, bytes) }
}

#[cfg(not(feature = "cuda"))]
pub(crate) unsafe fn device_over(_context: *mut c_void, _stream: *mut c_void) -> Result<Device> {
    Err(not_built())
}

#[cfg(not(feature = "cuda"))]
pub(crate) unsafe fn memory(_device: &Device, _address: u64, _bytes: u64) -> Result<DeviceMemory> {
    Err(not_built())
}

#[cfg(not(feature = "cuda"))]
fn not_built() -> varlen::Error {
    let why = "varlen-fa was built without its feature `cuda`".to_owned();
    varlen::Error::DeviceUnavailable { device: "cuda".to_owned(), why }
}
