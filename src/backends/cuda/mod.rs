//! The CUDA device: this crate's own kernels on NVIDIA hardware from compute capability 8.0 on. They come compiled inside the
//! library, so the NVIDIA driver is all that it needs at run time.
//!
//! | module | what it holds |
//! |---|---|
//! | `probe` | what the driver says of a device, before anything is created |
//! | `caller` | checks of what the caller brings: context, stream, memory |
//! | `context` | a context and its stream; every driver call that touches memory or launches |
//! | `capture` | calls beside a stream that is being captured |
//! | `fault` | driver errors as [`Error`](crate::Error)s, and the loss of the context |
//! | `memory` | buffers, allocated and freed in stream order, or over the caller's memory |
//! | `module` | the compiled kernels and their functions |
//! | `params`, `params_sm90`, `tiles` | what kernels and host agree on: parameter structs, tile sizes |
//! | `tile_lists`, `tensor_map` | what the sm90 kernel is told of masks and of tensors |
//! | `placement` | where tensors lie, and copies of those that lie at odd places |
//! | `metadata` | device copies of masks and metadata |
//! | `attention`, `attention_sm80`, `attention_sm90`, `copy` | launches |
//! | `trust` | which of a GPU's kernels its own self-check lets be used |
//! | `timer` | GPU time by events |

mod attention;
mod attention_sm80;
mod attention_sm90;
mod caller;
mod capture;
mod context;
mod copy;
mod device;
mod fault;
mod memory;
mod metadata;
mod module;
#[cfg_attr(not(test), allow(dead_code, reason = "`cargo xtask kernels` uses the half that makes text"))]
mod params;
mod params_sm90;
mod placement;
mod probe;
mod split;
mod tensor_map;
mod tile_lists;
mod tiles;
mod timer;
mod trust;

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use crate::call::op::{Backend, Storage, foreign_memory};
use crate::error::Result;
use crate::kernel::Kernel;

use device::CudaDevice;

/// The CUDA device with an ordinal. There is one for each ordinal in a process, shared by all who open it: they use the same
/// context anyway, and so take one another's tensors. With one kernel alone it is another device.
///
/// # Errors
/// [`DeviceUnavailable`](crate::Error::DeviceUnavailable) with the reason: no driver, too old a driver, no such device, too old a device, or no memory for a
/// context. [`DeviceLost`](crate::Error::DeviceLost) if its context was lost earlier in this process.
pub(crate) fn open(ordinal: usize, kernel: Option<Kernel>) -> Result<Arc<dyn Backend>> {
    type Opened = Vec<((usize, Option<Kernel>), Arc<CudaDevice>)>;
    static OPENED: Mutex<Opened> = Mutex::new(Vec::new());
    // A panic while it is held leaves the list as it was: devices are only added whole.
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let asked = (ordinal, kernel);
    if let Some((_, device)) = opened.iter().find(|(key, _)| *key == asked) {
        device.check()?;
        return Ok(Arc::clone(device) as Arc<dyn Backend>);
    }
    let device = Arc::new(CudaDevice::open(ordinal, kernel)?);
    opened.push((asked, Arc::clone(&device)));
    Ok(device)
}

/// A device over the caller's context and stream, and its ordinal.
///
/// # Errors
/// As of [`Device::from_cuda`](crate::Device::from_cuda).
///
/// # Safety
/// As of [`Device::from_cuda`](crate::Device::from_cuda).
pub(crate) unsafe fn over(
    context: *mut c_void,
    stream: *mut c_void,
    kernel: Option<Kernel>,
) -> Result<(Arc<dyn Backend>, usize)> {
    // SAFETY: by the caller's promise.
    let (device, ordinal) = unsafe { CudaDevice::over(context, stream, kernel) }?;
    Ok((Arc::new(device), ordinal))
}

/// Keeps the sm100 kernel in its emulated form for devices that are opened from now on; false if there is one already.
#[cfg(feature = "emulated-sm100")]
pub(crate) fn set_emulated_sm100(fatbin: &[u8]) -> bool {
    module::set_emulated_sm100(fatbin)
}

/// The caller's memory as a CUDA device's.
///
/// # Errors
/// As of [`DeviceMemory::from_cuda`](crate::DeviceMemory::from_cuda).
///
/// # Safety
/// As of [`DeviceMemory::from_cuda`](crate::DeviceMemory::from_cuda).
pub(crate) unsafe fn memory_over(device: &dyn Backend, address: u64, bytes: u64) -> Result<Storage> {
    let cuda = device.as_any().downcast_ref::<CudaDevice>();
    let cuda = cuda.ok_or_else(|| foreign_memory(device.name(), "cuda"))?;
    // SAFETY: by the caller's promise.
    let buffer = unsafe { cuda.memory_over(address, bytes) }?;
    Ok(Storage::Device(Box::new(buffer)))
}
