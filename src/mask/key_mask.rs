//! Key masks: which tokens of a padded batch are kept.

use std::fmt::Display;
use std::mem::replace;
use std::ops::Range;
use std::sync::Arc;

use crate::cache::DeviceCopies;
use crate::error::{Error, Result};
use crate::host_vec;

/// Bits of one word of a mask.
pub(super) const WORD_BITS: usize = 64;

mod sealed {
    pub trait Sealed: bytemuck::Pod {}
}

/// Element type of a mask in a device's memory, by size: booleans and signed integers count like unsigned ones, and any value
/// that is not 0 keeps its token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MaskDType {
    /// One byte: `bool`, `u8`, `i8`.
    U8,
    /// Two bytes.
    U16,
    /// Four bytes.
    U32,
    /// Eight bytes.
    U64,
}

impl MaskDType {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::U32 => 4,
            Self::U64 => 8,
        }
    }
}

/// An integer that can stand in a mask: zero drops the token, anything else keeps it.
pub trait MaskInteger: sealed::Sealed + Copy + Display {
    /// The integer's size as a mask element of a device.
    const MASK_DTYPE: MaskDType;
    /// Whether the token is kept.
    fn keeps(self) -> bool;
    /// Whether it is 0 or 1.
    fn is_flag(self) -> bool;
}

macro_rules! mask_integer {
    ($($integer:ty: $dtype:ident),*) => {$(
        impl sealed::Sealed for $integer {}
        impl MaskInteger for $integer {
            const MASK_DTYPE: MaskDType = MaskDType::$dtype;

            #[inline(always)]
            fn keeps(self) -> bool {
                self != 0
            }

            #[inline(always)]
            fn is_flag(self) -> bool {
                self == 0 || self == 1
            }
        }
    )*};
}
mask_integer!(u8: U8, i8: U8, u16: U16, i16: U16, u32: U32, i32: U32, u64: U64, i64: U64);

/// A maximal range of consecutive kept tokens of one batch row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First kept token.
    pub start: u32,
    /// Number of kept tokens, at least 1.
    pub len: u32,
}

impl Run {
    /// The run's tokens.
    #[must_use]
    pub fn range(self) -> Range<usize> {
        self.start as usize..self.end()
    }

    /// One past the last kept token.
    #[must_use]
    pub fn end(self) -> usize {
        self.start as usize + self.len as usize
    }
}

/// Which of the `[B, S]` tokens are kept; one bit a token.
///
/// Given as a mask to dense attention it drops keys only; the rows of dropped queries are computed like any other. To have
/// those rows skipped and written as zeros, build a [`VarlenMeta`](crate::VarlenMeta) from it.
#[derive(Debug, Clone)]
pub struct KeyMask {
    batch: usize,
    seq: usize,
    /// `[B, ceil(S / 64)]`: bit `s % 64` of word `s / 64`; bits past S are 0. Clones share them.
    words: Arc<Vec<u64>>,
    copies: DeviceCopies,
}

/// Two masks are equal if they keep the same tokens.
impl PartialEq for KeyMask {
    fn eq(&self, other: &Self) -> bool {
        (self.batch, self.seq, &self.words) == (other.batch, other.seq, &other.words)
    }
}

impl Eq for KeyMask {}

impl KeyMask {
    /// A mask from `[B, S]` booleans, row-major; `true` keeps.
    ///
    /// # Errors
    /// [`Error::Length`] if `keep` has not `batch · seq` elements, [`Error::TooLarge`] if that number does not fit an `i32`,
    /// [`Error::OutOfMemory`].
    pub fn from_bool(batch: usize, seq: usize, keep: &[bool]) -> Result<Self> {
        Self::from_flags(batch, seq, keep, |&flag| flag)
    }

    /// A mask from `[B, S]` integers, row-major; any non-zero value keeps.
    ///
    /// # Errors
    /// As [`from_bool`](Self::from_bool).
    pub fn from_integers<T: MaskInteger>(batch: usize, seq: usize, keep: &[T]) -> Result<Self> {
        Self::from_flags(batch, seq, keep, |&value| value.keeps())
    }

    /// A mask that keeps the first `lengths[b]` tokens of each row; the batch is the number of lengths.
    ///
    /// # Errors
    /// [`Error::MaskRow`] for a length over `seq`, [`Error::TooLarge`] if `batch · seq` does not fit an `i32`,
    /// [`Error::OutOfMemory`].
    pub fn from_lengths(seq: usize, lengths: &[usize]) -> Result<Self> {
        let mut bits = Bits::new(lengths.len(), seq)?;
        for (row, &length) in lengths.iter().enumerate() {
            if length > seq {
                return Err(Error::MaskRow {
                    argument: "lengths",
                    row,
                    expected: format!("a length of at most {seq}"),
                    got: length.to_string(),
                });
            }
            bits.keep(row, 0..length);
        }
        Ok(bits.into_mask())
    }

