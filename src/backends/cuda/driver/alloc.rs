//! Allocating and freeing device memory, also while the stream is being captured into a graph. The
//! context is current.

use cudarc::driver::DriverError;
use cudarc::driver::result::{self, stream};
use cudarc::driver::sys::{CUdeviceptr, CUresult, CUstream};

use crate::error::Result;

use super::capture::RelaxedCapture;
use super::context::Context;

/// Memory from [`alloc`] or [`alloc_beside_capture`].
#[derive(Debug, Clone, Copy)]
pub struct Allocation {
    /// A multiple of 256 bytes.
    pub address: CUdeviceptr,
    /// The graph that the stream is being captured into allocates it each time it runs, and frees
    /// it.
    in_graph: bool,
}

/// Allocates memory for later work on the stream; `bytes` is not 0. While the stream is being
/// captured the memory belongs to the graph, and must be freed before the capture ends.
pub fn alloc(context: &Context, bytes: u64) -> Result<Allocation> {
    let explain = |error| context.faults.explain(error, "allocating memory", bytes);
    let pool = context.pool();
    // SAFETY: the context is current, and the stream is its own.
    let take = || unsafe { pool.alloc(bytes, context.stream()) };
    let in_graph = context.is_captured()?;
    if !pool.is_stream_ordered() {
        context.expect_no_capture("allocating scratch memory without memory pools")?;
    }
    if in_graph {
        let address = take().map_err(explain)?;
        return Ok(Allocation { address, in_graph });
    }
    context.free_deferred();
    let taken = take().or_else(|error| {
        if error.0 != CUresult::CUDA_ERROR_OUT_OF_MEMORY || !pool.is_stream_ordered() {
            return Err(explain(error));
        }
        // What was freed may still wait for the stream, or lie in pieces of the wrong sizes.
        context.synchronize()?;
        context.check(pool.trim(), "trimming the memory pool")?;
        take().map_err(explain)
    });
    taken.map(|address| Allocation { address, in_graph })
}

/// Allocates memory of `size` bytes that starts with the given ones, while the stream is being
/// captured but outside of the graph: it is complete when this returns, and outlives the capture.
/// `size` is at least 1.
pub fn alloc_beside_capture(context: &Context, size: u64, bytes: &[u8]) -> Result<Allocation> {
    let made = RelaxedCapture::enter().and_then(|_relaxed| {
        let side = stream::create(stream::StreamKind::NonBlocking)?;
        // SAFETY: the stream was just made, in this context.
        let filled = unsafe { alloc_filled(context, side, size, bytes) };
        // SAFETY: it is live, and nobody else has it.
        let destroyed = unsafe { stream::destroy(side) };
        if let Err(error) = destroyed {
            log::debug!("a stream is not destroyed: {error}");
        }
        filled
    });
    let explain = |error| context.faults.explain(error, "uploading beside a captured stream", size);
    made.map(|address| Allocation { address, in_graph: false }).map_err(explain)
}

/// # Safety
/// `side` is a live stream of the context.
unsafe fn alloc_filled(context: &Context, side: CUstream, size: u64, bytes: &[u8]) -> Result<CUdeviceptr, DriverError> {
    let pool = context.pool();
    // SAFETY: the context is current; the stream is live by the caller's promise.
    let address = unsafe { pool.alloc(size.max(bytes.len() as u64), side) }?;
    // SAFETY: the new memory has room for the bytes, which stay borrowed until the stream has read
    // them, below.
    let copied = unsafe { result::memcpy_htod_async(address, bytes, side) };
    // SAFETY: the stream is live. Waits even where the copy was refused: part of it may be under
    // way.
    let waited = unsafe { stream::synchronize(side) };
    copied.and(waited).map(|()| address).inspect_err(|_| {
        // SAFETY: the memory was allocated above, and nothing else has it.
        let freed = unsafe { pool.free(address, side) };
        if let Err(error) = freed {
            log::debug!("memory at {address:#x} is not freed: {error}");
        }
    })
}

/// Frees memory after the work launched so far.
///
/// # Safety
/// The memory came from this context, is freed once, and no later work uses it.
pub unsafe fn free(context: &Context, memory: Allocation) -> Result<(), DriverError> {
    // A capture takes a free for a node of the graph, which must be of the graph's own memory. If
    // the stream cannot be asked, because work on it would depend on a capture of another stream,
    // it cannot take the free either.
    if !memory.in_graph && context.capture_status() != Ok(false) {
        context.pool().defer(memory.address);
        return Ok(());
    }
    // SAFETY: by the caller's promise; the stream is not being captured, or the memory is the
    // graph's.
    unsafe { context.pool().free(memory.address, context.stream()) }
}
