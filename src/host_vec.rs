//! Vectors in host memory of lengths that the application decides: where memory runs out, an error
//! instead of the abort that `Vec` ends with.

use bytemuck::Zeroable;

use crate::error::{Error, Result};
use crate::kernel::BackendKind;

/// An empty vector with room for `count` elements.
pub(crate) fn reserve<T>(count: usize) -> Result<Vec<T>> {
    let mut values = Vec::new();
    values.try_reserve_exact(count).map_err(|error| out_of_memory::<T>(count, error.to_string()))?;
    Ok(values)
}

/// Zeros. Pages that nobody writes take no memory.
pub(crate) fn zeroed<T: Zeroable>(count: usize) -> Result<Vec<T>> {
    bytemuck::allocation::try_zeroed_vec(count)
        .map_err(|()| out_of_memory::<T>(count, "the allocator has none".to_owned()))
}

/// Elements that are all the same.
pub(crate) fn filled<T: Clone>(value: T, count: usize) -> Result<Vec<T>> {
    let mut values = reserve(count)?;
    values.resize(count, value);
    Ok(values)
}

/// A copy.
pub(crate) fn copied<T: Copy>(from: &[T]) -> Result<Vec<T>> {
    let mut values = reserve(from.len())?;
    values.extend_from_slice(from);
    Ok(values)
}

fn out_of_memory<T>(count: usize, why: String) -> Error {
    let requested = count.saturating_mul(size_of::<T>()) as u64;
    Error::OutOfMemory { device: BackendKind::Cpu.name().to_owned(), requested, why }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_address_space_is_an_error() {
        let count = usize::MAX / 16;
        let requested = |error: Option<Error>| match error {
            Some(Error::OutOfMemory { requested, .. }) => requested,
            _ => 0,
        };
        let bytes = count as u64 * 8;
        assert_eq!(requested(reserve::<u64>(count).err()), bytes);
        assert_eq!(requested(zeroed::<u64>(count).err()), bytes);
        assert_eq!(requested(filled(1_u64, count).err()), bytes);
    }

    #[test]
    fn vectors_hold_what_they_are_made_of() -> Result<()> {
        assert_eq!(zeroed::<u32>(3)?, [0; 3]);
        assert_eq!(filled(-1, 2)?, [-1; 2]);
        assert_eq!(copied(&[1, 2])?, [1, 2]);
        assert!(reserve::<u8>(5)?.capacity() >= 5 && zeroed::<u8>(0)?.is_empty());
        Ok(())
    }
}
