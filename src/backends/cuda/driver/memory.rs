//! Buffers: the library's own, or external memory. Its own are allocated and freed in stream order:
//! a buffer may be dropped as soon as the work that uses it is launched.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;

use crate::cache::DeviceId;
use crate::call::memory::DeviceBuffer;
use crate::error::{Error, Result};

use super::alloc::{self, Allocation};
use super::context::Context;
use super::transfer;

/// An empty tensor has memory too, so that no address is null.
const MIN_BYTES: u64 = 16;
/// All CUDA devices of a process share one address space; buffers of other backends are not in it.
const ADDRESS_SPACE: u64 = u64::MAX - 1;

/// Memory of a device.
pub struct CudaBuffer {
    context: Arc<Context>,
    address: CUdeviceptr,
    size: u64,
    device: DeviceId,
    /// `None` if the memory is external.
    own: Option<Allocation>,
}

impl CudaBuffer {
    /// Uninitialised memory; the context is current. While the stream is being captured the memory
    /// belongs to the graph and must be dropped before the capture ends, so it can only be scratch.
    pub fn new(context: &Arc<Context>, device: DeviceId, size: u64) -> Result<Self> {
        let own = alloc::alloc(context, size.max(MIN_BYTES))?;
        Ok(Self::owning(own, context, device, size))
    }

    /// Memory that holds the bytes and outlives a capture of the stream; the context is current.
    pub fn holding(context: &Arc<Context>, device: DeviceId, bytes: &[u8]) -> Result<Self> {
        let size = bytes.len() as u64;
        if context.is_captured()? {
            let own = alloc::alloc_beside_capture(context, size.max(MIN_BYTES), bytes)?;
            return Ok(Self::owning(own, context, device, size));
        }
        let buffer = Self::new(context, device, size)?;
        buffer.upload(bytes)?;
        Ok(buffer)
    }

    fn owning(own: Allocation, context: &Arc<Context>, device: DeviceId, size: u64) -> Self {
        Self { context: Arc::clone(context), address: own.address, size, device, own: Some(own) }
    }

    /// External memory.
    ///
    /// # Safety
    /// `size` bytes from `address` are memory that the context's work may read and write, until
    /// this is dropped and the work launched by then is done; nobody else uses them out of the
    /// stream's order.
    pub unsafe fn external(context: &Arc<Context>, device: DeviceId, address: CUdeviceptr, size: u64) -> Self {
        Self { context: Arc::clone(context), address, size, device, own: None }
    }

    /// Whether it is the library's own memory.
    pub fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// Address of the first byte; a multiple of 256 unless the memory is external.
    pub fn address(&self) -> CUdeviceptr {
        self.address
    }

    /// Copies host bytes to the start; the context is current.
    pub fn upload(&self, bytes: &[u8]) -> Result<()> {
        self.expect_room(bytes.len())?;
        // SAFETY: the buffer has room for the bytes, by the check above.
        unsafe { transfer::upload(&self.context, self.address, bytes) }
    }

    /// Copies the start to the host, after all work launched so far; the context is current.
    pub fn download(&self, into: &mut [u8]) -> Result<()> {
        self.expect_room(into.len())?;
        // SAFETY: the buffer has as many bytes, by the check above.
        unsafe { transfer::download(&self.context, self.address, into) }
    }

    fn expect_room(&self, bytes: usize) -> Result<()> {
        let expected = bytes as u64;
        if expected <= self.size {
            return Ok(());
        }
        Err(Error::BufferTooSmall { argument: "memory", expected, got: self.size })
    }
}

impl Drop for CudaBuffer {
    fn drop(&mut self) {
        let Some(own) = self.own else { return };
        // In a lost context nothing can be freed, and nothing needs to be.
        let Ok(_current) = self.context.enter() else { return };
        // SAFETY: the memory is this context's, and this is its only owner.
        let freed = unsafe { alloc::free(&self.context, own) };
        if let Err(error) = freed {
            log::debug!("{self:?} is not freed: {error}");
        }
    }
}

impl fmt::Debug for CudaBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CUDA memory, {} bytes at {:#x}", self.size, self.address)
    }
}

impl DeviceBuffer for CudaBuffer {
    fn device(&self) -> DeviceId {
        self.device
    }

    fn device_name(&self) -> &str {
        self.context.faults.device_name()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn space(&self) -> u64 {
        ADDRESS_SPACE
    }

    fn touched(&self, bytes: Range<u64>) -> Range<u64> {
        self.address.saturating_add(bytes.start)..self.address.saturating_add(bytes.end)
    }

    fn cuda_address(&self) -> Option<u64> {
        Some(self.address)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
