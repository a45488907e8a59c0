//! A number in a device's memory that streams set and wait for, and kernels read: what has come from
//! other devices so far. It counts modulo 2^32. The context is current.

use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdeviceptr, CUstream, CUstreamWaitValue_flags, CUstreamWriteValue_flags};

use crate::cache::DeviceId;
use crate::error::Result;

use super::capture::RelaxedCapture;
use super::context::Context;
use super::memory::CudaBuffer;

const BYTES: usize = size_of::<u32>();

/// The number, 0 at first.
#[derive(Debug)]
pub struct Count {
    /// Over the memory, which this owns.
    buffer: CudaBuffer,
    context: Arc<Context>,
}

impl Count {
    /// Of a device with an id, whose context this is. Not from the pool: streams set no numbers in memory of pools.
    pub fn new(context: &Arc<Context>, device: DeviceId) -> Result<Self> {
        // Another thread may be capturing a stream.
        let relaxed = context.check(RelaxedCapture::enter(), "allocating memory")?;
        // SAFETY: nothing is assumed of the contents.
        let address = context.check(unsafe { result::malloc_sync(BYTES) }, "allocating memory")?;
        drop(relaxed);
        // SAFETY: just allocated; freed when this is dropped, which waits for the device's work.
        let buffer = unsafe { CudaBuffer::external(context, device, address, BYTES as u64) };
        let made = Self { buffer, context: Arc::clone(context) };
        made.buffer.upload(&0_u32.to_ne_bytes())?;
        Ok(made)
    }

    /// Its memory.
    pub fn buffer(&self) -> &CudaBuffer {
        &self.buffer
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else { return };
        let freed = RelaxedCapture::enter().and_then(|_relaxed| {
            // SAFETY: allocated in `new`, and this is its only owner; the driver waits for work that uses it.
            unsafe { result::free_sync(self.buffer.address()) }
        });
        if let Err(error) = freed {
            log::debug!("a number on a device is not freed: {error}");
        }
    }
}

/// Sets the number after all that the stream has been given before.
///
/// # Safety
/// The address is that of a `u32` in memory of the context; the stream is the context's.
pub unsafe fn set(context: &Context, stream: CUstream, address: CUdeviceptr, number: u32) -> Result<()> {
    let flags = CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as u32;
    // SAFETY: by the caller's promise.
    let set = unsafe { sys::cuStreamWriteValue32_v2(stream, address, number, flags) }.result();
    context.check(set, "setting a number on a stream")
}

/// Later work of the context's stream comes after the number has been set to this one. It compares for equality: the driver's other
/// comparison looks at the sign of the difference, which says nothing of a number that was half of the range away.
///
/// # Safety
/// As for [`set`]; what sets it has been enqueued, and what sets it to another one later comes after this.
pub unsafe fn wait(context: &Context, address: CUdeviceptr, number: u32) -> Result<()> {
    let flags = CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_EQ as u32;
    // SAFETY: by the caller's promise.
    let waits = unsafe { sys::cuStreamWaitValue32_v2(context.stream(), address, number, flags) }.result();
    context.check(waits, "waiting for a number on a stream")
}
