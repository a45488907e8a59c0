//! The one metadata builder: where the valid tokens of a padded batch lie, for every device.
//!
//! The layout of the metadata is that of sglang PR #26318 (`build_varlen_mask_meta`), with the runs of valid tokens added.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::cache::DeviceCopies;
use crate::error::Result;
use crate::fifo_cache::FifoCache;
use crate::host_vec;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_mask::{KeyMask, Run};
use crate::mask::key_ranges::KeyRanges;

/// Rows of a group: what kernels that work in place take at least of a run.
pub(crate) const GROUP_ROWS: usize = 16;

/// Where the valid tokens of a `[B, S]` batch lie. Built once per request, on the host, in O(B·S); devices keep their copy of
/// it, so every layer and step of the request reuses one upload.
///
/// Giving it to a layer is the agreement that masked rows are dropped: their output is exactly zero.
///
/// ```
/// use varlen_fa::{KeyMask, VarlenMeta};
///
/// //                                      row 0: 1 0 1      row 1: 0 0 1
/// let mask = KeyMask::from_integers(2, 3, &[1_u8, 0, 1, 0, 0, 1])?;
/// let meta = VarlenMeta::from_key_mask(&mask)?;
/// assert_eq!(meta.indices()?, [0, 2, 5]);
/// assert_eq!(meta.cu_seqlens().as_slice(), [0, 2, 3]);
/// assert_eq!(meta.inv_indices()?, [0, -1, 1, -1, -1, 2]);
/// assert_eq!(meta.max_seqlen(), 2);
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct VarlenMeta {
    mask: KeyMask,
    // The tables of one entry a token are made at their first use: in-place paths need only the runs,
    // and faulting in fresh pages for the tables costs many times the rest. Clones share all lists,
    // so that a clone cannot run out of memory.
    indices: Arc<OnceLock<Vec<u32>>>,
    inv_indices: Arc<OnceLock<Vec<i32>>>,
    /// The same for clones, which hold the same.
    id: u64,
    cu_seqlens: CuSeqlens,
    runs: Arc<Vec<Run>>,
    /// Runs of row `b` are `runs[row_runs[b]..row_runs[b + 1]]`.
    row_runs: Arc<Vec<u32>>,
    /// The documents of its rows, where it was made of any.
    documents: Option<KeyRanges>,
    /// The documents within other ranges, by the id of those.
    documents_within: Arc<FifoCache<u64, KeyRanges>>,
    copies: DeviceCopies,
}

