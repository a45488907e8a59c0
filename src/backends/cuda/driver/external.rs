//! Checks of external handles: a context, a stream and memory that belong to the application. They
//! come as bare numbers. Whatever the driver can tell about them is asked; the rest is the contract
//! of the unsafe functions.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::DriverError;
use cudarc::driver::result::{self, ctx};
use cudarc::driver::sys::{self, CUcontext, CUmemorytype, CUpointer_attribute, CUstream};

use crate::error::{Error, Result};

use super::capture::is_captured;
use super::context::{Context, Current};
use super::fault::describe;

/// `CU_STREAM_LEGACY`: the legacy default stream, which null names too.
const LEGACY_STREAM: usize = 1;
/// `CU_STREAM_PER_THREAD`: another stream in each thread that names it.
const PER_THREAD_STREAM: usize = 2;
/// No system maps memory below this address.
const LOWEST_ADDRESS: usize = 4096;

fn bad_handle(argument: &'static str, expected: &str, got: String) -> Error {
    Error::Handle { argument, expected: expected.to_owned(), got }
}

/// An external context and a stream of it. The context is current while this exists.
#[derive(Debug)]
pub struct ExternalHandles {
    pub context: CUcontext,
    pub stream: CUstream,
    /// The index of the context's device.
    pub index: i32,
    _current: Current,
}

impl ExternalHandles {
    /// Refuses values that no handle has, before anything is called.
    pub fn check_values(context: *mut c_void, stream: *mut c_void) -> Result<()> {
        if stream as usize == PER_THREAD_STREAM {
            // Work of two threads would have no order, though it uses the same memory.
            let got = "CU_STREAM_PER_THREAD, which is another stream in each thread".to_owned();
            return Err(bad_handle("stream", "one stream", got));
        }
        for (argument, handle) in [("context", context as usize), ("stream", stream as usize)] {
            let is_special = handle == 0 || (argument == "stream" && handle == LEGACY_STREAM);
            let is_pointer = handle >= LOWEST_ADDRESS && handle.is_multiple_of(align_of::<*mut c_void>());
            if !is_special && !is_pointer {
                return Err(bad_handle(argument, "a handle of the CUDA driver, or null", format!("{handle:#x}")));
            }
        }
        Ok(())
    }

    /// Finds the context, if none is given, and asks the driver whether both handles are live and
    /// belong together. The driver has been started and is not older than the kernels.
    ///
    /// # Safety
    /// The context is null or live, and the stream is null, `CU_STREAM_LEGACY` or live: the driver
    /// may follow other pointers before it notices what they are.
    pub unsafe fn check(context: *mut c_void, stream: *mut c_void) -> Result<Self> {
        let stream = stream.cast::<sys::CUstream_st>();
        // SAFETY: by the caller's promise.
        let context = unsafe { given_or_implied(context.cast(), stream) }?;
        // SAFETY: by the caller's promise, or from the driver.
        let (current, index) = unsafe { enter(context) }?;
        // SAFETY: by the caller's promise; for the default stream, the context is current.
        unsafe { expect_uncaptured(stream, index) }?;
        // SAFETY: as above, and the driver knows the context.
        unsafe { expect_stream_of(context, stream) }?;
        Ok(Self { context, stream, index, _current: current })
    }
}

/// The error that a driver call gave for a handle.
fn refused(argument: &'static str, expected: &str, error: DriverError) -> Error {
    bad_handle(argument, expected, describe(error))
}

/// The context that was given; else that of the stream; else the current one.
///
/// # Safety
/// The context is null or live, and the stream is null, `CU_STREAM_LEGACY` or live.
unsafe fn given_or_implied(context: CUcontext, stream: CUstream) -> Result<CUcontext> {
    if !context.is_null() {
        return Ok(context);
    }
    if stream as usize > LEGACY_STREAM {
        // SAFETY: by the caller's promise.
        return unsafe { context_of(stream) }.map_err(|error| refused("stream", "a live CUDA stream", error));
    }
    let expected = "a CUDA context, or a current one";
    let current = ctx::get_current().map_err(|error| refused("context", expected, error))?;
    let none = || bad_handle("context", expected, "null, and no context is current in this thread".to_owned());
    current.ok_or_else(none)
}

