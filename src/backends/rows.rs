//! Rows of tensors as GPU kernels move them: word by word, heads after heads. What a row consists
//! of, how far apart rows lie, and whether they start at words.

use std::ops::Range;

use crate::call::problem::{AttentionProblem, AttentionShape};
use crate::layout::Layout;

/// Kernels move words of this many bytes.
pub(super) const WORD_BYTES: u64 = 16;

/// Kernels read heads of a multiple of this many elements: whole words in every element type. Other heads are copied, and zeros
/// fill them up.
pub(super) const HEAD_DIM_STEP: usize = 8;

/// The head dimension of the copies, which kernels compute with.
pub(super) const fn filled_head_dim(head_dim: usize) -> usize {
    head_dim.next_multiple_of(HEAD_DIM_STEP)
}

/// Whether heads are as kernels read them; nothing is if there are no heads.
pub(super) fn has_filled_heads(layout: &Layout) -> bool {
    layout.shape().last().is_some_and(|head_dim| head_dim.is_multiple_of(HEAD_DIM_STEP))
}

/// The same call on filled heads, in which zeros change no product; the scale stays.
pub(super) fn with_filled_heads(problem: &AttentionProblem) -> AttentionProblem {
    let shape = AttentionShape { head_dim: filled_head_dim(problem.shape.head_dim), ..problem.shape };
    AttentionProblem { shape, ..problem.clone() }
}

/// The size of one row, `[H, D]`, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RowShape {
    pub heads: usize,
    /// Words of one head.
    pub head_words: usize,
}

impl RowShape {
    /// Of filled heads.
    pub fn new(heads: usize, head_dim: usize, element_bytes: usize) -> Self {
        Self { heads, head_words: filled_head_dim(head_dim) * element_bytes / WORD_BYTES as usize }
    }

    /// The rows of a `[.., H, D]` tensor, with filled heads.
    pub fn of(layout: &Layout, element_bytes: usize) -> Self {
        match *layout.shape() {
            [.., heads, head_dim] => Self::new(heads, head_dim, element_bytes),
            _ => Self { heads: 0, head_words: 0 },
        }
    }

    /// Words of one row.
    pub fn words(self) -> u64 {
        self.heads as u64 * self.head_words as u64
    }

    /// Bytes of one row.
    pub fn bytes(self) -> u64 {
        self.words() * WORD_BYTES
    }
}

/// Strides of batch row, token and head, in elements. A packed `[total, H, D]` tensor has no batch
/// rows: its stride is 0. Dimensions of size 1 get the stride of a contiguous head, or 0, so that
/// they never look scattered.
pub(super) fn row_strides(layout: &Layout) -> [u64; 3] {
    let (shape, strides) = (layout.shape(), layout.strides());
    let stepped = |dim: usize, otherwise: usize| if shape[dim] > 1 { strides[dim] } else { otherwise as u64 };
    match *shape {
        [_, _, _, head_dim] => [stepped(0, 0), stepped(1, 0), stepped(2, head_dim)],
        [_, _, head_dim] => [0, stepped(0, 0), stepped(1, head_dim)],
        _ => [0; 3],
    }
}

/// Ranges of query heads, of at most `most`, that launches take one after another: whole groups of
/// the heads that share a key/value head, or parts of one group if a group is larger.
pub(super) fn head_ranges(num_heads: usize, group_size: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let (span, step) = if group_size <= most {
        (num_heads.max(1), most / group_size.max(1) * group_size.max(1))
    } else {
        (group_size, most)
    };
    (0..num_heads).step_by(span).flat_map(move |start| {
        let end = start + span;
        (start..end).step_by(step).map(move |first| first..end.min(first + step))
    })
}

