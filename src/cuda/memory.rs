//! Buffers. They are allocated and freed in stream order: one may be dropped as soon as the work that uses it is launched.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;

use crate::backend::DeviceBuffer;
use crate::cache::DeviceId;
use crate::error::{Error, Result};

use super::context::Context;

/// An empty tensor has memory too, so that no address is null.
const MIN_BYTES: u64 = 16;
/// All CUDA devices of a process share one; no buffer of another kind is in it.
const ADDRESS_SPACE: u64 = u64::MAX - 1;

/// Memory of a device.
pub(super) struct CudaBuffer {
    context: Arc<Context>,
    address: CUdeviceptr,
    size: u64,
    device: DeviceId,
}

impl CudaBuffer {
    /// Memory with whatever contents; the context is current.
    pub fn new(context: &Arc<Context>, device: DeviceId, size: u64) -> Result<Self> {
        let address = context.alloc(size.max(MIN_BYTES))?;
        Ok(Self { context: Arc::clone(context), address, size, device })
    }

    /// Address of the first byte; a multiple of 256.
    pub fn address(&self) -> CUdeviceptr {
        self.address
    }

    /// Copies host bytes to the start; the context is current.
    pub fn upload(&self, bytes: &[u8]) -> Result<()> {
        self.expect_room(bytes.len())?;
        // SAFETY: the buffer has room for the bytes, by the check above.
        unsafe { self.context.upload(self.address, bytes) }
    }

    /// Copies the start to the host, after all work launched so far; the context is current.
    pub fn download(&self, into: &mut [u8]) -> Result<()> {
        self.expect_room(into.len())?;
        // SAFETY: the buffer has as many bytes, by the check above.
        unsafe { self.context.download(self.address, into) }
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
        // Of a lost context nothing can be freed, and nothing needs to be.
        let Ok(_current) = self.context.enter() else { return };
        // SAFETY: the address is from this context's `alloc`, and this is its only owner.
        let freed = unsafe { self.context.free(self.address) };
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

    fn as_any(&self) -> &dyn Any {
        self
    }
}
