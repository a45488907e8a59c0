//! A number in a device's memory that streams set and wait for, and kernels read: what has come from
//! other devices so far. It counts modulo 2^32. The context is current.

use cudarc::driver::sys::{
    self, CUdevice_attribute, CUdeviceptr, CUstream, CUstreamWaitValue_flags, CUstreamWriteValue_flags,
};

use crate::error::Result;

use super::context::Context;

/// Whether streams of a device can do so.
pub fn is_supported(context: &Context, device: sys::CUdevice) -> Result<bool> {
    let mut can = 0;
    let asked = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR;
    // SAFETY: the device comes from the driver, and the pointer is to an integer. Where the driver has this attribute,
    // streams set and wait for 32-bit values.
    let answer = unsafe { sys::cuDeviceGetAttribute(&mut can, asked, device) }.result();
    context.check(answer, "asking whether streams can wait for a number")?;
    Ok(can != 0)
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

/// Later work of the context's stream comes after the number has been set to this one, or past it.
///
/// # Safety
/// As for [`set`]; what sets it has been enqueued.
pub unsafe fn wait(context: &Context, address: CUdeviceptr, number: u32) -> Result<()> {
    let flags = CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32;
    // SAFETY: by the caller's promise.
    let waits = unsafe { sys::cuStreamWaitValue32_v2(context.stream(), address, number, flags) }.result();
    context.check(waits, "waiting for a number on a stream")
}
