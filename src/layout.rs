//! Where the elements of a view lie: shape, strides and offset, all in elements and 64 bits.

use std::fmt;
use std::ops::Range;

use crate::error::{Error, Result};

/// The most dimensions a view has.
pub const MAX_RANK: usize = 4;

/// Shape, strides and offset of a view, in elements.
///
/// ```text
/// element [b, s, h, d] of a [B, S, H, D] view lies at
///     offset + b·strides[0] + s·strides[1] + h·strides[2] + d·strides[3]
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    rank: usize,
    shape: [usize; MAX_RANK],
    strides: [u64; MAX_RANK],
    offset: u64,
}

impl Layout {
    /// A row-major layout at offset 0.
    ///
    /// # Errors
    /// [`Error::Rank`] for 0 or more than 4 dimensions, [`Error::TooLarge`] if the number of elements does not fit 63 bits.
    pub fn contiguous(shape: &[usize]) -> Result<Self> {
        let mut strides = [0; MAX_RANK];
        let mut stride = 1_u64;
        for (dim, &size) in shape.iter().enumerate().take(MAX_RANK).rev() {
            strides[dim] = stride;
            stride = stride.saturating_mul((size as u64).max(1));
        }
        Self::strided(shape, strides.get(..shape.len()).unwrap_or(&strides), 0)
    }

    /// A row-major layout at an offset, in elements.
    ///
    /// # Errors
    /// As [`strided`](Self::strided).
    pub(crate) fn contiguous_at(shape: &[usize], offset: u64) -> Result<Self> {
        let layout = Self::contiguous(shape)?;
        Self::strided(layout.shape(), layout.strides(), offset)
    }

    /// A layout with given strides and offset, in elements.
    ///
    /// # Errors
    /// [`Error::Rank`] for 0 or more than 4 dimensions or another number of strides, [`Error::TooLarge`] if the last element's
    /// position or the number of elements does not fit 63 bits.
    pub fn strided(shape: &[usize], strides: &[u64], offset: u64) -> Result<Self> {
        let rank = shape.len();
        if rank == 0 || rank > MAX_RANK {
            return Err(Error::Rank { argument: "shape", expected: "1 to 4", got: rank });
        }
        if strides.len() != rank {
            return Err(Error::Rank { argument: "strides", expected: "as many as the shape has", got: strides.len() });
        }
        let mut layout = Self { rank, shape: [1; MAX_RANK], strides: [0; MAX_RANK], offset };
        layout.shape[..rank].copy_from_slice(shape);
        layout.strides[..rank].copy_from_slice(strides);
        let mut numel = 1_u128;
        let mut last = u128::from(offset);
        for (&size, &stride) in shape.iter().zip(strides) {
            numel = numel.saturating_mul(size as u128);
            last = last.saturating_add((size as u128).saturating_sub(1).saturating_mul(u128::from(stride)));
        }
        // An eighth of the range, so that no position overflows when it is counted in bytes.
        const LIMIT: u64 = (i64::MAX as u64) / 8;
        let got = numel.max(last);
        if got > u128::from(LIMIT) || usize::try_from(got).is_err() {
            return Err(Error::TooLarge {
                argument: "shape",
                limit_name: "the address space",
                limit: LIMIT.min(usize::MAX as u64),
                got: u64::try_from(got).unwrap_or(u64::MAX),
            });
        }
        Ok(layout)
    }

