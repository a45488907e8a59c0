//! Key masks, metadata and cumulative sequence lengths: built on the host, used on any device.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::Arc;

use varlen::{CuSeqlens, KeyMask, MaskInteger, VarlenMeta};

use crate::arguments::{Name, Place, choose, reserve, size, slice};
use crate::failure::{Failure, Result, guard};
use crate::handles::{self, handle};
use crate::types::{
    varlen_fa_cu_seqlens, varlen_fa_device, varlen_fa_key_mask, varlen_fa_mask_dtype, varlen_fa_meta,
    varlen_fa_meta_info, varlen_fa_run, varlen_fa_status,
};

handle!(varlen_fa_key_mask, 2, KeyMask);
handle!(varlen_fa_meta, 3, VarlenMeta);
handle!(varlen_fa_cu_seqlens, 4, Sequences);

/// Cumulative sequence lengths: of their own, or those of metadata, which they keep alive.
#[derive(Debug)]
pub(crate) enum Sequences {
    Own(CuSeqlens),
    OfMeta(Arc<VarlenMeta>),
}

impl Sequences {
    pub fn cu_seqlens(&self) -> &CuSeqlens {
        match self {
            Self::Own(cu_seqlens) => cu_seqlens,
            Self::OfMeta(meta) => meta.cu_seqlens(),
        }
    }
}

/// Creates a key mask from [batch, seq] integers in host memory, row-major. 0 drops the token; any
/// other value keeps it.
///
/// `mask`: the integers, which are copied.
/// `dtype`: their size.
/// `key_mask`: receives the handle, to be given to varlen_fa_key_mask_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_key_mask_from_integers(
    mask: *const c_void,
    dtype: MaybeUninit<varlen_fa_mask_dtype>,
    batch: u64,
    seq: u64,
    key_mask: *mut *mut varlen_fa_key_mask,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("key_mask"), key_mask) }?;
        // SAFETY: by the header, `batch * seq` integers of this size that nobody writes.
        let made = unsafe { integers(mask, dtype, batch, seq, false) }?;
        place.put(handles::issue(made));
        Ok(())
    })
}

/// The mask of integers of any size; where it is strict, values other than 0 and 1 are refused.
///
/// # Safety
/// As [`slice`], with `batch * seq` elements of the size.
pub(crate) unsafe fn integers(
    mask: *const c_void,
    dtype: MaybeUninit<varlen_fa_mask_dtype>,
    batch: u64,
    seq: u64,
    is_strict: bool,
) -> Result<KeyMask> {
    match choose(Name::of("dtype"), dtype)?.value {
        // SAFETY: by this function's contract; as in the lines below.
        varlen_fa_mask_dtype::U8 => unsafe { integers_of::<u8>(mask, batch, seq, is_strict) },
        // SAFETY: as above.
        varlen_fa_mask_dtype::U16 => unsafe { integers_of::<u16>(mask, batch, seq, is_strict) },
        // SAFETY: as above.
        varlen_fa_mask_dtype::U32 => unsafe { integers_of::<u32>(mask, batch, seq, is_strict) },
        // SAFETY: as above.
        varlen_fa_mask_dtype::U64 => unsafe { integers_of::<u64>(mask, batch, seq, is_strict) },
    }
}

/// # Safety
/// As [`slice`], with `batch * seq` elements.
unsafe fn integers_of<T: MaskInteger>(mask: *const c_void, batch: u64, seq: u64, is_strict: bool) -> Result<KeyMask> {
    // SAFETY: by this function's contract.
    let values = unsafe { slice(Name::of("mask"), mask.cast::<T>(), batch.saturating_mul(seq)) }?;
    let make = if is_strict { KeyMask::from_integers_strict::<T> } else { KeyMask::from_integers::<T> };
    Ok(make(size(Name::of("batch"), batch)?, size(Name::of("seq"), seq)?, values)?)
}

