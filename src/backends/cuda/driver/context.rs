//! A context and one stream of it, which takes all work.
//!
//! A context is either the primary one of a device that the library opened, which the CUDA runtime
//! and other libraries in the process use too: it is retained as long as the device exists. Or
//! context and stream are external: they stay the application's, and only the memory pool is the
//! library's own.

use std::fmt;
use std::marker::PhantomData;
use std::ptr;

use cudarc::driver::DriverError;
use cudarc::driver::result::{self, ctx, primary_ctx, stream};
use cudarc::driver::sys::{self, CUcontext, CUdevice, CUstream};

use crate::error::{Error, Result};

use super::capture::{RelaxedCapture, is_captured};
use super::fault::Faults;
use super::pool::Pool;

/// A context, the stream of it that takes all work, and the pool that memory comes from.
pub struct Context {
    raw: CUcontext,
    stream: CUstream,
    owner: Owner,
    pool: Pool,
    pub faults: Faults,
}

/// Whom context and stream belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// The primary context of this device, retained, and a stream that nobody else has.
    Library(CUdevice),
    /// Both belong to the application, which keeps them until this is dropped.
    Application,
    /// A stream that nobody else has, in a context that another [`Context`] keeps.
    StreamOnly,
}

// SAFETY: the handles may be used from any thread (the driver API is thread-safe; the context is
// made current by `enter` in each thread that uses them), and they stay valid until this is
// dropped: they are retained, or external and kept by the contract of `Context::external`.
unsafe impl Send for Context {}
// SAFETY: as above; the pool's list is behind a lock.
unsafe impl Sync for Context {}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("raw", &self.raw).field("stream", &self.stream).finish_non_exhaustive()
    }
}

/// Makes a context current in this thread until this is dropped; then the previous one is current
/// again. The application may be in the middle of its own CUDA work.
#[derive(Debug)]
pub struct Current {
    /// `None` if it was the same.
    previous: Option<CUcontext>,
    /// Not `Send`: each thread has its own current context.
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
    /// Retains the primary context of the device with an index, and makes a stream and a pool in
    /// it. The driver has been started.
    pub fn open(index: i32, faults: Faults) -> Result<Self, DriverError> {
        // Another thread may be capturing a stream.
        let _relaxed = RelaxedCapture::enter()?;
        let device = result::device::get(index)?;
        // SAFETY: `device` comes from the driver.
        let raw = unsafe { primary_ctx::retain(device) }?;
        // SAFETY: retained above.
        let made = unsafe { Current::enter(raw) }.and_then(|_current| {
            let stream = stream::create(stream::StreamKind::NonBlocking)?;
            Ok((stream, Pool::new(device, index)))
        });
        let (stream, pool) = made.inspect_err(|_| {
            // SAFETY: retained above, and nothing else has it yet.
            let released = unsafe { primary_ctx::release(device) };
            if let Err(error) = released {
                log::debug!("releasing a context that is not used: {error}");
            }
        })?;
        Ok(Self { raw, stream, owner: Owner::Library(device), pool, faults })
    }

    /// An external context and stream, with a pool of the library's own. The context is that of the
    /// device with an index.
    ///
    /// # Safety
    /// Both are live until the last copy of this and of everything made with it is dropped; the
    /// stream is one of the context's, or its legacy default stream. The context is current.
    pub unsafe fn external(raw: CUcontext, stream: CUstream, index: i32, faults: Faults) -> Result<Self, DriverError> {
        let _relaxed = RelaxedCapture::enter()?;
        let pool = Pool::new(result::device::get(index)?, index);
        Ok(Self { raw, stream, owner: Owner::Application, pool, faults })
    }

    /// The same context with a stream and a pool of its own. It must be dropped before this. The
    /// context is current.
    pub fn with_own_stream(&self, index: i32) -> Result<Self, DriverError> {
        let _relaxed = RelaxedCapture::enter()?;
        let stream = stream::create(stream::StreamKind::NonBlocking)?;
        let pool = result::device::get(index).map(|device| Pool::new(device, index));
        let pool = pool.inspect_err(|_| {
            // SAFETY: made above, and nothing else has it.
            let destroyed = unsafe { stream::destroy(stream) };
            if let Err(error) = destroyed {
                log::debug!("a stream is not destroyed: {error}");
            }
        })?;
        let faults = Faults::new(self.faults.device_name());
        Ok(Self { raw: self.raw, stream, owner: Owner::StreamOnly, pool, faults })
    }