impl VarlenMeta {
    /// Builds the metadata of a mask.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn from_key_mask(mask: &KeyMask) -> Result<Self> {
        let batch = mask.batch();
        // Without a valid token both are zeros, which take no memory until they are read.
        if mask.is_empty() {
            let (cu_seqlens, row_runs) = (host_vec::zeroed(batch + 1)?, host_vec::zeroed(batch + 1)?);
            return Ok(Self::of_runs(mask, cu_seqlens, 0, Vec::new(), row_runs));
        }
        let mut cu_seqlens = host_vec::reserve(batch + 1)?;
        let mut row_runs = host_vec::reserve(batch + 1)?;
        let mut runs = host_vec::reserve(mask.run_count())?;
        let (mut total, mut max_seqlen) = (0_usize, 0);
        cu_seqlens.push(0);
        row_runs.push(0);
        for row in 0..batch {
            let first = runs.len();
            runs.extend(mask.runs(row));
            let length = runs[first..].iter().map(|run: &Run| run.len as usize).sum();
            total += length;
            max_seqlen = max_seqlen.max(length);
            // Both casts fit: KeyMask bounds batch · seq by i32::MAX.
            cu_seqlens.push(total as i32);
            row_runs.push(runs.len() as u32);
        }
        Ok(Self::of_runs(mask, cu_seqlens, max_seqlen, runs, row_runs))
    }

    fn of_runs(mask: &KeyMask, cu_seqlens: Vec<i32>, max_seqlen: usize, runs: Vec<Run>, row_runs: Vec<u32>) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        Self {
            mask: mask.clone(),
            indices: Arc::default(),
            inv_indices: Arc::default(),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            cu_seqlens: CuSeqlens::of_values(cu_seqlens, max_seqlen),
            runs: Arc::new(runs),
            row_runs: Arc::new(row_runs),
            documents: None,
            documents_within: Arc::default(),
            copies: DeviceCopies::default(),
        }
    }

    /// Metadata of several documents in each row, for self-attention: tokens with the same number see one another and nothing else;
    /// tokens numbered 0 are masked. `[B, S]` numbers, row-major; the tokens of a document lie together.
    ///
    /// ```
    /// use varlen_fa::VarlenMeta;
    ///
    /// // Two texts of two tokens, and one masked token.
    /// let meta = VarlenMeta::from_document_ids(1, 5, &[1, 1, 2, 2, 0])?;
    /// assert_eq!(meta.total_valid(), 4);
    /// # Ok::<(), varlen_fa::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`KeyRanges::from_document_ids`].
    pub fn from_document_ids(batch: usize, seq: usize, ids: &[u32]) -> Result<Self> {
        let documents = KeyRanges::from_document_ids(batch, seq, ids)?;
        let mask = KeyMask::from_integers(batch, seq, ids)?;
        Ok(Self { documents: Some(documents), ..Self::from_key_mask(&mask)? })
    }

    /// Every run as positions in the flat batch, ascending.
    fn flat_runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        (0..self.batch()).flat_map(|row| {
            let start = row * self.seq();
            self.runs(row).iter().map(move |run| start + run.start as usize..start + run.end())
        })
    }

    /// Number of batch rows, B.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.mask.batch()
    }

    /// Tokens of each padded row, S.
    #[must_use]
    pub fn seq(&self) -> usize {
        self.mask.seq()
    }

    /// `[total_valid]`: flat positions `b·S + s` of the valid tokens, ascending. Made at the first call.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn indices(&self) -> Result<&[u32]> {
        get_or_make(&self.indices, || {
            let mut indices = host_vec::reserve(self.total_valid())?;
            // Every cast fits: KeyMask bounds batch · seq by i32::MAX.
            self.flat_runs().for_each(|run| indices.extend(run.start as u32..run.end as u32));
            Ok(indices)
        })
    }

    /// `[B·S]`: the packed row of each token, −1 where it is masked. Made at the first call.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn inv_indices(&self) -> Result<&[i32]> {
        get_or_make(&self.inv_indices, || {
            let mut inv_indices = host_vec::filled(-1, self.batch() * self.seq())?;
            let mut packed = 0;
            for run in self.flat_runs() {
                for index in &mut inv_indices[run] {
                    *index = packed;
                    packed += 1;
                }
            }
            Ok(inv_indices)
        })
    }

    /// `[B + 1]`: packed rows of batch row `b` are `cu_seqlens[b]..cu_seqlens[b + 1]`.
    #[must_use]
    pub fn cu_seqlens(&self) -> &CuSeqlens {
        &self.cu_seqlens
    }

    /// Valid tokens of the longest row.
    #[must_use]
    pub fn max_seqlen(&self) -> usize {
        self.cu_seqlens.max_seqlen()
    }

    /// Number of valid tokens, which is the number of packed rows.
    #[must_use]
    pub fn total_valid(&self) -> usize {
        self.cu_seqlens.total()
    }

    /// The runs of valid tokens of batch row `row`, ascending; none if there is no such row.
    #[must_use]
    pub fn runs(&self, row: usize) -> &[Run] {
        if row >= self.batch() {
            return &[];
        }
        &self.runs[self.row_runs[row] as usize..self.row_runs[row + 1] as usize]
    }

    /// Whether every token is valid; attention then runs dense, with no pack and no scatter.
    #[must_use]
    pub fn is_all_valid(&self) -> bool {
        self.total_valid() == self.batch() * self.seq()
    }

    /// Whether no token is valid; attention then only writes zeros.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.total_valid() == 0
    }

    /// Tells metadata of different masks apart.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The documents of its rows as ranges of keys, if it was made of document numbers.
    #[must_use]
    pub fn documents(&self) -> Option<&KeyRanges> {
        self.documents.as_ref()
    }

    /// What each query sees under the metadata and these ranges: keys of its own document in its range.
    pub(crate) fn ranges_within(&self, ranges: Option<&KeyRanges>) -> Result<Option<KeyRanges>> {
        match (&self.documents, ranges) {
            (documents, None) => Ok(documents.clone()),
            (None, ranges) => Ok(ranges.cloned()),
            (Some(documents), Some(ranges)) => {
                ranges.expect_padded(self.batch(), self.seq(), self.seq())?;
                // Kept as long as the metadata: a captured graph may hold addresses of its copies.
                let both = self.documents_within.get_or_make(ranges.id(), true, || documents.intersect(ranges))?;
                Ok(Some(KeyRanges::clone(&both)))
            }
        }
    }

    /// The mask that the metadata was built from.
    #[must_use]
    pub fn key_mask(&self) -> &KeyMask {
        &self.mask
    }

    pub(crate) fn copies(&self) -> &DeviceCopies {
        &self.copies
    }
}

/// The table, made if there is none yet. Threads that come at the same time may each make it; one is kept.
fn get_or_make<T>(table: &OnceLock<Vec<T>>, make: impl FnOnce() -> Result<Vec<T>>) -> Result<&[T]> {
    if let Some(made) = table.get() {
        return Ok(made);
    }
    let made = make()?;
    Ok(table.get_or_init(|| made))
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a row may have one run")]
mod tests {
    use super::*;

    #[test]
    fn holes_and_empty_rows() -> Result<()> {
        let mask = KeyMask::from_runs(6, &[vec![1..2, 4..6], vec![], vec![0..6]])?;
        let meta = VarlenMeta::from_key_mask(&mask)?;
        assert_eq!(meta.indices()?, [1, 4, 5, 12, 13, 14, 15, 16, 17]);
        assert_eq!(meta.cu_seqlens().as_slice(), [0, 3, 3, 9]);
        assert_eq!(meta.inv_indices()?, [-1, 0, -1, -1, 1, 2, -1, -1, -1, -1, -1, -1, 3, 4, 5, 6, 7, 8]);
        assert_eq!((meta.max_seqlen(), meta.total_valid()), (6, 9));
        assert_eq!(meta.runs(0), [Run { start: 1, len: 1 }, Run { start: 4, len: 2 }]);
        assert!(meta.runs(1).is_empty() && meta.runs(9).is_empty());
        assert!(!meta.is_all_valid() && !meta.is_empty());
        Ok(())
    }

    #[test]
    fn all_valid_and_empty_are_told_apart() -> Result<()> {
        assert!(VarlenMeta::from_key_mask(&KeyMask::all(2, 65)?)?.is_all_valid());
        let empty = VarlenMeta::from_key_mask(&KeyMask::from_lengths(65, &[0, 0])?)?;
        assert!(empty.is_empty() && !empty.is_all_valid());
        assert_eq!(empty.cu_seqlens().as_slice(), [0, 0, 0]);
        Ok(())
    }
}