/// Creates a key mask that keeps the first lengths[b] tokens of batch row b.
///
/// `lengths`: `batch` numbers in host memory, each at most `seq`.
/// `key_mask`: receives the handle, to be given to varlen_fa_key_mask_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_key_mask_from_lengths(
    lengths: *const u64,
    batch: u64,
    seq: u64,
    key_mask: *mut *mut varlen_fa_key_mask,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("key_mask"), key_mask) }?;
        // SAFETY: by the header, `batch` numbers that nobody writes.
        let lengths = unsafe { slice(Name::of("lengths"), lengths, batch) }?;
        let mut sizes = reserve(lengths.len())?;
        for &length in lengths {
            sizes.push(size(Name::of("lengths"), length)?);
        }
        let made = KeyMask::from_lengths(size(Name::of("seq"), seq)?, &sizes)?;
        place.put(handles::issue(made));
        Ok(())
    })
}

/// Creates a key mask that keeps the given ranges of tokens.
///
/// `runs`: `count` ranges in host memory, in any order; a row without a range keeps nothing.
/// `key_mask`: receives the handle, to be given to varlen_fa_key_mask_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_key_mask_from_runs(
    runs: *const varlen_fa_run,
    count: u64,
    batch: u64,
    seq: u64,
    key_mask: *mut *mut varlen_fa_key_mask,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("key_mask"), key_mask) }?;
        // SAFETY: by the header, `count` ranges that nobody writes.
        let runs = unsafe { slice(Name::of("runs"), runs, count) }?;
        let (batch, seq) = (size(Name::of("batch"), batch)?, size(Name::of("seq"), seq)?);
        // Only 32-bit systems have tokens that do not fit; the mask's own checks refuse them.
        let at = |token: u64| usize::try_from(token).unwrap_or(usize::MAX);
        let runs = runs.iter().map(|run| (at(run.row), at(run.start)..at(run.end)));
        place.put(handles::issue(KeyMask::from_row_runs(batch, seq, runs)?));
        Ok(())
    })
}

/// Frees a key mask; NULL is ignored. Metadata made from it stays valid.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_key_mask_free(key_mask: *mut varlen_fa_key_mask) -> varlen_fa_status {
    guard(|| handles::free(Name::of("key_mask"), key_mask))
}

/// Creates the metadata of a key mask. Attention with metadata drops masked rows: their output is
/// exactly zero.
///
/// `meta`: receives the handle, to be given to varlen_fa_meta_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_meta_create(
    key_mask: *const varlen_fa_key_mask,
    meta: *mut *mut varlen_fa_meta,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("meta"), meta) }?;
        let key_mask = handles::get(Name::of("key_mask"), key_mask)?;
        place.put(handles::issue(VarlenMeta::from_key_mask(&key_mask)?));
        Ok(())
    })
}

/// Creates the metadata of several documents in each row, for self-attention: tokens with the same
/// number see one another and nothing else; tokens numbered 0 are masked.
///
/// `document_ids`: [B, S] numbers in host memory, row-major; the tokens of a document lie together.
/// `meta`: receives the handle, to be given to varlen_fa_meta_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_meta_from_document_ids(
    document_ids: *const u32,
    batch: u64,
    seq: u64,
    meta: *mut *mut varlen_fa_meta,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("meta"), meta) }?;
        let count = batch.saturating_mul(seq);
        // SAFETY: by the header, `batch * seq` numbers that nobody writes.
        let ids = unsafe { slice(Name::of("document_ids"), document_ids, count) }?;
        let made = VarlenMeta::from_document_ids(size(Name::of("batch"), batch)?, size(Name::of("seq"), seq)?, ids)?;
        place.put(handles::issue(made));
        Ok(())
    })
}

/// The sizes of the batch that metadata describes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_meta_describe(
    meta: *const varlen_fa_meta,
    info: *mut varlen_fa_meta_info,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("info"), info) }?;
        let meta = handles::get(Name::of("meta"), meta)?;
        place.put(varlen_fa_meta_info {
            batch: meta.batch() as u64,
            seq: meta.seq() as u64,
            total_valid: meta.total_valid() as u64,
            max_seqlen: meta.max_seqlen() as u64,
            reserved: [0; 4],
        });
        Ok(())
    })
}

/// Makes the device's copy of the metadata now, not at its first use there. The metadata keeps the
/// copy either way. Call this before metadata is used while a CUDA graph is captured.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_meta_upload(
    meta: *const varlen_fa_meta,
    device: *const varlen_fa_device,
) -> varlen_fa_status {
    guard(|| {
        let meta = handles::get(Name::of("meta"), meta)?;
        Ok(meta.upload_to(&*handles::get(Name::of("device"), device)?)?)
    })
}