    /// Makes the context current. Every other method and every function of this folder that takes a
    /// context needs that.
    pub fn enter(&self) -> Result<Current> {
        self.faults.check()?;
        // SAFETY: the context lives as long as this.
        unsafe { Current::enter(self.raw) }.map_err(|error| self.faults.explain(error, "making the context current", 0))
    }

    pub fn raw(&self) -> CUcontext {
        self.raw
    }

    pub fn stream(&self) -> CUstream {
        self.stream
    }

    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Converts the outcome of a driver call. An error after which every later call fails marks the
    /// context as lost.
    pub fn check<T>(&self, outcome: Result<T, DriverError>, operation: &'static str) -> Result<T> {
        outcome.map_err(|error| self.faults.explain(error, operation, 0))
    }

    /// The context's number, which no other context of this process ever has; the context is
    /// current.
    pub fn number(&self) -> Result<u64, DriverError> {
        let mut number = 0;
        // SAFETY: the context is live, and the pointer is to an integer of the right size.
        unsafe { sys::cuCtxGetId(self.raw, &mut number) }.result()?;
        Ok(number)
    }

    /// Whether the stream is being captured into a graph, so that nothing may wait for it.
    pub fn is_captured(&self) -> Result<bool> {
        self.check(self.capture_status(), "asking whether the stream is being captured")
    }

    /// [`is_captured`](Self::is_captured) with the driver's error. A capture that has failed counts
    /// until it is ended.
    pub fn capture_status(&self) -> Result<bool, DriverError> {
        match self.owner {
            // Nobody else has the stream.
            Owner::Library(_) | Owner::StreamOnly => Ok(false),
            // SAFETY: the stream is live.
            Owner::Application => unsafe { is_captured(self.stream) },
        }
    }

    /// Refuses what a graph cannot hold. The capture is not disturbed.
    pub fn expect_no_capture(&self, operation: &'static str) -> Result<()> {
        match self.is_captured()? {
            false => Ok(()),
            true => Err(Error::StreamCaptured { device: self.faults.device_name().to_string(), operation }),
        }
    }

    /// Frees what was given up during a capture. The stream is not being captured now.
    pub fn free_deferred(&self) {
        // SAFETY: the context is current and the stream is its own. `alloc::free`, which defers,
        // was promised that the memory is freed once and used no more.
        unsafe { self.pool.free_deferred(self.stream) }
    }

    /// Waits for all work launched so far.
    pub fn synchronize(&self) -> Result<()> {
        self.expect_no_capture("waiting for the device")?;
        self.free_deferred();
        // SAFETY: the stream is live.
        let waited = unsafe { stream::synchronize(self.stream) };
        self.check(waited, "waiting for the device")
    }
}

impl Drop for Context {
    /// The context is live: buffers hold it, and an external one outlives them by the contract of
    /// [`external`](Self::external).
    fn drop(&mut self) {
        // Nothing can be given back to a lost context.
        let Ok(_current) = self.enter() else { return };
        let _relaxed = RelaxedCapture::enter();
        if self.capture_status() == Ok(false) {
            self.free_deferred();
        }
        let report = |what: &str, outcome: Result<(), DriverError>| {
            if let Err(error) = outcome {
                log::debug!("{what} is not given back: {error}");
            }
        };
        // Free memory first, so that others can use it at once: the driver keeps a pool's memory
        // until all frees into it have run.
        report("free memory", self.pool.trim());
        // SAFETY: the pool is this context's own, and not used after this.
        report("a memory pool", unsafe { self.pool.destroy() });
        if self.owner != Owner::Application {
            // SAFETY: the stream is this context's own; the driver lets it finish its work.
            report("a stream", unsafe { stream::destroy(self.stream) });
        }
        if let Owner::Library(device) = self.owner {
            // SAFETY: retained in `open`, once.
            report("a context", unsafe { primary_ctx::release(device) });
        }
    }
}
