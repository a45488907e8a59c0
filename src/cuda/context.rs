//! The context of one device and its stream. Driver calls that copy, fill or launch are made here and nowhere else.
//!
//! The context is the device's primary one, which the CUDA runtime and other libraries in the process use too. It is retained
//! and never released, so handles of it stay valid to the end of the process.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::ptr;

use bytemuck::Pod;
use cudarc::driver::DriverError;
use cudarc::driver::result::{self, ctx, mem_pool, primary_ctx, stream};
use cudarc::driver::sys::{
    self, CUcontext, CUdeviceptr, CUmemAllocationHandleType, CUmemAllocationType, CUmemLocation, CUmemLocationType,
    CUmemPool_attribute, CUmemPoolProps, CUmemoryPool, CUmemorytype, CUpointer_attribute, CUstream,
};

use crate::error::Result;

use super::fault::Faults;
use super::module::Function;
use super::placement::Rectangle;

/// A context, its one stream, and the pool that memory comes from.
pub(super) struct Context {
    raw: CUcontext,
    stream: CUstream,
    /// The library's own, so that the settings of the device's default pool stay the application's. None where the driver or
    /// the virtual machine has no pools.
    pool: Option<CUmemoryPool>,
    pub faults: Faults,
}

// SAFETY: the handles may be used from any thread (the driver API is thread-safe; the context is made current by `enter` in each
// thread that uses them), and they stay valid: nothing releases or destroys them.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("raw", &self.raw).field("stream", &self.stream).finish_non_exhaustive()
    }
}

/// The context is current in this thread until this is dropped; then the one before it is again. The application may be in the
/// middle of its own CUDA work.
pub(super) struct Current {
    /// None if it was the same.
    previous: Option<CUcontext>,
    /// Not `Send`: what is current is a thread's own matter.
    thread: PhantomData<*const ()>,
}

impl Drop for Current {
    fn drop(&mut self) {
        if let Some(previous) = self.previous {
            // SAFETY: `previous` was this thread's current context, or null, which means none.
            let restored = unsafe { ctx::set_current(previous) };
            if let Err(error) = restored {
                log::debug!("the thread's CUDA context is not restored: {error}");
            }
        }
    }
}

fn make_current(raw: CUcontext) -> Result<Current, DriverError> {
    let previous = ctx::get_current()?.unwrap_or(ptr::null_mut());
    if previous == raw {
        return Ok(Current { previous: None, thread: PhantomData });
    }
    // SAFETY: `raw` is a primary context that is retained for good.
    unsafe { ctx::set_current(raw) }?;
    Ok(Current { previous: Some(previous), thread: PhantomData })
}

impl Context {
    /// Retains the primary context of the device with an index, and makes a stream and a pool in it. The driver has been started.
    pub fn open(index: i32, faults: Faults) -> Result<Self, DriverError> {
        let device = result::device::get(index)?;
        // SAFETY: `device` comes from the driver.
        let raw = unsafe { primary_ctx::retain(device) }?;
        let made = make_current(raw).and_then(|_current| {
            let stream = stream::create(stream::StreamKind::NonBlocking)?;
            Ok((stream, own_pool(device, index)))
        });
        let (stream, pool) = made.inspect_err(|_| {
            // SAFETY: retained above, and nothing else has it yet.
            let released = unsafe { primary_ctx::release(device) };
            if let Err(error) = released {
                log::debug!("releasing a context that is not used: {error}");
            }
        })?;
        Ok(Self { raw, stream, pool, faults })
    }

    /// Makes the context current; every other method wants that.
    pub fn enter(&self) -> Result<Current> {
        self.faults.check()?;
        make_current(self.raw).map_err(|error| self.faults.explain(error, "making the context current", 0))
    }

    pub fn stream(&self) -> CUstream {
        self.stream
    }

    /// The outcome of a driver call as the library's own.
    pub fn done<T>(&self, outcome: Result<T, DriverError>, operation: &'static str) -> Result<T> {
        outcome.map_err(|error| self.faults.explain(error, operation, 0))
    }