/// Makes a context current; returns that and the index of its device.
///
/// # Safety
/// The context is live.
unsafe fn enter(context: CUcontext) -> Result<(Current, i32)> {
    let dead = |error| refused("context", "a live CUDA context", error);
    let mut version = 0;
    // SAFETY: by the caller's promise; the pointer is to a live integer.
    unsafe { sys::cuCtxGetApiVersion(context, &mut version) }.result().map_err(dead)?;
    // SAFETY: by the caller's promise, and the driver knows it.
    let current = unsafe { Current::enter(context) }.map_err(dead)?;
    Ok((current, current_device().map_err(dead)?))
}

/// # Safety
/// The stream is live, or the legacy default stream of the current context.
unsafe fn expect_uncaptured(stream: CUstream, index: i32) -> Result<()> {
    // SAFETY: by the caller's promise.
    match unsafe { is_captured(stream) } {
        Ok(false) => Ok(()),
        Ok(true) => Err(Error::StreamCaptured { device: format!("cuda:{index}"), operation: "making a device" }),
        Err(error) => Err(refused("stream", "a live CUDA stream that is not waiting for a capture", error)),
    }
}

/// # Safety
/// The context is live. The stream is live, or the legacy default stream of the current context.
unsafe fn expect_stream_of(context: CUcontext, stream: CUstream) -> Result<()> {
    // SAFETY: by the caller's promise.
    let other = unsafe { context_of(stream) }.map_err(|error| refused("stream", "a live CUDA stream", error))?;
    // SAFETY: both are live.
    if other == context || unsafe { have_the_same_number(other, context) } {
        return Ok(());
    }
    let (expected, got) = (format!("a stream of context {context:?}"), format!("one of context {other:?}"));
    Err(bad_handle("stream", &expected, got))
}

/// The context of a stream; for the default stream, the current one.
///
/// # Safety
/// The stream is live, or the legacy default stream.
unsafe fn context_of(stream: CUstream) -> Result<CUcontext, DriverError> {
    let mut context = ptr::null_mut();
    // SAFETY: by the caller's promise; the pointer is to a live handle.
    unsafe { sys::cuStreamGetCtx(stream, &mut context) }.result()?;
    Ok(context)
}

/// Whether two handles name the same context.
///
/// # Safety
/// Both are live contexts.
unsafe fn have_the_same_number(one: CUcontext, other: CUcontext) -> bool {
    let number = |context| {
        let mut number = 0;
        // SAFETY: live by the caller's promise; the pointer is to an integer of the right size.
        unsafe { sys::cuCtxGetId(context, &mut number) }.result().map(|()| number)
    };
    number(one).is_ok_and(|one| number(other) == Ok(one))
}

/// The index of the current context's device.
fn current_device() -> Result<i32, DriverError> {
    let mut device = 0;
    // SAFETY: the pointer is to a live integer.
    unsafe { sys::cuCtxGetDevice(&mut device) }.result()?;
    for index in 0..result::device::get_count()? {
        if result::device::get(index)? == device {
            return Ok(index);
        }
    }
    Err(DriverError(sys::CUresult::CUDA_ERROR_INVALID_DEVICE))
}

/// What the driver knows about an address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct AddressInfo {
    /// A `CUmemorytype`; 0 for memory that is unknown to the driver.
    memory_type: u32,
    is_managed: u32,
    /// The device that it was allocated on.
    ordinal: i32,
    /// For host memory: the address at which kernels find it.
    device_address: u64,
    /// The allocation, or the range that was reserved for it; size 0 if the driver does not say.
    start: u64,
    size: u64,
}

