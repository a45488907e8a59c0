//! Metadata that a device builds from a mask in its own memory.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use varlen::{BackendKind, Device, DeviceVarlenMeta, Error, Layout, MaskDType, MaskView};

use crate::arguments::{FIRST_PAGE, Name, Place, choose, expect_zeros, read, reserve, size};
use crate::failure::{Failure, Result, guard};
use crate::handles::{self, handle};
use crate::tensors::{cuda_memory, upload};
use crate::types::{varlen_fa_device, varlen_fa_device_meta, varlen_fa_mask_view, varlen_fa_memory, varlen_fa_status};

handle!(varlen_fa_device_meta, 5, DeviceMeta);

/// Metadata behind a lock: attention calls read it, rebuilding writes it.
#[derive(Debug)]
pub(crate) struct DeviceMeta(RwLock<DeviceVarlenMeta>);

impl DeviceMeta {
    pub fn read(&self) -> RwLockReadGuard<'_, DeviceVarlenMeta> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Allocates device memory for the metadata of [batch, seq] masks. No token is valid until
/// varlen_fa_device_meta_rebuild.
///
/// `meta`: receives the handle, to be given to varlen_fa_device_meta_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_device_meta_create(
    device: *const varlen_fa_device,
    batch: u64,
    seq: u64,
    meta: *mut *mut varlen_fa_device_meta,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("meta"), meta) }?;
        let device = handles::get(Name::of("device"), device)?;
        let made = DeviceVarlenMeta::new(&device, size(Name::of("batch"), batch)?, size(Name::of("seq"), seq)?)?;
        place.put(handles::issue(DeviceMeta(RwLock::new(made))));
        Ok(())
    })
}

/// Rebuilds the metadata from a mask. If the mask is in the device's memory, nothing is downloaded
/// and the call does not wait. Earlier calls still use the metadata as it was. In a captured CUDA
/// graph, each replay rebuilds it from what the mask holds then.
///
/// `mask`: of the size that the metadata was created for; in host memory, or on CUDA devices in CUDA
/// memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_device_meta_rebuild(
    meta: *const varlen_fa_device_meta,
    mask: *const varlen_fa_mask_view,
) -> varlen_fa_status {
    guard(|| {
        let meta = handles::get(Name::of("meta"), meta)?;
        // SAFETY: the caller obeys the header's rules for pointers.
        let mask = unsafe { read(Name::of("mask"), mask) }?;
        let mut meta = meta.0.write().unwrap_or_else(PoisonError::into_inner);
        let device = meta.device().clone();
        let described = DescribedMask::check(&mask)?;
        if described.memory == varlen_fa_memory::Cuda {
            // SAFETY: by the header, memory of the device that stays valid until the work is done.
            let memory = unsafe { described.cuda_memory(&device) }?;
            return Ok(meta.rebuild(memory.mask_view(described.dtype, described.layout))?);
        }
        let shape = described.layout.shape();
        // Before the mask is gathered: with strides of 0 a few bytes can be a mask of any size.
        if shape != [meta.batch(), meta.seq()] {
            let (expected, got) = ([meta.batch(), meta.seq()], [shape[0], shape[1]]);
            return Err(Error::MaskSize { argument: "mask", expected, got }.into());
        }
        // SAFETY: by the header, host memory that nobody writes.
        let keep = unsafe { described.gather() }?;
        if device.capabilities().backend == BackendKind::Cpu {
            return Ok(meta.rebuild(MaskView::from_host(&keep, shape[0], shape[1])?)?);
        }
        let memory = upload(&device, &keep)?;
        Ok(meta.rebuild(memory.mask_view(MaskDType::U8, Layout::contiguous(shape)?))?)
    })
}

/// Frees device metadata; NULL is ignored.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_device_meta_free(meta: *mut varlen_fa_device_meta) -> varlen_fa_status {
    guard(|| handles::free(Name::of("meta"), meta))
}

/// A checked mask: its elements lie inside its memory.
struct DescribedMask {
    memory: varlen_fa_memory,
    dtype: MaskDType,
    layout: Layout,
    data: *const u8,
    /// Bytes from `data` to the end of the last element.
    bytes: u64,
}

impl DescribedMask {
    fn check(mask: &varlen_fa_mask_view) -> Result<Self> {
        let name = Name::of("mask");
        expect_zeros(name.field("reserved"), &mask.reserved)?;
        let dtype = choose(name.field("dtype"), mask.dtype)?.meaning;
        let memory = choose(name.field("memory"), mask.memory)?.value;
        let shape = [size(name.field("shape"), mask.shape[0])?, size(name.field("shape"), mask.shape[1])?];
        let [Ok(row), Ok(token)] = mask.strides.map(u64::try_from) else {
            let (name, got) = (name.field("strides"), format!("{:?}", mask.strides));
            return Err(Failure::argument(varlen_fa_status::BadValue, name, "0 or more", got));
        };
        let layout = Layout::strided(&shape, &[row, token], 0).map_err(|_| {
            let got = format!("shape {shape:?} with strides {:?}", mask.strides);
            Failure::argument(varlen_fa_status::TooLarge, name, "a mask that fits the address space", got)
        })?;
        let (data, address) = (mask.data.cast::<u8>(), mask.data.addr());
        let bytes = if layout.numel() == 0 { 0 } else { layout.end() * dtype.size() as u64 };
        if bytes > 0 && address < FIRST_PAGE {
            let (name, expected) = (name.field("data"), "the address of the first element");
            return Err(Failure::argument(varlen_fa_status::NullPointer, name, expected, format!("{address:#x}")));
        }
        if bytes > 0 && !address.is_multiple_of(dtype.size()) {
            let (name, expected) = (name.field("data"), format!("an address that is a multiple of {}", dtype.size()));
            return Err(Failure::argument(varlen_fa_status::Misaligned, name, expected, format!("{address:#x}")));
        }
        if bytes > mask.bytes {
            return Err(Error::BufferTooSmall { argument: "mask", expected: bytes, got: mask.bytes }.into());
        }
        if isize::try_from(bytes).is_err() || address.checked_add(bytes as usize).is_none() {
            let got = format!("{bytes} bytes from {address:#x} on");
            return Err(Failure::argument(varlen_fa_status::TooLarge, name, "memory inside the address space", got));
        }
        Ok(Self { memory, dtype, layout, data, bytes })
    }

    /// # Safety
    /// The mask is in memory of the device that stays valid until the work is done.
    unsafe fn cuda_memory(&self, device: &Device) -> Result<varlen::DeviceMemory> {
        // SAFETY: by this function's contract.
        unsafe { cuda_memory(device, Name::of("mask"), self.data.addr(), self.bytes) }
    }

    /// The mask as one byte per token, row-major: 1 keeps the token.
    ///
    /// # Safety
    /// The mask is in host memory that nobody writes during the call.
    unsafe fn gather(&self) -> Result<Vec<u8>> {
        let (count, element) = (self.layout.numel(), self.dtype.size());
        let mut keep = reserve(count)?;
        if count == 0 {
            return Ok(keep);
        }
        // SAFETY: `check` found the memory not null and inside the address space; by this
        // function's contract nobody writes it.
        let memory = unsafe { std::slice::from_raw_parts(self.data, self.bytes as usize) };
        self.layout.for_each_row(element, |strided, _| {
            keep.extend(memory[strided].chunks(element).map(|token| u8::from(token.iter().any(|&byte| byte != 0))));
        });
        Ok(keep)
    }
}