/// Copies the flat positions b*S + s of the valid tokens, ascending.
///
/// `indices`: host memory for `count` numbers.
/// `count`: total_valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_meta_copy_indices(
    meta: *const varlen_fa_meta,
    indices: *mut u32,
    count: u64,
) -> varlen_fa_status {
    guard(|| {
        let meta = handles::get(Name::of("meta"), meta)?;
        // SAFETY: by the header, memory for `count` numbers that nobody else uses.
        unsafe { copy("indices", meta.indices()?, indices, count) }
    })
}

/// Copies the packed row of each token, -1 where it is masked.
///
/// `inv_indices`: host memory for `count` numbers.
/// `count`: B*S.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_meta_copy_inv_indices(
    meta: *const varlen_fa_meta,
    inv_indices: *mut i32,
    count: u64,
) -> varlen_fa_status {
    guard(|| {
        let meta = handles::get(Name::of("meta"), meta)?;
        // SAFETY: by the header, memory for `count` numbers that nobody else uses.
        unsafe { copy("inv_indices", meta.inv_indices()?, inv_indices, count) }
    })
}

/// Copies the cumulative sequence lengths of the packed rows.
///
/// `values`: host memory for `count` numbers.
/// `count`: B + 1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_meta_copy_cu_seqlens(
    meta: *const varlen_fa_meta,
    values: *mut i32,
    count: u64,
) -> varlen_fa_status {
    guard(|| {
        let meta = handles::get(Name::of("meta"), meta)?;
        // SAFETY: by the header, memory for `count` numbers that nobody else uses.
        unsafe { copy("values", meta.cu_seqlens().as_slice(), values, count) }
    })
}

/// # Safety
/// `to` is null, misaligned, or points to memory for `count` elements that nobody else uses.
unsafe fn copy<T: Copy>(argument: &'static str, from: &[T], to: *mut T, count: u64) -> Result<()> {
    if count != from.len() as u64 {
        let expected = format!("memory for {} numbers", from.len());
        return Err(Failure::argument(varlen_fa_status::Length, argument, expected, count));
    }
    if from.is_empty() {
        return Ok(());
    }
    // SAFETY: by this function's contract, memory for at least one element.
    unsafe { Place::new(Name::of(argument), to) }?;
    // SAFETY: `to` is neither null nor misaligned, and by this function's contract memory for all
    // `count` elements that nobody else uses; `from` is memory of this library.
    unsafe { to.copy_from_nonoverlapping(from.as_ptr(), from.len()) };
    Ok(())
}

/// Frees metadata; NULL is ignored.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_meta_free(meta: *mut varlen_fa_meta) -> varlen_fa_status {
    guard(|| handles::free(Name::of("meta"), meta))
}

/// Creates cumulative sequence lengths from numbers in host memory, which are copied.
///
/// `values`: `count` numbers that start at 0 and never decrease.
/// `count`: the number of sequences + 1.
/// `cu_seqlens`: receives the handle, to be given to varlen_fa_cu_seqlens_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_cu_seqlens_create(
    values: *const i32,
    count: u64,
    cu_seqlens: *mut *mut varlen_fa_cu_seqlens,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("cu_seqlens"), cu_seqlens) }?;
        // SAFETY: by the header, `count` numbers that nobody writes.
        let values = unsafe { slice(Name::of("values"), values, count) }?;
        place.put(handles::issue(Sequences::Own(CuSeqlens::new(values)?)));
        Ok(())
    })
}

/// Creates a handle for the cumulative sequence lengths of metadata's packed rows. It keeps the
/// metadata alive.
///
/// `cu_seqlens`: receives the handle, to be given to varlen_fa_cu_seqlens_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_cu_seqlens_from_meta(
    meta: *const varlen_fa_meta,
    cu_seqlens: *mut *mut varlen_fa_cu_seqlens,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("cu_seqlens"), cu_seqlens) }?;
        place.put(handles::issue(Sequences::OfMeta(handles::get(Name::of("meta"), meta)?)));
        Ok(())
    })
}

/// Frees cumulative sequence lengths; NULL is ignored.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_cu_seqlens_free(cu_seqlens: *mut varlen_fa_cu_seqlens) -> varlen_fa_status {
    guard(|| handles::free(Name::of("cu_seqlens"), cu_seqlens))
}