impl AddressInfo {
    fn ask(address: u64) -> Result<Self, DriverError> {
        let mut info = Self::default();
        attributes(
            address,
            [
                (CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, ptr::from_mut(&mut info.memory_type).cast()),
                (CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED, ptr::from_mut(&mut info.is_managed).cast()),
                (CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, ptr::from_mut(&mut info.ordinal).cast()),
                (
                    CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_POINTER,
                    ptr::from_mut(&mut info.device_address).cast(),
                ),
            ],
        )?;
        let (mut start, mut size) = (0_u64, 0_u64);
        // Asked separately: a driver that does not say is no reason to refuse the memory.
        let range = attributes(
            address,
            [
                (CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, ptr::from_mut(&mut start).cast()),
                (CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE, ptr::from_mut(&mut size).cast()),
            ],
        );
        if range.is_ok() {
            (info.start, info.size) = (start, size);
        }
        Ok(info)
    }

    fn is_unknown(&self) -> bool {
        self.memory_type == 0
    }

    /// Why work on the device with an ordinal cannot use the memory at this address, if it cannot.
    fn unusable(&self, address: u64, ordinal: i32) -> Option<String> {
        let memory_type = |known: CUmemorytype| self.memory_type == known as u32;
        if self.is_unknown() {
            return Some("memory that the CUDA driver does not know: freed, or not allocated through it".to_owned());
        }
        if self.is_managed != 0 || memory_type(CUmemorytype::CU_MEMORYTYPE_UNIFIED) {
            return None;
        }
        if memory_type(CUmemorytype::CU_MEMORYTYPE_HOST) {
            let got = || format!("host memory that kernels find at {:#x}", self.device_address);
            return (self.device_address != address).then(got);
        }
        if !memory_type(CUmemorytype::CU_MEMORYTYPE_DEVICE) {
            return Some(format!("memory of CUmemorytype {}", self.memory_type));
        }
        (self.ordinal != ordinal).then(|| format!("memory of device {}", self.ordinal))
    }

    /// Whether the allocation ends before `end`, as far as the driver says.
    fn ends_before(&self, end: u64) -> bool {
        self.size != 0 && end > self.start.saturating_add(self.size)
    }
}

/// Asks for several attributes of an address, each into an integer of its size. For an address that
/// is unknown to the driver the integers get defaults.
fn attributes<const N: usize>(address: u64, asked: [(CUpointer_attribute, *mut c_void); N]) -> Result<(), DriverError> {
    let (mut names, mut places) = (asked.map(|(name, _)| name), asked.map(|(_, place)| place));
    // SAFETY: as many pointers as attributes, to live integers at least as large as the attributes;
    // any address is allowed. N is 2 or 4.
    unsafe { sys::cuPointerGetAttributes(N as u32, names.as_mut_ptr(), places.as_mut_ptr(), address) }.result()
}

/// Refuses memory that work in the context cannot use, as far as the driver can tell. The context
/// is current.
pub fn check_memory(context: &Context, address: u64, bytes: u64) -> Result<()> {
    let Some(last) = check_range(address, bytes)? else { return Ok(()) };
    let asked = current_device().and_then(|ordinal| Ok((ordinal, AddressInfo::ask(address)?, AddressInfo::ask(last)?)));
    let (ordinal, first, last) = context.check(asked, "asking about external memory")?;
    // What the graph of a capture is to allocate has its address already, and the driver says nothing of it.
    if first.is_unknown() && last.is_unknown() && context.is_captured()? {
        return Ok(());
    }
    check_address(ordinal, address, bytes, [first, last])
}

/// The last address of the memory; `None` if it has no bytes.
fn check_range(address: u64, bytes: u64) -> Result<Option<u64>> {
    let Some(after_first) = bytes.checked_sub(1) else { return Ok(None) };
    if address == 0 {
        return Err(bad_handle("address", "device memory", format!("null, with {bytes} bytes")));
    }
    let Some(last) = address.checked_add(after_first) else {
        let got = format!("{bytes} bytes at {address:#x}, past the last address");
        return Err(bad_handle("bytes", "memory that has an end", got));
    };
    Ok(Some(last))
}

