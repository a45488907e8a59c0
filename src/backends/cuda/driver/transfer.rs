//! Copies to, from and on the device, and fills. All of them go to the stream, in the order of the
//! calls; the context is current.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdeviceptr, CUmemorytype, CUpointer_attribute};

use crate::error::Result;

use super::context::Context;

/// Rows of bytes to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rectangle {
    /// Addresses of the first row.
    pub from: u64,
    pub to: u64,
    /// Bytes of a row.
    pub width: u64,
    pub rows: u64,
    /// Bytes from row to row.
    pub from_pitch: u64,
    pub to_pitch: u64,
}

impl Rectangle {
    /// The copy in the other direction.
    pub fn reversed(self) -> Self {
        let Self { from, to, from_pitch, to_pitch, .. } = self;
        Self { from: to, to: from, from_pitch: to_pitch, to_pitch: from_pitch, ..self }
    }
}

/// Copies host bytes to the device. They may change as soon as this returns.
///
/// # Safety
/// `bytes.len()` bytes at `to` are memory of this context.
pub unsafe fn upload(context: &Context, to: CUdeviceptr, bytes: &[u8]) -> Result<()> {
    context.expect_no_capture("copying from the host")?;
    if bytes.is_empty() {
        return Ok(());
    }
    // SAFETY: the destination is in bounds by the caller's promise. The source is either pageable,
    // and then has been staged when the call returns, or it stays borrowed until the stream has
    // read it, below.
    let copied = unsafe { result::memcpy_htod_async(to, bytes, context.stream()) };
    context.check(copied, "copying to the device")?;
    if is_known_to_driver(context, bytes)? { context.synchronize() } else { Ok(()) }
}

/// Whether host memory is page-locked or managed, so that copies of it are asynchronous.
fn is_known_to_driver(context: &Context, bytes: &[u8]) -> Result<bool> {
    // The driver's types begin at 1; memory that it does not know leaves 0.
    let mut memory_type = 0_u32;
    let mut attribute = CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
    let mut data = ptr::from_mut(&mut memory_type).cast::<c_void>();
    let address = bytes.as_ptr() as CUdeviceptr;
    // SAFETY: one attribute, and one pointer to a live integer of its size; any address is allowed.
    let asked = unsafe { sys::cuPointerGetAttributes(1, &mut attribute, &mut data, address) }.result();
    context.check(asked, "asking about host memory")?;
    Ok(memory_type != 0)
}

/// Copies to the host, after all work launched so far.
///
/// # Safety
/// `into.len()` bytes at `from` are memory of this context.
pub unsafe fn download(context: &Context, from: CUdeviceptr, into: &mut [u8]) -> Result<()> {
    context.expect_no_capture("copying to the host")?;
    if into.is_empty() {
        return context.synchronize();
    }
    // SAFETY: the source is in bounds by the caller's promise; the destination stays borrowed until
    // the stream has written it, below. Any bytes are valid u8s.
    let copied = unsafe { result::memcpy_dtoh_async(into, from, context.stream()) };
    // Waits even where the copy was refused: part of it may be under way.
    let waited = context.synchronize();
    context.check(copied, "copying to the host")?;
    waited
}

/// Writes the same byte to a range of memory.
///
/// # Safety
/// `bytes` bytes at `address` are memory of this context that nobody else uses.
pub unsafe fn fill(context: &Context, address: CUdeviceptr, byte: u8, bytes: u64) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: in bounds by the caller's promise.
    let filled = unsafe { result::memset_d8_async(address, byte, bytes as usize, context.stream()) };
    context.check(filled, "filling memory")
}

/// Copies rows of bytes on the device. They need no alignment.
///
/// # Safety
/// All rows of the rectangle are memory of this context, and nobody else uses those at `to`.
pub unsafe fn copy(context: &Context, rectangle: &Rectangle) -> Result<()> {
    let Rectangle { from, to, width, rows, from_pitch, to_pitch } = *rectangle;
    if rows == 1 {
        // SAFETY: in bounds by the caller's promise.
        let copied = unsafe { result::memcpy_dtod_async(to, from, width as usize, context.stream()) };
        return context.check(copied, "copying rows");
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
    let copied = unsafe { sys::cuMemcpy3DAsync_v2(&copy, context.stream()) }.result();
    context.check(copied, "copying rows")
}