/// What keeps the rows of a tensor from starting at words, in bytes: the address of its first
/// element, or its offset if the memory itself starts at a word, or the first stride between rows
/// or heads. `base` is the address of the memory; 0 if all memory starts at a word.
pub(super) fn misaligned_by(base: u64, layout: &Layout, element_bytes: usize) -> Option<u64> {
    let is_odd = |bytes: &u64| !bytes.is_multiple_of(WORD_BYTES);
    let bytes = |elements: u64| elements * element_bytes as u64;
    let (offset, address) = (bytes(layout.offset()), base + bytes(layout.offset()));
    if is_odd(&address) {
        return Some(if is_odd(&base) { address } else { offset });
    }
    let dims = layout.shape().iter().zip(layout.strides()).take(layout.rank().saturating_sub(1));
    dims.filter(|&(&size, _)| size > 1).map(|(_, &stride)| bytes(stride)).find(is_odd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Result;

    #[test]
    fn rows_are_counted_in_words_and_bytes() -> Result<()> {
        let row = RowShape::of(&Layout::contiguous(&[2, 5, 12, 72])?, 2);
        assert_eq!(row, RowShape { heads: 12, head_words: 9 });
        assert_eq!((row.words(), row.bytes()), (108, 1728));
        assert_eq!(RowShape::of(&Layout::contiguous(&[5, 3, 8])?, 4), RowShape::new(3, 8, 4));
        // Heads that zeros fill up.
        assert_eq!(RowShape::of(&Layout::contiguous(&[5, 3, 59])?, 2), RowShape::new(3, 64, 2));
        assert_eq!(RowShape::new(2, 1, 4), RowShape { heads: 2, head_words: 2 });
        // More than 32 bits.
        let long = RowShape { heads: 1 << 20, head_words: 1 << 14 };
        assert_eq!(long.bytes(), 1 << 38);
        Ok(())
    }

    #[test]
    fn heads_of_a_group_stay_together_if_they_fit() {
        let ranges = |heads, group| head_ranges(heads, group, 10).collect::<Vec<_>>();
        assert_eq!(ranges(13, 1), [0..10, 10..13]);
        assert_eq!(ranges(11, 11), [0..10, 10..11]);
        assert_eq!(ranges(24, 4), [0..8, 8..16, 16..24]);
        assert_eq!(ranges(24, 12), [0..10, 10..12, 12..22, 22..24]);
        assert_eq!(ranges(21, 7), [0..7, 7..14, 14..21]);
        assert!(ranges(0, 0).is_empty());
    }

    #[test]
    fn alignment_is_of_the_address() -> Result<()> {
        let odd = |base, offset, strides: [u64; 2]| {
            let layout = Layout::strided(&[4, 3, 8], &[strides[0], strides[1], 1], offset);
            layout.map(|layout| misaligned_by(base, &layout, 2))
        };
        assert_eq!(odd(0x7000, 16, [64, 128])?, None);
        // Memory that starts at a word: the offset is at fault.
        assert_eq!(odd(0x7000, 3, [64, 128])?, Some(6));
        assert_eq!(odd(0, 3, [64, 128])?, Some(6));
        // External memory starts beside a word, and the offset does or does not make up for it.
        assert_eq!(odd(0x7006, 5, [64, 128])?, None);
        assert_eq!(odd(0x7006, 0, [64, 128])?, Some(0x7006));
        assert_eq!(odd(0x7006, 8, [64, 128])?, Some(0x7016));
        assert_eq!(odd(0x7006, 5, [64, 12])?, Some(24));
        assert_eq!(odd(0x7000, 0, [4, 12])?, Some(8));
        Ok(())
    }

    #[test]
    fn only_strides_that_are_stepped_over_must_be_words() -> Result<()> {
        let layout = Layout::strided(&[1, 5, 1, 8], &[7, 24, 3, 1], 0)?;
        assert_eq!(misaligned_by(0, &layout, 2), None);
        assert_eq!(row_strides(&layout), [0, 24, 8]);
        assert_eq!(row_strides(&Layout::contiguous(&[5, 2, 8])?), [0, 16, 8]);
        assert_eq!(row_strides(&Layout::contiguous(&[3, 5, 2, 8])?), [80, 16, 8]);
        Ok(())
    }
}
