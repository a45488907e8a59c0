//! A context and one stream of it. Driver calls that copy, fill or launch are made here and nowhere else.
//!
//! A context is either the primary one of a device that the library opened, which the CUDA runtime and other libraries in the
//! process use too: it is retained as long as the device is there. Or it is the caller's, stream included; then both stay the
//! caller's, and only the pool of memory is the library's own.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use bytemuck::Pod;
use cudarc::driver::DriverError;
use cudarc::driver::result::{self, ctx, mem_pool, primary_ctx, stream};
use cudarc::driver::sys::{
    self, CUcontext, CUdeviceptr, CUmemAllocationHandleType, CUmemAllocationType, CUmemLocation, CUmemLocationType,
    CUmemPool_attribute, CUmemPoolProps, CUmemoryPool, CUmemorytype, CUpointer_attribute, CUstream,
};

use crate::error::{Error, Result};

use super::capture::Relaxed;
use super::fault::Faults;
use super::module::Function;
use super::placement::Rectangle;

/// A context, the stream of it that takes all work, and the pool that memory comes from.
pub(super) struct Context {
    raw: CUcontext,
    stream: CUstream,
    owner: Owner,
    /// The library's own, so that the settings of the device's default pool stay the application's. None where the driver or
    /// the virtual machine has no pools.
    pool: Option<CUmemoryPool>,
    /// Memory that was given up while the stream was being captured into a graph; it is freed once that has ended.
    unfreed: Mutex<Vec<CUdeviceptr>>,
    pub faults: Faults,
}

/// Whom context and stream belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// The primary context of this device, retained, and a stream that nobody else has.
    Library(sys::CUdevice),
    /// Both the caller's, who keeps them until this is dropped.
    Caller,
    /// A stream that nobody else has, in a context that another [`Context`] keeps.
    Stream,
}

/// Memory from [`Context::alloc`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Allocation {
    /// A multiple of 256 bytes.
    pub address: CUdeviceptr,
    /// The graph that the stream is being captured into allocates it each time it runs, and frees it.
    in_graph: bool,
}

// SAFETY: the handles may be used from any thread (the driver API is thread-safe; the context is made current by `enter` in each
// thread that uses them), and they stay valid until this is dropped: they are retained, or the caller's by the contract of
// `Context::over`.
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
#[derive(Debug)]
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

impl Current {
    /// Makes a context current.
    ///
    /// # Safety
    /// `raw` is a live context.
    pub unsafe fn enter(raw: CUcontext) -> Result<Self, DriverError> {
        let previous = ctx::get_current()?.unwrap_or(ptr::null_mut());
        if previous == raw {
            return Ok(Self { previous: None, thread: PhantomData });
        }
        // SAFETY: live by the caller's promise.
        unsafe { ctx::set_current(raw) }?;
        Ok(Self { previous: Some(previous), thread: PhantomData })
    }
}

