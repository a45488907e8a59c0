//! Key masks as models carry them: additive numbers, integers that must be 0 or 1, one row for a whole batch.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use varlen::{Element, KeyMask, bf16, f16};

use crate::arguments::{Name, Place, choose, size, slice};
use crate::failure::{Result, guard};
use crate::handles;
use crate::masks::integers;
use crate::types::{varlen_fa_dtype, varlen_fa_key_mask, varlen_fa_mask_dtype, varlen_fa_status};

/// Creates a key mask from [batch, seq] numbers in host memory that models add to scores, row-major:
/// 0 keeps the token, and anything from -1000 down drops it: -10000, the lowest number of a type,
/// -infinity. Other values are refused, for a mask is not a bias. The elements of a [B, 1, 1, S]
/// mask are the same in the same order.
///
/// `mask`: the numbers, which are copied.
/// `dtype`: their type.
/// `key_mask`: receives the handle, to be given to varlen_fa_key_mask_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_key_mask_from_additive(
    mask: *const c_void,
    dtype: MaybeUninit<varlen_fa_dtype>,
    batch: u64,
    seq: u64,
    key_mask: *mut *mut varlen_fa_key_mask,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("key_mask"), key_mask) }?;
        let made = match choose(Name::of("dtype"), dtype)?.value {
            // SAFETY: by the header, `batch * seq` numbers of this type that nobody writes; as in the
            // lines below.
            varlen_fa_dtype::F32 => unsafe { additive::<f32>(mask, batch, seq) },
            // SAFETY: as above.
            varlen_fa_dtype::F16 => unsafe { additive::<f16>(mask, batch, seq) },
            // SAFETY: as above.
            varlen_fa_dtype::Bf16 => unsafe { additive::<bf16>(mask, batch, seq) },
        }?;
        place.put(handles::issue(made));
        Ok(())
    })
}

/// Creates a key mask from [batch, seq] integers in host memory, row-major, of which 1 keeps the
/// token and 0 drops it. Other values are refused.
///
/// `mask`: the integers, which are copied.
/// `dtype`: their size.
/// `key_mask`: receives the handle, to be given to varlen_fa_key_mask_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_key_mask_from_integers_strict(
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
        let made = unsafe { integers(mask, dtype, batch, seq, true) }?;
        place.put(handles::issue(made));
        Ok(())
    })
}

/// Creates the key mask of `batch` rows that are all like the one row of a mask.
///
/// `row`: a mask of one row, or of `batch` rows, of which this makes a copy.
/// `key_mask`: receives the handle, to be given to varlen_fa_key_mask_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_key_mask_broadcast(
    row: *const varlen_fa_key_mask,
    batch: u64,
    key_mask: *mut *mut varlen_fa_key_mask,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("key_mask"), key_mask) }?;
        let row = handles::get(Name::of("row"), row)?;
        place.put(handles::issue(row.broadcast(size(Name::of("batch"), batch)?)?));
        Ok(())
    })
}

/// # Safety
/// As [`slice`], with `batch * seq` elements.
unsafe fn additive<T: Element>(mask: *const c_void, batch: u64, seq: u64) -> Result<KeyMask> {
    // SAFETY: by this function's contract.
    let values = unsafe { slice(Name::of("mask"), mask.cast::<T>(), batch.saturating_mul(seq)) }?;
    Ok(KeyMask::from_additive(size(Name::of("batch"), batch)?, size(Name::of("seq"), seq)?, values)?)
}
