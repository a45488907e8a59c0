//! What the CUDA driver says of a device, without creating a context. cudarc panics where there is
//! no driver library, so that is looked for first.

use std::fmt;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute};
use libloading::Library;

/// Compute capability below which no kernel of this crate runs.
const OLDEST: (i32, i32) = (8, 0);

/// A CUDA device as its driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaDeviceInfo {
    pub name: String,
    /// Major and minor.
    pub compute_capability: (i32, i32),
    pub multiprocessors: i32,
    /// Shared memory of all blocks on a multiprocessor together.
    pub shared_bytes_a_multiprocessor: u32,
    pub memory_bytes: u64,
    /// Newest CUDA version that the driver knows: 1000 · major + 10 · minor.
    pub driver_version: i32,
}

impl CudaDeviceInfo {
    /// Asks the driver about the device with an ordinal.
    ///
    /// # Errors
    /// Why the device cannot be used, in words.
    pub fn probe(ordinal: usize) -> Result<Self, String> {
        start_driver()?;
        let count = result::device::get_count().map_err(|error| format!("counting devices failed: {error}"))?;
        let index = i32::try_from(ordinal).ok().filter(|&index| index < count);
        let Some(index) = index else {
            return Err(format!("the NVIDIA driver has {count} device(s), numbered from 0"));
        };
        Self::of(index)
    }

    /// [`probe`](Self::probe) for the index of a device that exists; the driver has been started.
    pub fn of(index: i32) -> Result<Self, String> {
        let info = Self::describe(index).map_err(|error| format!("asking the driver failed: {error}"))?;
        if info.compute_capability < OLDEST {
            return Err(format!("{info} is older than compute capability {}.{}", OLDEST.0, OLDEST.1));
        }
        Ok(info)
    }

    fn describe(index: i32) -> Result<Self, result::DriverError> {
        let device = result::device::get(index)?;
        let attribute = |attribute| {
            // SAFETY: `device` comes from the driver, which was started before.
            unsafe { result::device::get_attribute(device, attribute) }
        };
        // SAFETY: as above.
        let memory_bytes = unsafe { result::device::total_mem(device) }? as u64;
        let driver_version = driver_version()?;
        Ok(Self {
            name: result::device::get_name(device)?,
            compute_capability: (
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            // Never negative: the driver counts bytes.
            shared_bytes_a_multiprocessor: attribute(
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
            )?
            .unsigned_abs(),
            memory_bytes,
            driver_version,
        })
    }
}

/// The driver's library, as its installation names it; cudarc looks for the same ones, and more.
const LIBRARIES: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };

/// Loads and starts the driver. Without it, every other call of the driver API would panic.
///
/// # Errors
/// Why there is none, in words.
pub fn start_driver() -> Result<(), String> {
    // cudarc's own question is there only where it loads the driver, and not where it is linked.
    // SAFETY: loads the driver library, whose initialisers are the vendor's own and safe to run;
    // nothing else is called.
    if !LIBRARIES.iter().any(|&name| unsafe { Library::new(name) }.is_ok()) {
        return Err("the NVIDIA driver library (libcuda.so.1 or nvcuda.dll) is not installed".to_owned());
    }
    result::init().map_err(|error| format!("the NVIDIA driver does not start: {error}"))
}

/// Devices that the driver knows; none where it cannot be asked.
pub fn count() -> usize {
    let count = start_driver().ok().and_then(|()| result::device::get_count().ok());
    count.and_then(|count| usize::try_from(count).ok()).unwrap_or(0)
}

/// Newest CUDA version that the driver knows: 1000 · major + 10 · minor. The driver has been
/// started.
pub fn driver_version() -> Result<i32, result::DriverError> {
    let mut version = 0;
    // SAFETY: the pointer is to a live integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

/// A CUDA version that the driver gives as 1000 · major + 10 · minor.
pub fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

impl fmt::Display for CudaDeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        write!(
            f,
            "{} (compute capability {major}.{minor}, {} multiprocessors, {} MiB, driver for CUDA {})",
            self.name,
            self.multiprocessors,
            self.memory_bytes >> 20,
            version(self.driver_version),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probing_never_panics_and_says_why() {
        // With a driver, the ordinal does not exist; without one, the library does not.
        let why = CudaDeviceInfo::probe(usize::MAX).map(|info| info.to_string());
        assert!(why.is_err_and(|why| why.contains("NVIDIA driver")));
    }
}