    /// Number of dimensions.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Size of each dimension.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.rank]
    }

    /// Distance between neighbours of each dimension, in elements.
    #[must_use]
    pub fn strides(&self) -> &[u64] {
        &self.strides[..self.rank]
    }

    /// Position of the first element.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Number of elements.
    #[must_use]
    pub fn numel(&self) -> usize {
        // A product of sizes may overflow before it comes to the one that is 0.
        if self.shape().contains(&0) { 0 } else { self.shape().iter().product() }
    }

    /// One past the position of the last element; the offset itself if there are no elements.
    #[must_use]
    pub fn end(&self) -> u64 {
        if self.numel() == 0 {
            return self.offset;
        }
        self.offset + self.dims().map(|(size, stride)| (size as u64 - 1) * stride).sum::<u64>() + 1
    }

    /// Whether the elements lie in row-major order without gaps.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1_u64;
        self.numel() == 0
            || self.dims().rev().all(|(size, stride)| {
                let fits = size == 1 || stride == expected;
                expected *= size as u64;
                fits
            })
    }

    /// Calls `visit` with the bytes of each row, in row-major order, for elements of so many bytes: where they lie, from the start
    /// of the memory, and where they lie in a row-major copy without an offset. A row is one of the last dimension where its
    /// elements lie side by side, else a single element. It is how a strided tensor in host memory is copied to and from a dense one.
    pub fn for_each_row(&self, element_bytes: usize, mut visit: impl FnMut(Range<usize>, Range<usize>)) {
        let Some((&inner, outer)) = self.shape().split_last() else { return };
        if self.numel() == 0 {
            return;
        }
        let inner_stride = self.strides[outer.len()];
        let (len, pieces) = if inner_stride == 1 || inner == 1 { (inner, 1) } else { (1, inner) };
        let bytes = len * element_bytes;
        let mut dense = 0;
        for row in 0..outer.iter().product::<usize>() {
            let (mut rest, mut start) = (row, self.offset);
            for (&size, &stride) in outer.iter().zip(&self.strides).rev() {
                start += (rest % size) as u64 * stride;
                rest /= size;
            }
            for piece in 0..pieces as u64 {
                // Fits: `strided` checked the last element's position.
                let strided = (start + piece * inner_stride) as usize * element_bytes;
                visit(strided..strided + bytes, dense..dense + bytes);
                dense += bytes;
            }
        }
    }

    /// Whether two elements may lie at one position. A layout without elements does not overlap, whatever its strides.
    ///
    /// The test is conservative: each dimension's stride must step over everything that the dimensions of smaller stride reach, so
    /// a few interleaved layouts that do not overlap are reported as overlapping.
    #[must_use]
    pub fn self_overlaps(&self) -> bool {
        if self.numel() == 0 {
            return false;
        }
        let mut dims = [(0_u64, 0_usize); MAX_RANK];
        let mut count = 0;
        for (size, stride) in self.dims().filter(|&(size, _)| size > 1) {
            dims[count] = (stride, size);
            count += 1;
        }
        let dims = &mut dims[..count];
        dims.sort_unstable();
        let mut reach = 0_u64;
        for &(stride, size) in dims.iter() {
            if stride <= reach {
                return true;
            }
            reach += stride * (size as u64 - 1);
        }
        false
    }

    /// Whether this and another layout of the same memory, neither of which overlaps itself, share no position because they
    /// take turns: q and k in one fused projection, or parts of one tensor along a dimension. Both have the same strides. False
    /// where that cannot be told easily.
    pub(crate) fn interleaves(&self, other: &Self) -> bool {
        let (low, high) = if self.offset <= other.offset { (self, other) } else { (other, self) };
        if low.rank != high.rank || low.numel() == 0 || high.numel() == 0 {
            return low.numel() == 0 || high.numel() == 0;
        }
        let distance = high.offset - low.offset;
        // Of the dimensions with smaller strides than the distance, the lower one ends before the upper one starts.
        let (mut reach_low, mut reach) = (0_u64, distance);
        let mut outer = [(0_u64, 0_usize); MAX_RANK];
        let mut count = 0;
        for ((low_size, low_stride), (high_size, high_stride)) in low.dims().zip(high.dims()) {
            let stride = if low_size > 1 { low_stride } else { high_stride };
            if low_size > 1 && high_size > 1 && low_stride != high_stride {
                return false;
            }
            if low_size.max(high_size) == 1 {
                continue;
            }
            if stride <= distance {
                reach_low += stride * (low_size as u64 - 1);
                reach += stride * (high_size as u64 - 1);
            } else {
                outer[count] = (stride, low_size.max(high_size));
                count += 1;
            }
        }
        let outer = &mut outer[..count];
        outer.sort_unstable();
        reach_low < distance
            && outer.iter().all(|&(stride, size)| {
                let steps_over = stride > reach;
                reach = reach.saturating_add(stride.saturating_mul(size as u64 - 1));
                steps_over
            })
    }

    /// The view with its dimensions in another order: dimension `i` of the result is dimension `order[i]` of this one.
    ///
    /// # Errors
    /// [`Error::View`] if `order` is not a permutation of the dimensions.
    pub fn permute(&self, order: &[usize]) -> Result<Self> {
        let mut seen = [false; MAX_RANK];
        let valid = order.len() == self.rank
            && order.iter().all(|&dim| dim < self.rank && !std::mem::replace(&mut seen[dim], true));
        if !valid {
            return Err(Error::View {
                argument: "order",
                expected: format!("a permutation of 0..{}", self.rank),
                got: format!("{order:?}"),
            });
        }
        let mut permuted = *self;
        for (to, &from) in order.iter().enumerate() {
            permuted.shape[to] = self.shape[from];
            permuted.strides[to] = self.strides[from];
        }
        Ok(permuted)
    }

    /// The part of the view with `range` in dimension `dim`.
    ///
    /// # Errors
    /// [`Error::View`] if the dimension or the range does not exist.
    pub fn slice(&self, dim: usize, range: Range<usize>) -> Result<Self> {
        if dim >= self.rank || range.start > range.end || range.end > self.shape[dim] {
            return Err(Error::View {
                argument: "range",
                expected: format!("a range inside a dimension of shape {:?}", self.shape()),
                got: format!("{range:?} of dimension {dim}"),
            });
        }
        let mut sliced = *self;
        sliced.shape[dim] = range.len();
        // An empty view keeps its offset: nothing is read, and the position may lie past the memory.
        if !range.is_empty() {
            sliced.offset += range.start as u64 * self.strides[dim];
        }
        Ok(sliced)
    }

    fn dims(&self) -> impl DoubleEndedIterator<Item = (usize, u64)> + '_ {
        self.shape().iter().copied().zip(self.strides().iter().copied())
    }
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} strides {:?} offset {}", self.shape(), self.strides(), self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_of_nothing_do_not_count() -> Result<()> {
        // NumPy gives such tensors strides of 0.
        for (shape, strides) in [(&[2, 0, 1, 8][..], &[0, 0, 0, 1][..]), (&[5, 0], &[0, 0]), (&[0], &[7])] {
            let layout = Layout::strided(shape, strides, 3)?;
            assert!(!layout.self_overlaps() && layout.is_contiguous(), "{layout:?}");
            assert_eq!((layout.numel(), layout.end()), (0, 3));
        }
        Ok(())
    }

    #[test]
    fn rows_are_found_at_any_strides() -> Result<()> {
        let memory: Vec<u8> = (0..24).collect();
        let gathered = |layout: &Layout| {
            let mut rows = vec![0; layout.numel()];
            layout.for_each_row(1, |strided, dense| rows[dense].copy_from_slice(&memory[strided]));
            rows
        };
        let turned = Layout::contiguous(&[2, 3, 4])?.permute(&[1, 0, 2])?;
        let expected: Vec<u8> = (0..3).flat_map(|row| [row * 4, 12 + row * 4]).flat_map(|at| at..at + 4).collect();
        assert_eq!(gathered(&turned), expected);
        assert_eq!(gathered(&Layout::strided(&[4, 3], &[1, 4], 5)?), [5, 9, 13, 6, 10, 14, 7, 11, 15, 8, 12, 16]);
        assert_eq!(gathered(&Layout::strided(&[2, 1], &[3, 7], 1)?), [1, 4]);
        assert_eq!(gathered(&Layout::strided(&[3], &[0], 0)?), [0, 0, 0]);
        assert!(gathered(&Layout::contiguous(&[2, 0, 4])?).is_empty());
        let mut bytes = Vec::new();
        Layout::strided(&[2, 3], &[5, 1], 2)?.for_each_row(4, |strided, dense| bytes.push((strided, dense)));
        assert_eq!(bytes, [(8..20, 0..12), (28..40, 12..24)]);
        Ok(())
    }

    #[test]
    fn layouts_that_take_turns_share_no_position() -> Result<()> {
        let fused = Layout::contiguous(&[2, 5, 12, 8])?;
        let (q, k, v) = (fused.slice(2, 0..6)?, fused.slice(2, 6..9)?, fused.slice(2, 9..12)?);
        assert!(q.interleaves(&k) && k.interleaves(&q) && q.interleaves(&v) && v.interleaves(&k));
        assert!(!q.interleaves(&fused) && !q.interleaves(&q) && !q.interleaves(&fused.slice(2, 5..9)?));
        let (text, image) = (fused.slice(1, 0..2)?, fused.slice(1, 2..5)?);
        assert!(text.interleaves(&image) && image.interleaves(&text) && !text.interleaves(&fused.slice(1, 1..5)?));
        // Of one batch row and one head, whose strides do not count.
        let [first, second] = [0, 9].map(|offset| Layout::strided(&[1, 5, 1, 8], &[offset, 24, 3, 1], offset));
        assert!(first?.interleaves(&second?));
        // With other strides: not told.
        assert!(!q.interleaves(&Layout::strided(&[2, 5, 3, 8], &[960, 96, 16, 1], 48)?));
        // By every pair of positions.
        let positions = |layout: &Layout| -> std::collections::HashSet<u64> {
            let (shape, strides) = (layout.shape().to_vec(), layout.strides().to_vec());
            let all = shape.iter().product::<usize>();
            let at = |mut rest: usize| {
                let mut position = layout.offset();
                for (&size, &stride) in shape.iter().zip(&strides).rev() {
                    position += (rest % size) as u64 * stride;
                    rest /= size;
                }
                position
            };
            (0..all).map(at).collect()
        };
        let mut told = 0;
        for (sizes, stride) in [([2, 3], 4), ([3, 2], 5), ([1, 4], 9), ([2, 1], 2)] {
            for offset in 0..24 {
                for others in [[2, 3], [1, 2], [3, 4]] {
                    let low = Layout::strided(&[sizes[0], sizes[1], 2], &[20, stride, 1], 3)?;
                    let high = Layout::strided(&[others[0], others[1], 2], &[20, stride, 1], offset)?;
                    if !low.self_overlaps() && !high.self_overlaps() && low.interleaves(&high) {
                        told += 1;
                        assert!(positions(&low).is_disjoint(&positions(&high)), "{low:?}, {high:?}");
                    }
                }
            }
        }
        assert!(told > 20, "{told}");
        Ok(())
    }

    #[test]
    fn a_size_of_zero_makes_any_other_fit() -> Result<()> {
        let layout = Layout::strided(&[1 << 40, 1 << 40, 0], &[0, 0, 1], 0)?;
        assert!(layout.numel() == 0 && layout.end() == 0 && layout.is_contiguous());
        Ok(())
    }

    #[test]
    fn slices_of_a_fused_projection_stay_inside_it() -> Result<()> {
        let qkv = Layout::contiguous(&[2, 5, 12, 8])?;
        let v = qkv.slice(2, 8..12)?;
        assert_eq!(v.shape(), [2, 5, 4, 8]);
        assert_eq!(v.offset(), 64);
        assert_eq!(v.end(), qkv.end());
        assert!(!v.is_contiguous() && !v.self_overlaps());
        Ok(())
    }

    #[test]
    fn broadcast_strides_overlap_and_permuted_ones_do_not() -> Result<()> {
        assert!(Layout::strided(&[2, 3], &[0, 1], 0)?.self_overlaps());
        assert!(Layout::strided(&[2, 3], &[2, 1], 0)?.self_overlaps());
        assert!(!Layout::contiguous(&[2, 4, 6, 8])?.permute(&[0, 2, 1, 3])?.self_overlaps());
        Ok(())
    }

    #[test]
    fn sizes_past_the_address_space_are_errors() {
        assert!(matches!(Layout::contiguous(&[usize::MAX, 2, 2, 8]), Err(Error::TooLarge { .. })));
        assert!(matches!(Layout::strided(&[2], &[u64::MAX], 1), Err(Error::TooLarge { .. })));
        assert!(matches!(Layout::contiguous(&[1; 5]), Err(Error::Rank { got: 5, .. })));
        assert!(matches!(Layout::contiguous(&[]), Err(Error::Rank { got: 0, .. })));
    }

    #[test]
    fn empty_views_have_no_extent() -> Result<()> {
        let empty = Layout::contiguous(&[2, 0, 4, 8])?;
        assert_eq!((empty.numel(), empty.end()), (0, 0));
        Ok(())
    }
}
