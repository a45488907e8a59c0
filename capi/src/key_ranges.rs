//! Ranges of keys.

use std::sync::Arc;

use varlen::{Error, KeyRanges, RangesOf};

use crate::arguments::{Name, Place, expect_zeros, read, reserve, size, slice};
use crate::failure::{Failure, Result, guard};
use crate::handles::{self, handle};
use crate::types::{varlen_fa_key_range, varlen_fa_key_ranges, varlen_fa_ranges_of, varlen_fa_status};

handle!(varlen_fa_key_ranges, 6, KeyRanges);

/// What ranges are made for.
///
/// # Safety
/// `of` is null, misaligned, or points to a struct that C initialised.
unsafe fn read_of(of: *const varlen_fa_ranges_of) -> Result<RangesOf> {
    let name = Name::of("of");
    // SAFETY: by this function's contract.
    let of = unsafe { read(name, of) }?;
    expect_zeros(name.field("reserved"), &of.reserved)?;
    if of.cu_seqlens_q.is_null() && of.cu_seqlens_k.is_null() {
        let [batch, seq_q, seq_k] = [("batch", of.batch), ("seq_q", of.seq_q), ("seq_k", of.seq_k)]
            .map(|(field, given)| size(name.field(field), given));
        return Ok(RangesOf::from([batch?, seq_q?, seq_k?]));
    }
    if let Some((field, got)) =
        [("batch", of.batch), ("seq_q", of.seq_q), ("seq_k", of.seq_k)].into_iter().find(|&(_, given)| given != 0)
    {
        return Err(Failure::argument(varlen_fa_status::BadValue, name.field(field), "0 with cu_seqlens", got));
    }
    let query = handles::get(name.field("cu_seqlens_q"), of.cu_seqlens_q)?;
    let key = handles::get(name.field("cu_seqlens_k"), of.cu_seqlens_k)?;
    Ok(RangesOf::from((query.cu_seqlens(), key.cu_seqlens())))
}

/// A number of keys on one side, −1 for no limit.
fn side(name: Name, given: i64) -> Result<Option<usize>> {
    match given {
        -1 => Ok(None),
        0.. => size(name, given.unsigned_abs()).map(Some),
        got => Err(Failure::argument(varlen_fa_status::BadValue, name, "-1 for no limit, or a number of keys", got)),
    }
}

/// Creates ranges of a window: query i sees `left` keys before its own place and `right` keys after
/// it. -1 is no limit on that side, so left = -1 and right = 0 is a causal mask. Where queries and
/// keys differ in number, the place of query i is i + Sk - Sq.
///
/// `ranges`: receives the handle, to be given to varlen_fa_key_ranges_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_key_ranges_window(
    of: *const varlen_fa_ranges_of,
    left: i64,
    right: i64,
    ranges: *mut *mut varlen_fa_key_ranges,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("ranges"), ranges) }?;
        // SAFETY: as above.
        let of = unsafe { read_of(of) }?;
        let (left, right) = (side(Name::of("left"), left)?, side(Name::of("right"), right)?);
        place.put(handles::issue(KeyRanges::window(of, left, right)?));
        Ok(())
    })
}

/// Creates ranges of a prefix: every query sees the first `count` keys, and the others up to its own
/// place.
///
/// `ranges`: receives the handle, to be given to varlen_fa_key_ranges_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_key_ranges_prefix(
    of: *const varlen_fa_ranges_of,
    count: u64,
    ranges: *mut *mut varlen_fa_key_ranges,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("ranges"), ranges) }?;
        // SAFETY: as above.
        let of = unsafe { read_of(of) }?;
        place.put(handles::issue(KeyRanges::prefix(of, size(Name::of("count"), count)?)?));
        Ok(())
    })
}

/// Creates ranges of the caller's own.
///
/// `values`: a range for each query in host memory, [B, Sq] of them for padded tensors and [total_q]
/// for packed rows.
/// `count`: their number.
/// `ranges`: receives the handle, to be given to varlen_fa_key_ranges_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_key_ranges_from_values(
    of: *const varlen_fa_ranges_of,
    values: *const varlen_fa_key_range,
    count: u64,
    ranges: *mut *mut varlen_fa_key_ranges,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("ranges"), ranges) }?;
        // SAFETY: as above.
        let of = unsafe { read_of(of) }?;
        // SAFETY: by the header, `count` ranges that nobody writes.
        let values = unsafe { slice(Name::of("values"), values, count) }?;
        let mut own = reserve(values.len())?;
        for value in values {
            own.push([size(Name::of("values"), value.first)?, size(Name::of("values"), value.end)?]);
        }
        place.put(handles::issue(KeyRanges::from_ranges(of, &own).map_err(of_values)?));
        Ok(())
    })
}

/// An error about the caller's own ranges, which C calls `values`.
fn of_values(error: Error) -> Failure {
    let argument = "values";
    match error {
        Error::Length { expected, got, .. } => Error::Length { argument, expected, got }.into(),
        Error::MaskRow { row, expected, got, .. } => Error::MaskRow { argument, row, expected, got }.into(),
        other => other.into(),
    }
}

/// Creates the ranges that both allow. They must be made for the same sizes.
///
/// `ranges`: receives the handle, to be given to varlen_fa_key_ranges_free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_key_ranges_intersect(
    one: *const varlen_fa_key_ranges,
    other: *const varlen_fa_key_ranges,
    ranges: *mut *mut varlen_fa_key_ranges,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers.
        let place = unsafe { Place::new(Name::of("ranges"), ranges) }?;
        let (one, other) = (handles::get(Name::of("one"), one)?, handles::get(Name::of("other"), other)?);
        place.put(handles::issue(one.intersect(&other)?));
        Ok(())
    })
}

/// Frees ranges; NULL is ignored.
#[unsafe(no_mangle)]
pub extern "C" fn varlen_fa_key_ranges_free(ranges: *mut varlen_fa_key_ranges) -> varlen_fa_status {
    guard(|| handles::free(Name::of("ranges"), ranges))
}

/// The ranges of a handle; none of NULL.
pub(crate) fn optional(name: Name, ranges: *const varlen_fa_key_ranges) -> Result<Option<Arc<KeyRanges>>> {
    if ranges.is_null() { Ok(None) } else { handles::get(name, ranges).map(Some) }
}
