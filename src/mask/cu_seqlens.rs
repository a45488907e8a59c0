//! Where sequences of packed rows begin and end.

use std::ops::Range;
use std::sync::Arc;

use crate::cache::DeviceCopies;
use crate::error::{Error, Result};
use crate::host_vec;

/// Cumulative sequence lengths of packed rows: sequence `b` is rows `cu_seqlens[b]..cu_seqlens[b + 1]`.
#[derive(Debug, Clone)]
pub struct CuSeqlens {
    /// Clones share them.
    values: Arc<Vec<i32>>,
    max_seqlen: usize,
    copies: DeviceCopies,
}

impl CuSeqlens {
    /// From `B + 1` values that start at 0 and never fall.
    ///
    /// # Errors
    /// [`Error::CuSeqlens`] if they do not, [`Error::OutOfMemory`].
    pub fn new(values: &[i32]) -> Result<Self> {
        if values.first() != Some(&0) {
            return Err(Error::CuSeqlens {
                argument: "cu_seqlens",
                expected: "a first value of 0".to_owned(),
                got: values.first().map_or_else(|| "no values".to_owned(), i32::to_string),
            });
        }
        let mut max_seqlen = 0;
        for (row, pair) in values.windows(2).enumerate() {
            if pair[1] < pair[0] {
                return Err(Error::CuSeqlens {
                    argument: "cu_seqlens",
                    expected: "values that never fall".to_owned(),
                    got: format!("{} after {} at position {}", pair[1], pair[0], row + 1),
                });
            }
            // Neither is negative here: the first value is 0 and none has fallen.
            max_seqlen = max_seqlen.max((pair[1] - pair[0]) as usize);
        }
        Ok(Self::of_values(host_vec::copied(values)?, max_seqlen))
    }

    /// From the length of each sequence.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the sum does not fit an `i32`, [`Error::OutOfMemory`].
    pub fn from_lengths(lengths: &[usize]) -> Result<Self> {
        let mut values = host_vec::reserve(lengths.len() + 1)?;
        let mut total = 0_usize;
        values.push(0);
        for &length in lengths {
            total = total.saturating_add(length);
            values.push(i32::try_from(total).map_err(|_| Error::TooLarge {
                argument: "lengths",
                limit_name: "an i32 of the sum",
                limit: i32::MAX as u64,
                got: total as u64,
            })?);
        }
        let max_seqlen = lengths.iter().copied().max().unwrap_or(0);
        Ok(Self::of_values(values, max_seqlen))
    }

    /// Of values that keep the rules, and the longest sequence among them.
    pub(super) fn of_values(values: Vec<i32>, max_seqlen: usize) -> Self {
        Self { values: Arc::new(values), max_seqlen, copies: DeviceCopies::default() }
    }

    /// The `B + 1` values.
    #[must_use]
    pub fn as_slice(&self) -> &[i32] {
        &self.values
    }

    /// Number of sequences.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.values.len() - 1
    }

    /// Number of packed rows.
    #[must_use]
    pub fn total(&self) -> usize {
        self.values.last().map_or(0, |&total| total as usize)
    }

    /// Rows of sequence `b`.
    ///
    /// The caller keeps `b` below [`batch`](Self::batch).
    pub(crate) fn rows(&self, b: usize) -> Range<usize> {
        self.values[b] as usize..self.values[b + 1] as usize
    }

    /// Length of the longest sequence.
    #[must_use]
    pub fn max_seqlen(&self) -> usize {
        self.max_seqlen
    }

    /// Whether the other is a clone of this one. False may be said of equal ones.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.values, &other.values)
    }

    pub(crate) fn copies(&self) -> &DeviceCopies {
        &self.copies
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cu_seqlens_are_checked() -> Result<()> {
        assert!(matches!(CuSeqlens::new(&[]), Err(Error::CuSeqlens { .. })));
        assert!(matches!(CuSeqlens::new(&[1, 2]), Err(Error::CuSeqlens { .. })));
        assert!(matches!(CuSeqlens::new(&[0, 3, 2]), Err(Error::CuSeqlens { .. })));
        assert!(matches!(CuSeqlens::new(&[0, i32::MAX, i32::MIN]), Err(Error::CuSeqlens { .. })));
        let cu_seqlens = CuSeqlens::new(&[0, 3, 3, 10])?;
        assert_eq!((cu_seqlens.batch(), cu_seqlens.total(), cu_seqlens.max_seqlen()), (3, 10, 7));
        assert_eq!(CuSeqlens::from_lengths(&[3, 0, 7])?.as_slice(), [0, 3, 3, 10]);
        assert!(matches!(CuSeqlens::from_lengths(&[usize::MAX, 1]), Err(Error::TooLarge { .. })));
        Ok(())
    }
}
