//! Reads what pointers point to, and writes results. Null and alignment are checked; the rest is
//! the caller's contract.

use std::ffi::c_char;
use std::fmt::{self, Display};
use std::mem::MaybeUninit;

use crate::failure::{Failure, Result};
use crate::names::{Named, Row, number, row_of};
use crate::types::varlen_fa_status;

/// An argument, or a field of one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Name {
    pub argument: &'static str,
    pub field: &'static str,
}

impl Name {
    pub fn of(argument: &'static str) -> Self {
        Self { argument, field: "" }
    }

    pub fn field(self, field: &'static str) -> Self {
        Self { field, ..self }
    }
}

impl Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field {
            "" => f.write_str(self.argument),
            field => write!(f, "{}.{field}", self.argument),
        }
    }
}

/// No object lies in the first page of the address space: an address there is NULL plus an offset.
pub(crate) const FIRST_PAGE: usize = 4096;

fn expect_place<T>(name: Name, at: *const T) -> Result<()> {
    if at.is_null() {
        return Err(Failure::argument(varlen_fa_status::NullPointer, name, "a pointer", "NULL"));
    }
    if at.addr() < FIRST_PAGE {
        let got = format_args!("{:#x}", at.addr()).to_string();
        return Err(Failure::argument(varlen_fa_status::NullPointer, name, "a pointer to memory", got));
    }
    if !at.is_aligned() {
        let expected = format!("an address that is a multiple of {}", align_of::<T>());
        return Err(Failure::argument(varlen_fa_status::Misaligned, name, expected, format!("{:#x}", at.addr())));
    }
    Ok(())
}

/// What `at` points to.
///
/// # Safety
/// `at` is null, misaligned, or points to a `T` that C initialised.
pub(crate) unsafe fn read<T: Copy>(name: Name, at: *const T) -> Result<T> {
    expect_place(name, at)?;
    // SAFETY: it is neither null nor misaligned, so it points to a `T` by this function's contract.
    Ok(unsafe { at.read() })
}

/// What `at` points to; `None` if it is null.
///
/// # Safety
/// As [`read`].
pub(crate) unsafe fn read_optional<T: Copy>(name: Name, at: *const T) -> Result<Option<T>> {
    if at.is_null() {
        return Ok(None);
    }
    // SAFETY: by this function's contract.
    unsafe { read(name, at) }.map(Some)
}

/// The `count` elements that start at `at`. `at` may be anything if `count` is 0.
///
/// # Safety
/// `at` is null, misaligned, or points to `count` elements that nobody writes during `'a`.
pub(crate) unsafe fn slice<'a, T: Copy>(name: Name, at: *const T, count: u64) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    expect_place(name, at)?;
    let bytes = u128::from(count) * size_of::<T>() as u128;
    if bytes + at.addr() as u128 > isize::MAX as u128 {
        let expected = "an array that fits the address space";
        return Err(Failure::argument(varlen_fa_status::TooLarge, name, expected, count));
    }
    // SAFETY: it is neither null nor misaligned, and the slice fits the address space. By this
    // function's contract there are `count` elements, and nobody writes them.
    Ok(unsafe { std::slice::from_raw_parts(at, count as usize) })
}

/// A place for a result, checked before the work is done.
#[derive(Debug)]
pub(crate) struct Place<T>(*mut T);

impl<T> Place<T> {
    /// # Safety
    /// `at` is null, misaligned, or points to memory for a `T` that nobody else uses during the
    /// call.
    pub unsafe fn new(name: Name, at: *mut T) -> Result<Self> {
        expect_place(name, at)?;
        Ok(Self(at))
    }

    /// # Safety
    /// As [`Place::new`].
    pub unsafe fn optional(name: Name, at: *mut T) -> Result<Option<Self>> {
        if at.is_null() {
            return Ok(None);
        }
        // SAFETY: by this function's contract.
        unsafe { Self::new(name, at) }.map(Some)
    }

    /// Writes the result.
    pub fn put(self, value: T) {
        // SAFETY: memory for a `T` by the contract of `new`.
        unsafe { self.0.write(value) };
    }
}

impl Place<u8> {
    /// Writes bytes.
    ///
    /// # Safety
    /// There is memory for all of them, that nobody else uses during the call.
    pub unsafe fn put_all(self, bytes: &[u8]) {
        // SAFETY: by this function's contract; the bytes are the library's own.
        unsafe { self.0.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }
}

/// The row of the number that C passed as an enum.
pub(crate) fn choose<E: Named>(name: Name, given: MaybeUninit<E>) -> Result<&'static Row<E>> {
    let number = number(given);
    row_of(number).ok_or_else(|| {
        let known: Vec<_> =
            E::TABLE.iter().map(|row| format!("{} ({})", row.number, row.name.to_string_lossy())).collect();
        Failure::argument(varlen_fa_status::BadValue, name, known.join(" or "), number)
    })
}

/// Checks that reserved space is 0, so that later versions can use it.
pub(crate) fn expect_zeros(name: Name, reserved: &[u64]) -> Result<()> {
    match reserved.iter().find(|&&word| word != 0) {
        None => Ok(()),
        Some(word) => Err(Failure::argument(varlen_fa_status::BadValue, name, "zeros", format!("{word:#x}"))),
    }
}

/// A size as `usize`.
pub(crate) fn size(name: Name, given: u64) -> Result<usize> {
    usize::try_from(given)
        .map_err(|_| Failure::argument(varlen_fa_status::TooLarge, name, "a size that fits the address space", given))
}

/// An empty vector with room for `count` elements: an error, not an abort, where memory runs out.
pub(crate) fn reserve<T>(count: usize) -> Result<Vec<T>> {
    let mut values = Vec::new();
    values.try_reserve_exact(count).map_err(|error| varlen::Error::OutOfMemory {
        device: varlen::BackendKind::Cpu.name().to_owned(),
        requested: count.saturating_mul(size_of::<T>()) as u64,
        why: error.to_string(),
    })?;
    Ok(values)
}

/// A C string in an array, cut to fit.
pub(crate) fn text<const N: usize>(text: &str) -> [c_char; N] {
    let mut end = text.len().min(N - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut chars = [0; N];
    for (to, from) in chars.iter_mut().zip(text[..end].bytes()) {
        *to = from as c_char;
    }
    chars
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_between_characters() {
        let bytes = |chars: [c_char; 4]| chars.map(|char| char as u8);
        assert_eq!(bytes(text("ab")), *b"ab\0\0");
        assert_eq!(bytes(text("abcdef")), *b"abc\0");
        assert_eq!(bytes(text("abé")), *b"ab\0\0");
    }
}