/// Judges the memory by its first and last address.
fn check_address(ordinal: i32, address: u64, bytes: u64, [first, last]: [AddressInfo; 2]) -> Result<()> {
    let expected = || format!("memory of CUDA device {ordinal}");
    if let Some(got) = first.unusable(address, ordinal) {
        return Err(bad_handle("address", &expected(), format!("{address:#x}: {got}")));
    }
    // `check_range` has found the end to be an address.
    let end = address + (bytes - 1);
    if first.ends_before(end.saturating_add(1)) {
        let inside = first.start.saturating_add(first.size).saturating_sub(address);
        let got = format!("{bytes}, but the allocation ends after {inside}");
        return Err(bad_handle("bytes", "a size within the allocation", got));
    }
    if let Some(got) = last.unusable(end, ordinal) {
        return Err(bad_handle("bytes", &expected(), format!("{bytes}, whose last is at {end:#x}: {got}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x7f12_3400_0000;

    fn device_memory(start: u64, size: u64) -> AddressInfo {
        AddressInfo {
            memory_type: CUmemorytype::CU_MEMORYTYPE_DEVICE as u32,
            device_address: BASE,
            start,
            size,
            ..AddressInfo::default()
        }
    }

    /// The argument that is refused, and what the message says of it.
    fn refused(result: Result<()>) -> Option<(&'static str, String)> {
        match result {
            Err(Error::Handle { argument, got, .. }) => Some((argument, got)),
            _ => None,
        }
    }

    #[test]
    fn ranges_are_checked_before_the_driver_is_asked() {
        assert_eq!(check_range(0, 0), Ok(None));
        assert_eq!(check_range(BASE, 0), Ok(None));
        assert_eq!(check_range(BASE, 1), Ok(Some(BASE)));
        assert_eq!(check_range(u64::MAX, 1), Ok(Some(u64::MAX)));
        assert!(refused(check_range(0, 1).map(drop)).is_some_and(|(argument, _)| argument == "address"));
        for (address, bytes) in [(u64::MAX, 2), (BASE, u64::MAX), (1, u64::MAX)] {
            let outcome = check_range(address, bytes).map(drop);
            if address == 1 {
                assert_eq!(outcome, Ok(()), "the last address is the largest one");
            } else {
                assert!(refused(outcome).is_some_and(|(argument, _)| argument == "bytes"));
            }
        }
    }

    #[test]
    fn an_allocation_is_taken_up_to_its_last_byte() {
        let info = device_memory(BASE, 1000);
        assert_eq!(check_address(0, BASE, 1000, [info; 2]), Ok(()));
        assert_eq!(check_address(0, BASE + 1, 999, [info; 2]), Ok(()));
        let (argument, got) = refused(check_address(0, BASE + 1, 1000, [info; 2])).unwrap_or_default();
        assert!(argument == "bytes" && got.contains("999"), "{argument}: {got}");
        // The driver does not say where it ends: then its last byte must be known, at least.
        let unknown = device_memory(0, 0);
        assert_eq!(check_address(0, BASE, 1 << 40, [unknown; 2]), Ok(()));
        let (argument, got) =
            refused(check_address(0, BASE, 1 << 40, [unknown, AddressInfo::default()])).unwrap_or_default();
        assert!(argument == "bytes" && got.contains("does not know"), "{argument}: {got}");
    }

    #[test]
    fn only_memory_that_the_device_reaches_is_taken() {
        let known = device_memory(BASE, 64);
        let judge = |info: AddressInfo| refused(check_address(0, BASE, 16, [info; 2]));
        let of = |memory_type: u32| AddressInfo { memory_type, ..known };
        assert!(judge(known).is_none());
        assert!(judge(of(0)).is_some_and(|(argument, got)| argument == "address" && got.contains("does not know")));
        assert!(judge(AddressInfo { ordinal: 1, ..known }).is_some_and(|(_, got)| got.contains("device 1")));
        // Managed memory is every device's.
        assert!(judge(AddressInfo { ordinal: 1, is_managed: 1, ..known }).is_none());
        // Registered host memory, if kernels see it at the same address.
        let host = of(CUmemorytype::CU_MEMORYTYPE_HOST as u32);
        let host_last = AddressInfo { device_address: BASE + 15, ..host };
        assert_eq!(check_address(0, BASE, 16, [host, host_last]), Ok(()));
        assert!(judge(AddressInfo { device_address: BASE + 4096, ..host }).is_some());
        assert!(judge(of(CUmemorytype::CU_MEMORYTYPE_ARRAY as u32)).is_some());
    }
}