    /// A mask that keeps the given ranges of each row; the batch is the number of rows. Ranges may be empty, touch or overlap.
    ///
    /// # Errors
    /// [`Error::MaskRow`] for a range that ends past `seq` or before it starts, [`Error::TooLarge`] if `batch · seq` does not fit
    /// an `i32`, [`Error::OutOfMemory`].
    pub fn from_runs<R: AsRef<[Range<usize>]>>(seq: usize, rows: &[R]) -> Result<Self> {
        let runs =
            rows.iter().enumerate().flat_map(|(row, runs)| runs.as_ref().iter().map(move |run| (row, run.clone())));
        Self::from_row_runs(rows.len(), seq, runs)
    }

    /// A mask that keeps the given ranges of tokens, each with its row, in any order; a row without a range keeps nothing.
    ///
    /// # Errors
    /// [`Error::MaskRow`] for a row past `batch` and as [`from_runs`](Self::from_runs).
    pub fn from_row_runs(
        batch: usize,
        seq: usize,
        runs: impl IntoIterator<Item = (usize, Range<usize>)>,
    ) -> Result<Self> {
        let mut bits = Bits::new(batch, seq)?;
        for (row, run) in runs {
            let refused = |expected, got| Err(Error::MaskRow { argument: "runs", row, expected, got });
            if row >= batch {
                return refused(format!("a row below {batch}"), row.to_string());
            }
            if run.start > run.end || run.end > seq {
                return refused(format!("a range inside 0..{seq}"), format!("{run:?}"));
            }
            bits.keep(row, run);
        }
        Ok(bits.into_mask())
    }

    /// A mask that keeps every token.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if `batch · seq` does not fit an `i32`, [`Error::OutOfMemory`].
    pub fn all(batch: usize, seq: usize) -> Result<Self> {
        let mut bits = Bits::new(batch, seq)?;
        if seq > 0 {
            (0..batch).for_each(|row| bits.keep(row, 0..seq));
        }
        Ok(bits.into_mask())
    }

    /// A mask that keeps nothing. Until its bits are read, it takes no memory.
    pub(crate) fn none(batch: usize, seq: usize) -> Result<Self> {
        Ok(Bits::new(batch, seq)?.into_mask())
    }

    /// Number of batch rows.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens of each row, kept or not.
    #[must_use]
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// Whether token `token` of row `row` is kept; `false` outside the mask.
    #[must_use]
    pub fn keeps(&self, row: usize, token: usize) -> bool {
        row < self.batch && token < self.seq && self.row_words(row)[token / WORD_BITS] >> (token % WORD_BITS) & 1 == 1
    }

    /// Number of kept tokens in the whole batch.
    #[must_use]
    pub fn total_kept(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether every token is kept.
    #[must_use]
    pub fn is_all_kept(&self) -> bool {
        self.total_kept() == self.batch * self.seq
    }

    /// Whether no token is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The maximal ranges of kept tokens of row `row`, ascending; none if there is no such row.
    pub fn runs(&self, row: usize) -> impl Iterator<Item = Run> + '_ {
        Runs::new(if row < self.batch { self.row_words(row) } else { &[] })
    }

    /// Number of runs in the whole batch.
    pub(crate) fn run_count(&self) -> usize {
        let rows = (0..self.batch).map(|row| self.row_words(row));
        rows.map(|words| {
            // A run starts at each bit whose lower neighbour is clear.
            let mut below = 0;
            let starts = words.iter().map(|&word| word & !(word << 1 | replace(&mut below, word >> 63)));
            starts.map(|bits| bits.count_ones() as usize).sum::<usize>()
        })
        .sum()
    }

    /// The bits of one row, least significant first; bits past the row's end are 0.
    pub(crate) fn row_words(&self, row: usize) -> &[u64] {
        let width = self.words_per_row();
        &self.words[row * width..][..width]
    }

    /// The bits of all rows, `[B, words_per_row]`.
    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(crate) fn words_per_row(&self) -> usize {
        self.seq.div_ceil(WORD_BITS)
    }

    pub(crate) fn copies(&self) -> &DeviceCopies {
        &self.copies
    }

