//! What the operations of one device work with: its stream, its memory and its kernels.

use std::sync::Arc;

use bytemuck::Pod;

use crate::cache::DeviceId;
use crate::call::memory::{Sink, Source};
use crate::error::{Error, Result};

use super::driver::context::Context;
use super::driver::launch::{self, Function};
use super::driver::memory::CudaBuffer;
use super::driver::scratch::{KeptScratch, LentScratch};
use super::driver::zeroed::{KeptCounts, ZeroedCounts};
use super::kernels::module::{Entry, Modules};

/// Allocates, finds buffers and launches kernels, all in the order of one stream. The context is
/// current in every call.
#[derive(Debug)]
pub struct Launcher {
    pub id: DeviceId,
    pub context: Arc<Context>,
    pub modules: Arc<Modules>,
    pub multiprocessors: usize,
    /// The device's memory: no buffer is larger.
    pub max_buffer_bytes: u64,
    /// Scratch that calls use again.
    pub kept: KeptScratch,
    /// Counts that are zero, which calls use again.
    pub counts: KeptCounts,
}

impl Launcher {
    /// Another launcher in the same context and with the same kernels, on a stream of its own. It
    /// must be dropped before this.
    pub fn on_own_stream(&self, index: i32) -> Result<Self> {
        let _current = self.context.enter()?;
        let context = self.context.check(self.context.with_own_stream(index), "making a stream")?;
        Ok(Self {
            id: DeviceId::unique(),
            context: Arc::new(context),
            modules: Arc::clone(&self.modules),
            multiprocessors: self.multiprocessors,
            max_buffer_bytes: self.max_buffer_bytes,
            kept: KeptScratch::default(),
            counts: KeptCounts::default(),
        })
    }

    /// Uninitialised memory that may outlive a capture of the stream, so it is refused during one.
    pub fn lasting(&self, bytes: u64) -> Result<CudaBuffer> {
        self.context.expect_no_capture("allocating a tensor")?;
        self.scratch(bytes)
    }

    /// Uninitialised memory that is dropped before the call ends.
    pub fn scratch(&self, bytes: u64) -> Result<CudaBuffer> {
        let limit = self.max_buffer_bytes;
        if bytes > limit {
            let limit_name = "the device's memory (bytes)";
            return Err(Error::TooLarge { argument: "tensor", limit_name, limit, got: bytes });
        }
        match CudaBuffer::new(&self.context, self.id, bytes) {
            // What is kept may be what is missing.
            Err(Error::OutOfMemory { .. }) => {
                self.kept.clear();
                CudaBuffer::new(&self.context, self.id, bytes)
            }
            made => made,
        }
    }

    /// [`scratch`](Self::scratch) of at least so many bytes that calls use again, one after another: dropped once the work that
    /// uses it is launched. While the stream is being captured the memory is the graph's own.
    pub fn lent_scratch(&self, bytes: u64) -> Result<LentScratch<'_>> {
        if self.context.is_captured()? {
            return self.scratch(bytes).map(LentScratch::of_graph);
        }
        let buffer = self.kept.take(bytes).map_or_else(|| self.scratch(bytes), Ok)?;
        Ok(self.kept.lend(buffer))
    }

    /// Zeros that a launch counts in, and leaves as zeros: at least so many bytes, which later launches have again.
    pub fn zeroed_counts(&self, bytes: u64) -> Result<ZeroedCounts> {
        self.counts.take(&self.context, self.id, bytes)
    }

    /// New memory that holds the bytes and may outlive a capture of the stream.
    pub fn uploaded(&self, bytes: &[u8]) -> Result<CudaBuffer> {
        CudaBuffer::holding(&self.context, self.id, bytes)
    }

    /// The buffer to read, if it belongs to this device.
    pub fn source<'a>(&self, source: Source<'a>) -> Result<&'a CudaBuffer> {
        source.owned_by(self.id, self.context.faults.device_name())
    }

    /// The buffer to write, if it belongs to this device.
    pub fn sink<'a>(&self, sink: &Sink<'a>) -> Result<&'a CudaBuffer> {
        sink.owned_by(self.id, self.context.faults.device_name())
    }

    pub fn function(&self, entry: Entry) -> Result<Function> {
        self.modules.function(&self.context, entry)
    }

    /// Launches a kernel that takes one struct by value.
    ///
    /// # Safety
    /// As for [`launch::launch`].
    pub unsafe fn launch<P: Pod>(&self, function: Function, grid: [u32; 3], block: u32, params: &P) -> Result<()> {
        // SAFETY: by the caller's promise.
        unsafe { launch::launch(&self.context, function, grid, block, params) }
    }
}