    /// Memory for later work on the stream, at a multiple of 256 bytes; `bytes` is not 0.
    pub fn alloc(&self, bytes: u64) -> Result<CUdeviceptr> {
        let explain = |error| self.faults.explain(error, "allocating memory", bytes);
        let Some(pool) = self.pool else {
            // SAFETY: the context is current; nothing is assumed of the memory's contents.
            return unsafe { result::malloc_sync(bytes as usize) }.map_err(explain);
        };
        // SAFETY: pool and stream are this context's and live; nothing is assumed of the memory's contents.
        let take = || unsafe { mem_pool::alloc_async(pool, bytes as usize, self.stream) };
        take().or_else(|error| {
            if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Err(explain(error));
            }
            // What was freed may still wait for the stream, or lie in pieces of the wrong sizes.
            self.synchronize()?;
            // SAFETY: the pool is live.
            let trimmed = unsafe { mem_pool::trim_to(pool, 0) };
            self.done(trimmed, "trimming the memory pool")?;
            take().map_err(explain)
        })
    }

    /// Frees memory once the work launched so far is done with it.
    ///
    /// # Safety
    /// `address` came from [`alloc`](Self::alloc), is freed once, and no later work uses it.
    pub unsafe fn free(&self, address: CUdeviceptr) -> Result<(), DriverError> {
        match self.pool {
            // SAFETY: the memory is the pool's by the caller's promise; all its uses are on this stream, before this.
            Some(_) => unsafe { result::free_async(address, self.stream) },
            // SAFETY: from `malloc_sync` by the caller's promise; the driver waits for work that uses it.
            None => unsafe { result::free_sync(address) },
        }
    }

    /// Copies host bytes; they may change as soon as this returns.
    ///
    /// # Safety
    /// `bytes.len()` bytes at `to` are memory of this context.
    pub unsafe fn upload(&self, to: CUdeviceptr, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the destination is in bounds by the caller's promise. The source is either pageable, and then has been staged
        // when the call returns, or it is kept borrowed until the stream is done with it, below.
        let copied = unsafe { result::memcpy_htod_async(to, bytes, self.stream) };
        self.done(copied, "copying to the device")?;
        if self.is_known_to_driver(bytes)? { self.synchronize() } else { Ok(()) }
    }

    /// Whether host memory is page-locked or managed, so that copies of it run on their own.
    fn is_known_to_driver(&self, bytes: &[u8]) -> Result<bool> {
        // The driver's types begin at 1; memory that it does not know leaves 0.
        let mut memory_type = 0_u32;
        let mut attribute = CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        let mut data = ptr::from_mut(&mut memory_type).cast::<c_void>();
        let address = bytes.as_ptr() as CUdeviceptr;
        // SAFETY: one attribute, and one pointer to a live integer of its size; any address may be asked about.
        let asked = unsafe { sys::cuPointerGetAttributes(1, &mut attribute, &mut data, address) }.result();
        self.done(asked, "asking about host memory")?;
        Ok(memory_type != 0)
    }

    /// Copies to the host, after all work launched so far.
    ///
    /// # Safety
    /// `into.len()` bytes at `from` are memory of this context.
    pub unsafe fn download(&self, from: CUdeviceptr, into: &mut [u8]) -> Result<()> {
        if !into.is_empty() {
            // SAFETY: the source is in bounds by the caller's promise; the destination is borrowed until the stream is done
            // with it, below. Any bytes are valid u8s.
            let copied = unsafe { result::memcpy_dtoh_async(into, from, self.stream) };
            // Waits even where the copy was refused: part of it may be under way.
            let waited = self.synchronize();
            self.done(copied, "copying to the host")?;
            return waited;
        }
        self.synchronize()
    }

    /// Writes the same byte to all of a range.
    ///
    /// # Safety
    /// `bytes` bytes at `address` are memory of this context that nobody else uses.
    pub unsafe fn fill(&self, address: CUdeviceptr, byte: u8, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: in bounds by the caller's promise.
        let filled = unsafe { result::memset_d8_async(address, byte, bytes as usize, self.stream) };
        self.done(filled, "filling memory")
    }

    /// Copies rows of bytes that need no alignment.
    ///
    /// # Safety
    /// All rows of the rectangle are memory of this context, those at `to` of nobody else.
    pub unsafe fn copy(&self, rectangle: &Rectangle) -> Result<()> {
        let Rectangle { from, to, width, rows, from_pitch, to_pitch } = *rectangle;
        if rows == 1 {
            // SAFETY: in bounds by the caller's promise.
            let copied = unsafe { result::memcpy_dtod_async(to, from, width as usize, self.stream) };
            return self.done(copied, "copying rows");
        }
        let copy = sys::CUDA_MEMCPY3D {
            srcXInBytes: 0,
            srcY: 0,
            srcZ: 0,
            srcLOD: 0,
            srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: ptr::null(),
            srcDevice: from,
            srcArray: ptr::null_mut(),
            reserved0: ptr::null_mut(),
            srcPitch: from_pitch as usize,
            srcHeight: rows as usize,
            dstXInBytes: 0,
            dstY: 0,
            dstZ: 0,
            dstLOD: 0,
            dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: ptr::null_mut(),
            dstDevice: to,
            dstArray: ptr::null_mut(),
            reserved1: ptr::null_mut(),
            dstPitch: to_pitch as usize,
            dstHeight: rows as usize,
            WidthInBytes: width as usize,
            Height: rows as usize,
            Depth: 1,
        };
        // Not the 2-D call, which may refuse pitches that its own allocator would not have chosen.
        // SAFETY: in bounds by the caller's promise; the struct is read before the call returns.
        let copied = unsafe { sys::cuMemcpy3DAsync_v2(&copy, self.stream) }.result();
        self.done(copied, "copying rows")
    }

    /// Launches a kernel that takes one struct by value.
    ///
    /// # Safety
    /// `P` mirrors the kernel's parameter, and every address in it that the kernel follows is memory of this context, in bounds
    /// for the sizes beside it; no other work writes there, or uses what the kernel writes, out of the stream's order.
    pub unsafe fn launch<P: Pod>(&self, function: Function, grid: [u32; 3], block: u32, params: &P) -> Result<()> {
        let [x, y, z] = grid;
        let mut arguments = [ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // SAFETY: the function is of a module that is never unloaded; the parameter is what it takes by the caller's promise, and
        // is copied before the call returns.
        let launched = unsafe {
            result::launch_kernel(
                function.raw,
                (x, y, z),
                (block, 1, 1),
                function.shared_bytes,
                self.stream,
                &mut arguments,
            )
        };
        self.done(launched, "launching a kernel")
    }

    /// Waits for all work launched so far.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is live.
        let waited = unsafe { stream::synchronize(self.stream) };
        self.done(waited, "waiting for the device")
    }
}

/// A pool that keeps what is freed, so that a model's layers reuse it.
fn own_pool(device: sys::CUdevice, index: i32) -> Option<CUmemoryPool> {
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