    /// The first row, `batch` times. The caller has checked the size.
    pub(super) fn repeated(&self, batch: usize) -> Result<Self> {
        let row = self.row_words(0);
        let mut words = host_vec::reserve(batch * row.len())?;
        (0..batch).for_each(|_| words.extend_from_slice(row));
        Ok(Bits { batch, seq: self.seq, words }.into_mask())
    }

    pub(super) fn from_flags<T>(batch: usize, seq: usize, flags: &[T], keeps: impl Fn(&T) -> bool) -> Result<Self> {
        let expected = check_token_count("mask", batch, seq)?;
        Error::expect_length("mask", expected, flags.len())?;
        let mut words = host_vec::reserve(batch * seq.div_ceil(WORD_BITS))?;
        for row in flags.chunks_exact(seq.max(1)) {
            words.extend(row.chunks(WORD_BITS).map(|chunk| {
                let mut kept = [false; WORD_BITS];
                for (kept, flag) in kept.iter_mut().zip(chunk) {
                    *kept = keeps(flag);
                }
                bits(&kept)
            }));
        }
        Ok(Bits { batch, seq, words }.into_mask())
    }
}

/// The bits of a mask that is being made.
struct Bits {
    batch: usize,
    seq: usize,
    /// As in [`KeyMask`].
    words: Vec<u64>,
}

impl Bits {
    /// Nothing is kept yet.
    fn new(batch: usize, seq: usize) -> Result<Self> {
        check_token_count("mask", batch, seq)?;
        Ok(Self { batch, seq, words: host_vec::zeroed(batch * seq.div_ceil(WORD_BITS))? })
    }

    fn into_mask(self) -> KeyMask {
        let Self { batch, seq, words } = self;
        KeyMask { batch, seq, words: Arc::new(words), copies: DeviceCopies::default() }
    }

    fn keep(&mut self, row: usize, range: Range<usize>) {
        let width = self.seq.div_ceil(WORD_BITS);
        let words = &mut self.words[row * width..][..width];
        let mut position = range.start;
        while position < range.end {
            let bit = position % WORD_BITS;
            let count = (WORD_BITS - bit).min(range.end - position);
            words[position / WORD_BITS] |= (u64::MAX >> (WORD_BITS - count)) << bit;
            position += count;
        }
    }
}

/// A bit for each flag, the first one lowest.
#[inline(always)]
pub(super) fn bits(flags: &[bool; WORD_BITS]) -> u64 {
    /// Brings the lowest bits of eight bytes together in the highest byte.
    const TOGETHER: u64 = 0x0102_0408_1020_4080;
    let bytes = flags.map(u8::from);
    let eights = bytes.as_chunks::<8>().0.iter().enumerate();
    eights.fold(0, |word, (n, &eight)| {
        word | (u64::from_le_bytes(eight).wrapping_mul(TOGETHER) >> (WORD_BITS - 8)) << (8 * n)
    })
}

/// `batch · seq`, if every position fits the `i32` of `cu_seqlens` and `inv_indices`.
pub(crate) fn check_token_count(argument: &'static str, batch: usize, seq: usize) -> Result<usize> {
    let limit = i32::MAX as u64;
    let got = (batch as u128 * seq as u128).max(batch as u128);
    match usize::try_from(got) {
        Ok(_) if got <= u128::from(limit) => Ok(batch * seq),
        _ => Err(Error::TooLarge {
            argument,
            limit_name: "an i32 of batch · seq",
            limit,
            got: u64::try_from(got).unwrap_or(u64::MAX),
        }),
    }
}

/// Walks the runs of one row a word at a time.
struct Runs<'a> {
    words: &'a [u64],
    /// The word being walked, and what is left of it: bits of runs already given are cleared.
    index: usize,
    rest: u64,
}

