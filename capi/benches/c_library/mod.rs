//! The C library loaded at run time, for benches that call it as other languages do.

#![allow(dead_code, reason = "a bench uses some of the types, functions and helpers")]

// The C library is no Rust library that a bench could import, so the sources are shared.
#[allow(non_camel_case_types, reason = "types have the names that they have in C")]
#[path = "../../src/types.rs"]
pub mod types;

#[path = "../../tests/library/mod.rs"]
mod library;

use std::env;
use std::ffi::c_void;
use std::mem::{MaybeUninit, zeroed};
use std::path::PathBuf;
use std::ptr::{null, null_mut};

use anyhow::{Context, Result, ensure};

use self::types::{
    varlen_fa_attention_mask, varlen_fa_attention_options, varlen_fa_device, varlen_fa_device_kind, varlen_fa_dtype,
    varlen_fa_key_mask, varlen_fa_mask_kind, varlen_fa_memory, varlen_fa_meta, varlen_fa_plan, varlen_fa_status,
    varlen_fa_tensor,
};

type DeviceOpen = unsafe extern "C" fn(varlen_fa_device_kind, u32, *mut *mut varlen_fa_device) -> varlen_fa_status;
type DeviceOpenCuda = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut *mut varlen_fa_device) -> varlen_fa_status;
type DeviceFree = unsafe extern "C" fn(*mut varlen_fa_device) -> varlen_fa_status;
type MaskFromLengths = unsafe extern "C" fn(*const u64, u64, u64, *mut *mut varlen_fa_key_mask) -> varlen_fa_status;
type MetaCreate = unsafe extern "C" fn(*const varlen_fa_key_mask, *mut *mut varlen_fa_meta) -> varlen_fa_status;
type Forward = unsafe extern "C" fn(
    *const varlen_fa_device,
    *const varlen_fa_attention_options,
    *const varlen_fa_tensor,
    *const varlen_fa_tensor,
    *const varlen_fa_tensor,
    *const varlen_fa_attention_mask,
    *const varlen_fa_tensor,
    *mut varlen_fa_plan,
) -> varlen_fa_status;

/// The functions that the benches call.
pub struct CLibrary {
    device_open: DeviceOpen,
    device_open_cuda: DeviceOpenCuda,
    device_free: DeviceFree,
    mask_from_lengths: MaskFromLengths,
    meta_create: MetaCreate,
    forward: Forward,
    /// Unloads the library when dropped.
    _loaded: libloading::Library,
}

impl CLibrary {
    /// Loads the library that `VARLEN_FA_LIBRARY` names, or the one that cargo built.
    pub fn load() -> Result<Self> {
        let path = match env::var_os("VARLEN_FA_LIBRARY") {
            Some(path) => PathBuf::from(path),
            None => library::Library::built()?.shared_library,
        };
        // SAFETY: the C library; loading it runs nothing but Rust's own start-up.
        let loaded = unsafe { libloading::Library::new(&path) }.with_context(|| path.display().to_string())?;
        // SAFETY: the types are those of the header; as in the lines below.
        let device_open = *unsafe { loaded.get::<DeviceOpen>("varlen_fa_device_open") }?;
        // SAFETY: as above.
        let device_open_cuda = *unsafe { loaded.get::<DeviceOpenCuda>("varlen_fa_device_open_cuda") }?;
        // SAFETY: as above.
        let device_free = *unsafe { loaded.get::<DeviceFree>("varlen_fa_device_free") }?;
        // SAFETY: as above.
        let mask_from_lengths = *unsafe { loaded.get::<MaskFromLengths>("varlen_fa_key_mask_from_lengths") }?;
        // SAFETY: as above.
        let meta_create = *unsafe { loaded.get::<MetaCreate>("varlen_fa_meta_create") }?;
        // SAFETY: as above.
        let forward = *unsafe { loaded.get::<Forward>("varlen_fa_forward") }?;
        Ok(Self {
            device_open,
            device_open_cuda,
            device_free,
            mask_from_lengths,
            meta_create,
            forward,
            _loaded: loaded,
        })
    }

    pub fn open_cpu(&self) -> Result<*mut varlen_fa_device> {
        let mut device = null_mut();
        // SAFETY: memory for a handle.
        ok(unsafe { (self.device_open)(varlen_fa_device_kind::Cpu, 0, &raw mut device) })?;
        Ok(device)
    }

    /// # Safety
    /// Context and stream are live and outlive the device.
    pub unsafe fn open_cuda(&self, context: *mut c_void, stream: *mut c_void) -> Result<*mut varlen_fa_device> {
        let mut device = null_mut();
        // SAFETY: by this function's contract, and memory for a handle.
        ok(unsafe { (self.device_open_cuda)(context, stream, &raw mut device) })?;
        Ok(device)
    }

    pub fn free_device(&self, device: *mut varlen_fa_device) -> Result<()> {
        // SAFETY: a handle, which the library checks.
        ok(unsafe { (self.device_free)(device) })
    }

    /// The mask of self-attention in one row of `seq` tokens, of which the first `valid` are valid.
    pub fn varlen_mask(&self, valid: usize, seq: usize) -> Result<varlen_fa_attention_mask> {
        let (mut key_mask, mut meta) = (null_mut(), null_mut());
        let lengths = [valid as u64];
        // SAFETY: one length, and memory for a handle.
        ok(unsafe { (self.mask_from_lengths)(lengths.as_ptr(), 1, seq as u64, &raw mut key_mask) })?;
        // SAFETY: memory for a handle.
        ok(unsafe { (self.meta_create)(key_mask, &raw mut meta) })?;
        // SAFETY: a struct of the header, for which all zeros are a value.
        let mut mask: varlen_fa_attention_mask = unsafe { zeroed() };
        mask.kind = MaybeUninit::new(varlen_fa_mask_kind::Varlen);
        mask.query_meta = meta;
        Ok(mask)
    }

    /// Attention with one tensor as q, k and v. Writes the plan to `plan`.
    ///
    /// # Safety
    /// The descriptors are of memory that is valid until the work is done. Meanwhile nobody writes
    /// that of `qkv` or uses that of `out`.
    pub unsafe fn forward(
        &self,
        device: *const varlen_fa_device,
        qkv: &varlen_fa_tensor,
        mask: &varlen_fa_attention_mask,
        out: &varlen_fa_tensor,
        plan: Option<&mut MaybeUninit<varlen_fa_plan>>,
    ) -> Result<()> {
        let plan = plan.map_or(null_mut(), MaybeUninit::as_mut_ptr);
        // SAFETY: by this function's contract.
        ok(unsafe { (self.forward)(device, null(), qkv, qkv, qkv, mask, out, plan) })
    }
}

/// The descriptor of a row-major [B, S, H, D] tensor.
pub fn tensor(
    data: *mut c_void,
    dtype: varlen_fa_dtype,
    element_bytes: usize,
    memory: varlen_fa_memory,
    shape: [usize; 4],
) -> varlen_fa_tensor {
    let [batch, seq, heads, dim] = shape.map(|size| size as i64);
    varlen_fa_tensor {
        data,
        bytes: (batch * seq * heads * dim) as u64 * element_bytes as u64,
        dtype: MaybeUninit::new(dtype),
        memory: MaybeUninit::new(memory),
        rank: 4,
        reserved_word: 0,
        shape: shape.map(|size| size as u64),
        strides: [seq * heads * dim, heads * dim, dim, 1],
        reserved: [0; 2],
    }
}

fn ok(status: varlen_fa_status) -> Result<()> {
    ensure!(status == varlen_fa_status::Ok, "got {status:?}");
    Ok(())
}
