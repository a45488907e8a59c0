//! The CUDA device: this crate's own kernels on NVIDIA hardware from compute capability 8.0 on.
//! They are compiled into the library, so the NVIDIA driver is all that it needs at run time.
//!
//! Imports go up this table, never down:
//!
//! | module | what it holds |
//! |---|---|
//! | `driver` | the driver API: contexts, streams, memory, copies, launches, timing |
//! | `kernels` | the compiled kernels, their parameters and their tile sizes |
//! | `launcher` | what the operations of one device work with: stream, memory, kernels |
//! | `tensors` | tensors, masks and metadata on the device; pack, scatter and zero |
//! | `attention` | attention calls |
//! | `trust` | which of a GPU's kernels pass their self-check and are used |
//! | `device` | the device itself |

mod attention;
mod device;
mod driver;
mod kernels;
mod launcher;
mod tensors;
mod trust;

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};
#[cfg(feature = "nccl")]
use std::time::Duration;

use crate::call::memory::{Storage, foreign_memory};
use crate::call::op::Backend;
use crate::error::{Error, Result};
use crate::kernel::Kernel;

use device::CudaDevice;

pub(crate) use driver::lane::{Lane, Loan, Mark, PieceCopy};
#[cfg(feature = "nccl")]
pub(crate) use driver::nccl::{Cause, NcclRank, UniqueId};

/// The CUDA device with an ordinal. A process has one for each ordinal, shared by all who open it:
/// they share one context, so tensors of one work with the other. With one kernel alone it is
/// another device.
///
/// # Errors
/// [`DeviceUnavailable`](crate::Error::DeviceUnavailable) with the reason: no driver, too old a
/// driver, no such device, too old a device, or no memory for a context.
/// [`DeviceLost`](crate::Error::DeviceLost) if its context was lost earlier in this process.
pub(crate) fn open(ordinal: usize, kernel: Option<Kernel>) -> Result<Arc<dyn Backend>> {
    type Opened = Vec<((usize, Option<Kernel>), Arc<CudaDevice>)>;
    static OPENED: Mutex<Opened> = Mutex::new(Vec::new());
    // A panic while it is held leaves the list as it was: devices are only pushed whole.
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

/// Devices that the driver knows; none where there is no driver.
pub(crate) fn count() -> usize {
    driver::probe::count()
}

/// A device in an external context, on a stream of it, and its ordinal.
///
/// # Errors
/// As for [`Device::from_cuda`](crate::Device::from_cuda).
///
/// # Safety
/// As for [`Device::from_cuda`](crate::Device::from_cuda).
pub(crate) unsafe fn external(
    context: *mut c_void,
    stream: *mut c_void,
    kernel: Option<Kernel>,
) -> Result<(Arc<dyn Backend>, usize)> {
    // SAFETY: by the caller's promise.
    let (device, ordinal) = unsafe { CudaDevice::external(context, stream, kernel) }?;
    Ok((Arc::new(device), ordinal))
}

/// Keeps the sm100 kernel in its emulated form for devices that are opened from now on; false if
/// there is one already.
#[cfg(feature = "emulated-sm100")]
pub(crate) fn set_emulated_sm100(fatbin: &[u8]) -> bool {
    kernels::module::set_emulated_sm100(fatbin)
}

/// A lane of each device, all of which can read the memory of all. Where each has a GPU of its own, with direct access to the others,
/// all lanes count what arrives; else none does.
///
/// # Errors
/// [`DeviceKind`](crate::Error::DeviceKind) for a device of another backend;
/// [`DeviceLost`](crate::Error::DeviceLost), [`Backend`](crate::Error::Backend).
pub(crate) fn lanes(devices: &[&dyn Backend]) -> Result<Vec<Lane>> {
    let mut lanes: Vec<Lane> = devices.iter().map(|device| cuda("devices", *device)?.lane()).collect::<Result<_>>()?;
    let mut count = lanes.len() > 1;
    for (at, reader) in lanes.iter().enumerate() {
        for (_, other) in lanes.iter().enumerate().filter(|(other, _)| *other != at) {
            count &= reader.reach(other)?;
        }
    }
    for lane in &mut lanes {
        count = count && lane.count_arrivals()?;
    }
    if !count {
        lanes.iter_mut().for_each(Lane::count_nothing);
    }
    Ok(lanes)
}

/// The id of a new NCCL communicator, for all its ranks.
///
/// # Errors
/// As for `NcclCommunicator::new`.
#[cfg(feature = "nccl")]
pub(crate) fn nccl_id(device: &dyn Backend) -> Result<[u8; 128]> {
    driver::nccl::unique_id(cuda("device", device)?.name()).map(|id| id.0)
}

/// A rank of an NCCL communicator that all ranks have the id of.
///
/// # Errors
/// As for `NcclCommunicator::new`.
#[cfg(feature = "nccl")]
pub(crate) fn nccl_rank(
    device: &dyn Backend,
    id: [u8; 128],
    rank_of_world: (usize, usize),
    limit: Duration,
    cause: Cause,
) -> Result<NcclRank> {
    let device = cuda("device", device)?;
    NcclRank::open((device.context(), device.lane()?), UniqueId(id), rank_of_world, limit, cause)
}

/// A rank of the application's communicator.
///
/// # Errors
/// As for `NcclCommunicator::from_raw`.
///
/// # Safety
/// As for `NcclCommunicator::from_raw`.
#[cfg(feature = "nccl")]
pub(crate) unsafe fn external_nccl_rank(
    device: &dyn Backend,
    comm: *mut c_void,
    rank_of_world: (usize, usize),
    limit: Duration,
    cause: Cause,
) -> Result<NcclRank> {
    let device = cuda("device", device)?;
    let place = (device.context(), device.lane()?);
    // SAFETY: by the caller's promise.
    unsafe { NcclRank::external(place, comm, rank_of_world, limit, cause) }
}

fn cuda<'a>(argument: &'static str, device: &'a dyn Backend) -> Result<&'a CudaDevice> {
    let cuda = device.as_any().downcast_ref();
    cuda.ok_or_else(|| Error::DeviceKind { argument, expected: "cuda", got: device.name().to_owned() })
}

/// External memory as memory of a CUDA device.
///
/// # Errors
/// As for [`DeviceMemory::from_cuda`](crate::DeviceMemory::from_cuda).
///
/// # Safety
/// As for [`DeviceMemory::from_cuda`](crate::DeviceMemory::from_cuda).
pub(crate) unsafe fn external_memory(device: &dyn Backend, address: u64, bytes: u64) -> Result<Storage> {
    let cuda = device.as_any().downcast_ref::<CudaDevice>();
    let cuda = cuda.ok_or_else(|| foreign_memory(device.name(), "cuda"))?;
    // SAFETY: by the caller's promise.
    let buffer = unsafe { cuda.external_memory(address, bytes) }?;
    Ok(Storage::device(buffer))
}