impl<'a> Runs<'a> {
    fn new(words: &'a [u64]) -> Self {
        Self { words, index: 0, rest: words.first().copied().unwrap_or(0) }
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    #[inline]
    fn next(&mut self) -> Option<Run> {
        while self.rest == 0 {
            self.index += 1;
            self.rest = *self.words.get(self.index)?;
        }
        let first = self.rest.trailing_zeros();
        let start = self.index * WORD_BITS + first as usize;
        // The word's bits above the run: adding its lowest bit carries past it, out of the word if it reaches the end.
        let (carried, reaches_end) = self.rest.overflowing_add(1 << first);
        self.rest &= carried;
        let mut end = self.index * WORD_BITS + carried.trailing_zeros() as usize;
        if reaches_end {
            loop {
                self.index += 1;
                let word = self.words.get(self.index).copied().unwrap_or(0);
                end = self.index * WORD_BITS + word.trailing_ones() as usize;
                if word != u64::MAX {
                    self.rest = word & word.wrapping_add(1);
                    break;
                }
            }
        }
        // Both fit: the constructors bound batch · seq by i32::MAX.
        Some(Run { start: start as u32, len: (end - start) as u32 })
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a row may have one run")]
mod tests {
    use super::*;

    #[test]
    fn runs_cross_words_and_end_at_the_row() -> Result<()> {
        let mask = KeyMask::from_runs(130, &[vec![0..1, 60..70, 127..130], vec![], vec![0..130]])?;
        let runs = |row| mask.runs(row).map(Run::range).collect::<Vec<_>>();
        assert_eq!(runs(0), [0..1, 60..70, 127..130]);
        assert!(runs(1).is_empty());
        assert_eq!(mask.runs(2).map(Run::range).collect::<Vec<_>>(), [Range { start: 0, end: 130 }]);
        assert_eq!(mask.runs(3).count(), 0);
        Ok(())
    }

    #[test]
    fn a_length_of_whole_words_ends_its_run() -> Result<()> {
        let mask = KeyMask::from_lengths(192, &[128, 192, 64])?;
        assert_eq!(mask.runs(0).collect::<Vec<_>>(), [Run { start: 0, len: 128 }]);
        assert_eq!(mask.runs(1).collect::<Vec<_>>(), [Run { start: 0, len: 192 }]);
        assert_eq!(mask.total_kept(), 128 + 192 + 64);
        Ok(())
    }

    #[test]
    fn every_source_gives_the_same_mask() -> Result<()> {
        let flags = [true, false, true, true, false, false];
        let mask = KeyMask::from_bool(2, 3, &flags)?;
        assert_eq!(mask, KeyMask::from_integers(2, 3, &[7_i64, 0, -1, i64::MIN, 0, 0])?);
        assert_eq!(mask, KeyMask::from_integers(2, 3, &[255_u8, 0, 2, 1, 0, 0])?);
        assert_eq!(mask, KeyMask::from_runs(3, &[vec![0..1, 2..3], vec![Range { start: 0, end: 1 }]])?);
        assert!(mask.keeps(0, 2) && !mask.keeps(0, 1) && !mask.keeps(0, 3) && !mask.keeps(2, 0));
        Ok(())
    }

    #[test]
    fn runs_are_those_of_a_walk_token_by_token() -> Result<()> {
        // A small generator of its own: run lengths from 1 to several words, and rows of every length modulo a word.
        let mut state = 1_u64;
        let mut below = |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % bound
        };
        for seq in 1..=200 {
            for longest in [1, 2, 5, 70, 200] {
                let mut flags = Vec::new();
                while flags.len() < 3 * seq {
                    let (keep, len) = (below(2) == 1, 1 + below(longest));
                    flags.extend((0..len).map(|_| keep));
                }
                flags.truncate(3 * seq);
                let mask = KeyMask::from_bool(3, seq, &flags)?;
                let mut count = 0;
                for (row, flags) in flags.chunks(seq).enumerate() {
                    let starts = (0..seq).filter(|&token| flags[token] && (token == 0 || !flags[token - 1]));
                    let ranges: Vec<_> = starts
                        .map(|start| {
                            start..flags[start..].iter().position(|&keep| !keep).map_or(seq, |len| start + len)
                        })
                        .collect();
                    assert_eq!(mask.runs(row).map(Run::range).collect::<Vec<_>>(), ranges);
                    count += ranges.len();
                }
                assert_eq!(mask.run_count(), count);
            }
        }
        Ok(())
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(
            KeyMask::from_bool(2, 3, &[true; 5]).err(),
            Some(Error::Length { argument: "mask", expected: 6, got: 5 })
        );
        assert!(matches!(KeyMask::all(1 << 20, 1 << 20), Err(Error::TooLarge { .. })));
        assert!(matches!(KeyMask::all(usize::MAX, usize::MAX), Err(Error::TooLarge { .. })));
        assert!(matches!(KeyMask::from_lengths(4, &[4, 5]), Err(Error::MaskRow { row: 1, .. })));
    }

    #[test]
    fn empty_batches_and_rows_are_masks() -> Result<()> {
        assert!(KeyMask::from_bool(0, 5, &[])?.is_empty());
        let rows_of_nothing = KeyMask::from_bool(3, 0, &[])?;
        assert_eq!((rows_of_nothing.batch(), rows_of_nothing.runs(2).count()), (3, 0));
        Ok(())
    }
}