impl Context {
    /// Retains the primary context of the device with an index, and makes a stream and a pool in it. The driver has been started.
    pub fn open(index: i32, faults: Faults) -> Result<Self, DriverError> {
        // Another thread may be capturing a stream.
        let _relaxed = Relaxed::enter()?;
        let device = result::device::get(index)?;
        // SAFETY: `device` comes from the driver.
        let raw = unsafe { primary_ctx::retain(device) }?;
        // SAFETY: retained above.
        let made = unsafe { Current::enter(raw) }.and_then(|_current| {
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
        Ok(Self { raw, stream, owner: Owner::Library(device), pool, unfreed: Mutex::default(), faults })
    }

    /// A context and a stream of the caller's, and a pool of its own. The context is that of the device with an index.
    ///
    /// # Safety
    /// Both are live, until the last copy of this and of everything made with it is dropped; the stream is one of the context's
    /// or its legacy default stream. The context is current.
    pub unsafe fn over(raw: CUcontext, stream: CUstream, index: i32, faults: Faults) -> Result<Self, DriverError> {
        let _relaxed = Relaxed::enter()?;
        let pool = own_pool(result::device::get(index)?, index);
        Ok(Self { raw, stream, owner: Owner::Caller, pool, unfreed: Mutex::default(), faults })
    }

    /// The same context with a stream and a pool of its own; to be dropped before this. The context is current.
    pub fn with_own_stream(&self, index: i32) -> Result<Self, DriverError> {
        let _relaxed = Relaxed::enter()?;
        let stream = stream::create(stream::StreamKind::NonBlocking)?;
        let pool = result::device::get(index).map(|device| own_pool(device, index));
        let pool = pool.inspect_err(|_| {
            // SAFETY: made above, and nothing else has it.
            let destroyed = unsafe { stream::destroy(stream) };
            if let Err(error) = destroyed {
                log::debug!("a stream is not destroyed: {error}");
            }
        })?;
        let faults = Faults::new(self.faults.device_name());
        Ok(Self { raw: self.raw, stream, owner: Owner::Stream, pool, unfreed: Mutex::default(), faults })
    }

    /// Makes the context current; every other method wants that.
    pub fn enter(&self) -> Result<Current> {
        self.faults.check()?;
        // SAFETY: the context lives as long as this.
        unsafe { Current::enter(self.raw) }.map_err(|error| self.faults.explain(error, "making the context current", 0))
    }

    pub fn stream(&self) -> CUstream {
        self.stream
    }

    /// The outcome of a driver call as the library's own.
    pub fn done<T>(&self, outcome: Result<T, DriverError>, operation: &'static str) -> Result<T> {
        outcome.map_err(|error| self.faults.explain(error, operation, 0))
    }

    /// The context's number, which no other context of this process ever has; the context is current.
    pub fn number(&self) -> Result<u64, DriverError> {
        let mut number = 0;
        // SAFETY: the context is live, and the pointer is to an integer of the right size.
        unsafe { sys::cuCtxGetId(self.raw, &mut number) }.result()?;
        Ok(number)
    }

    /// Whether the stream is being captured into a graph, so that nothing may wait for it.
    pub fn is_captured(&self) -> Result<bool> {
        self.done(self.capture_status(), "asking whether the stream is being captured")
    }

    /// The same. A capture that has failed counts until it is ended.
    fn capture_status(&self) -> Result<bool, DriverError> {
        match self.owner {
            // Nobody else has the stream.
            Owner::Library(_) | Owner::Stream => Ok(false),
            // SAFETY: the stream is live.
            Owner::Caller => unsafe { is_captured(self.stream) },
        }
    }

    /// Refuses what a graph cannot hold. The capture goes on as if it had not been asked for.
    pub fn expect_no_capture(&self, operation: &'static str) -> Result<()> {
        match self.is_captured()? {
            false => Ok(()),
            true => Err(Error::StreamCaptured { device: self.faults.device_name().to_string(), operation }),
        }
    }

    /// Memory for later work on the stream; `bytes` is not 0. While the stream is being captured it is the graph's, to be freed
    /// before the capture ends.
    pub fn alloc(&self, bytes: u64) -> Result<Allocation> {
        let explain = |error| self.faults.explain(error, "allocating memory", bytes);
        let in_graph = self.is_captured()?;
        let Some(pool) = self.pool else {
            self.expect_no_capture("allocating scratch memory without memory pools")?;
            self.free_the_unfreed();
            // SAFETY: the context is current; nothing is assumed of the memory's contents.
            let address = unsafe { result::malloc_sync(bytes as usize) }.map_err(explain)?;
            return Ok(Allocation { address, in_graph });
        };
        // SAFETY: pool and stream are this context's and live; nothing is assumed of the memory's contents.
        let take = || unsafe { mem_pool::alloc_async(pool, bytes as usize, self.stream) };
        if in_graph {
            let address = take().map_err(explain)?;
            return Ok(Allocation { address, in_graph });
        }
        self.free_the_unfreed();
        let taken = take().or_else(|error| {
            if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Err(explain(error));
            }
            // What was freed may still wait for the stream, or lie in pieces of the wrong sizes.
            self.synchronize()?;
            // SAFETY: the pool is live.
            let trimmed = unsafe { mem_pool::trim_to(pool, 0) };
            self.done(trimmed, "trimming the memory pool")?;
            take().map_err(explain)
        });
        taken.map(|address| Allocation { address, in_graph })
    }

    /// Frees memory once the work launched so far is done with it.
    ///
    /// # Safety
    /// The memory came from this context, is freed once, and no later work uses it.
    pub unsafe fn free(&self, memory: Allocation) -> Result<(), DriverError> {
        // A capture takes a free for a node of the graph, which must be of the graph's own memory. If the stream cannot be asked,
        // because work on it would depend on a capture of another stream, it cannot take the free either.
        if !memory.in_graph && self.capture_status() != Ok(false) {
            self.unfreed.lock().unwrap_or_else(PoisonError::into_inner).push(memory.address);
            return Ok(());
        }
        // SAFETY: by the caller's promise.
        unsafe { self.free_now(memory.address) }
    }

    /// # Safety
    /// As of [`free`](Self::free); the stream is not being captured, or the memory is the graph's.
    unsafe fn free_now(&self, address: CUdeviceptr) -> Result<(), DriverError> {
        match self.pool {
            // SAFETY: the memory is the pool's by the caller's promise; all its uses are on this stream, before this.
            Some(_) => unsafe { result::free_async(address, self.stream) },
            // SAFETY: from `malloc_sync` by the caller's promise; the driver waits for work that uses it.
            None => unsafe { result::free_sync(address) },
        }
    }

    /// Frees what was given up during a capture; the stream is not being captured now.
    fn free_the_unfreed(&self) {
        let unfreed = std::mem::take(&mut *self.unfreed.lock().unwrap_or_else(PoisonError::into_inner));
        for address in unfreed {
            // SAFETY: `free` was promised that it is freed once and used no more; it was taken from the list.
            let freed = unsafe { self.free_now(address) };
            if let Err(error) = freed {
                log::debug!("memory at {address:#x} is not freed: {error}");
            }
        }
    }

    /// Memory of `size` bytes that starts with the given ones, made while the stream is being captured but not captured with it:
    /// it is complete when this returns, and stays when the capture has ended. `size` is at least 1.
    pub fn alloc_beside_capture(&self, size: u64, bytes: &[u8]) -> Result<Allocation> {
        let made = Relaxed::enter().and_then(|_relaxed| {
            let side = stream::create(stream::StreamKind::NonBlocking)?;
            // SAFETY: the stream was just made, in this context.
            let filled = unsafe { self.fill_beside_capture(side, size, bytes) };
            // SAFETY: it is live, and nobody else has it.
            let destroyed = unsafe { stream::destroy(side) };
            if let Err(error) = destroyed {
                log::debug!("a stream is not destroyed: {error}");
            }
            filled
        });
        let explain = |error| self.faults.explain(error, "uploading beside a captured stream", size);
        made.map(|address| Allocation { address, in_graph: false }).map_err(explain)
    }

    /// # Safety
    /// `side` is a live stream of this context.
    unsafe fn fill_beside_capture(&self, side: CUstream, size: u64, bytes: &[u8]) -> Result<CUdeviceptr, DriverError> {
        let size = (size as usize).max(bytes.len());
        let address = match self.pool {
            // SAFETY: pool and stream are live; nothing is assumed of the memory's contents.
            Some(pool) => unsafe { mem_pool::alloc_async(pool, size, side) }?,
            // SAFETY: the context is current; nothing is assumed of the memory's contents.
            None => unsafe { result::malloc_sync(size) }?,
        };
        // SAFETY: the new memory has room for the bytes, which are borrowed until the stream is done with them, below.
        let copied = unsafe { result::memcpy_htod_async(address, bytes, side) };
        // SAFETY: the stream is live. Waits even where the copy was refused: part of it may be under way.
        let waited = unsafe { stream::synchronize(side) };
        copied.and(waited).map(|()| address).inspect_err(|_| {
            // SAFETY: the memory came from the pool or `malloc_sync` above, and nothing else has it.
            let freed = match self.pool {
                // SAFETY: as above; the stream is live.
                Some(_) => unsafe { result::free_async(address, side) },
                // SAFETY: as above.
                None => unsafe { result::free_sync(address) },
            };
            if let Err(error) = freed {
                log::debug!("memory at {address:#x} is not freed: {error}");
            }
        })
    }

    /// Copies host bytes; they may change as soon as this returns.
    ///
    /// # Safety
    /// `bytes.len()` bytes at `to` are memory of this context.
    pub unsafe fn upload(&self, to: CUdeviceptr, bytes: &[u8]) -> Result<()> {
        self.expect_no_capture("copying from the host")?;
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
        self.expect_no_capture("copying to the host")?;
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
        // SAFETY: the function is of a module that is there as long as the context; the parameter is what it takes by the
        // caller's promise, and is copied before the call returns.
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
        self.expect_no_capture("waiting for the device")?;
        self.free_the_unfreed();
        // SAFETY: the stream is live.
        let waited = unsafe { stream::synchronize(self.stream) };
        self.done(waited, "waiting for the device")
    }
}

impl Drop for Context {
    /// The context is live: buffers hold it, and the caller's outlives them by the contract of [`over`](Self::over).
    fn drop(&mut self) {
        // Of a lost context nothing can be given back.
        let Ok(_current) = self.enter() else { return };
        let _relaxed = Relaxed::enter();
        if self.capture_status() == Ok(false) {
            self.free_the_unfreed();
        }
        let report = |what: &str, outcome: Result<(), DriverError>| {
            if let Err(error) = outcome {
                log::debug!("{what} is not given back: {error}");
            }
        };
        if let Some(pool) = self.pool {
            // What is free already, so that it is there for others at once: the driver keeps a pool's memory until all frees of it
            // have run.
            // SAFETY: the pool is this context's own.
            report("free memory", unsafe { mem_pool::trim_to(pool, 0) });
            // SAFETY: as above.
            report("a memory pool", unsafe { mem_pool::destroy(pool) });
        }
        if self.owner != Owner::Caller {
            // SAFETY: the stream is this context's own; the driver lets it finish its work.
            report("a stream", unsafe { stream::destroy(self.stream) });
        }
        if let Owner::Library(device) = self.owner {
            // SAFETY: retained in `open`, once.
            report("a context", unsafe { primary_ctx::release(device) });
        }
    }
}

/// Whether a stream is being captured into a graph, or was until something went wrong and has not ended the capture yet.
///
/// # Safety
/// The stream is live, or the legacy default stream of the current context.
pub(super) unsafe fn is_captured(stream: CUstream) -> Result<bool, DriverError> {
    // SAFETY: by the caller's promise.
    let status = unsafe { stream::is_capturing(stream) }?;
    Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
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
