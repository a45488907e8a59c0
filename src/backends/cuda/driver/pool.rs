//! Where the device memory of a context comes from: a memory pool, which allocates and frees in
//! stream order. Some drivers and virtual machines have no pools; there, allocating and freeing
//! wait for the device.

use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::DriverError;
use cudarc::driver::result::{self, mem_pool};
use cudarc::driver::sys::{
    self, CUdevice, CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationHandleType, CUmemAllocationType,
    CUmemLocation, CUmemLocationType, CUmemPool_attribute, CUmemPoolProps, CUmemoryPool, CUstream,
};

/// The memory of one context.
pub struct Pool {
    /// Made for this context alone, so that the settings of the device's default pool stay the
    /// application's. `None` where there are no pools.
    raw: Option<CUmemoryPool>,
    /// Memory that was given up while the stream was being captured. It is freed after the capture.
    deferred: Mutex<Vec<CUdeviceptr>>,
}

impl Pool {
    /// Makes a pool on the device with an index. The pool keeps what is freed, so that the layers
    /// of a model reuse it.
    pub fn new(device: CUdevice, index: i32) -> Self {
        Self { raw: make(device, index), deferred: Mutex::default() }
    }

    /// Whether memory is allocated and freed in stream order.
    pub fn is_stream_ordered(&self) -> bool {
        self.raw.is_some()
    }

    /// Allocates memory for later work on the stream; `bytes` is not 0.
    ///
    /// # Safety
    /// The context is current, and the stream is a live one of it.
    pub unsafe fn alloc(&self, bytes: u64, stream: CUstream) -> Result<CUdeviceptr, DriverError> {
        match self.raw {
            // SAFETY: the pool is live, as is the stream by the caller's promise; nothing is
            // assumed of the memory's contents.
            Some(pool) => unsafe { mem_pool::alloc_async(pool, bytes as usize, stream) },
            // SAFETY: the context is current; nothing is assumed of the memory's contents.
            None => unsafe { result::malloc_sync(bytes as usize) },
        }
    }

    /// Frees memory after the work launched on the stream so far.
    ///
    /// # Safety
    /// The context is current, and the stream is a live one of it. The memory came from
    /// [`alloc`](Self::alloc), is freed once, and all its uses are on this stream, before this.
    pub unsafe fn free(&self, address: CUdeviceptr, stream: CUstream) -> Result<(), DriverError> {
        match self.raw {
            // SAFETY: by the caller's promise, the memory is the pool's.
            Some(_) => unsafe { result::free_async(address, stream) },
            // SAFETY: by the caller's promise, from `malloc_sync`; the driver waits for work that
            // uses it.
            None => unsafe { result::free_sync(address) },
        }
    }

    /// Keeps memory that cannot be freed now for [`free_deferred`](Self::free_deferred).
    pub fn defer(&self, address: CUdeviceptr) {
        self.deferred.lock().unwrap_or_else(PoisonError::into_inner).push(address);
    }

    /// Frees all memory that was deferred.
    ///
    /// # Safety
    /// As for [`free`](Self::free), for each address that was deferred; the stream is not being
    /// captured.
    pub unsafe fn free_deferred(&self, stream: CUstream) {
        let deferred = std::mem::take(&mut *self.deferred.lock().unwrap_or_else(PoisonError::into_inner));
        for address in deferred {
            // SAFETY: by the caller's promise; it was taken from the list, so it is freed once.
            let freed = unsafe { self.free(address, stream) };
            if let Err(error) = freed {
                log::debug!("memory at {address:#x} is not freed: {error}");
            }
        }
    }

    /// Lets another GPU, which can, read the pool's memory.
    pub fn let_read(&self, device: CUdevice) -> Result<(), DriverError> {
        let Some(pool) = self.raw else { return Ok(()) };
        let access = CUmemAccessDesc {
            location: CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device },
            flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the pool is live, and there is one description.
        unsafe { sys::cuMemPoolSetAccess(pool, &access, 1) }.result()
    }

    /// Gives memory that is free back to the device.
    pub fn trim(&self) -> Result<(), DriverError> {
        match self.raw {
            // SAFETY: the pool is live.
            Some(pool) => unsafe { mem_pool::trim_to(pool, 0) },
            None => Ok(()),
        }
    }

    /// Destroys the pool. Memory that is still in use stays valid until it is freed.
    ///
    /// # Safety
    /// This is the last call.
    pub unsafe fn destroy(&self) -> Result<(), DriverError> {
        match self.raw {
            // SAFETY: the pool is live, and nothing uses it after this by the caller's promise.
            Some(pool) => unsafe { mem_pool::destroy(pool) },
            None => Ok(()),
        }
    }
}

fn make(device: CUdevice, index: i32) -> Option<CUmemoryPool> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
    // SAFETY: `device` comes from the driver.
    let supported = unsafe { result::device::get_attribute(device, attribute) };
    if supported != Ok(1) {
        log::info!("CUDA device {index} has no memory pools: allocations wait for the device");
        return None;
    }
    let properties = CUmemPoolProps {
        allocType: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        handleTypes: CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: index },
        win32SecurityAttributes: ptr::null_mut(),
        maxSize: 0,
        usage: 0,
        reserved: [0; 54],
    };
    let make = || {
        // SAFETY: the properties are valid: plain device memory, shared with no other process.
        let pool = unsafe { mem_pool::create(&properties) }?;
        let mut threshold = u64::MAX;
        let value = ptr::from_mut(&mut threshold).cast::<c_void>();
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the pool was just made, and the attribute's value is a u64.
        unsafe { mem_pool::set_attribute(pool, attribute, value) }?;
        Ok::<_, DriverError>(pool)
    };
    make().inspect_err(|error| log::info!("CUDA device {index}: no memory pool: {error}")).ok()
}
