//! Rows of tensors as f32, and panels of rows: transposed, so that rows lie side by side in SIMD
//! lanes.

use half::{bf16, f16};

use super::half_rows;
use crate::dtype::Element;

/// An element type with conversions of whole rows.
pub(super) trait RowElement: Element {
    /// The row as f32: itself, or converted to `scratch`, which is as long.
    fn widen<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
    /// Converts the row to another of the same length.
    fn widen_into(row: &[Self], to: &mut [f32]);
    /// Rounds a row to one of the same length.
    fn narrow(row: &[f32], to: &mut [Self]);
}

impl RowElement for f32 {
    #[inline(always)]
    fn widen<'a>(row: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        row
    }

    #[inline(always)]
    fn widen_into(row: &[Self], to: &mut [f32]) {
        to.copy_from_slice(row);
    }

    #[inline(always)]
    fn narrow(row: &[f32], to: &mut [Self]) {
        to.copy_from_slice(row);
    }
}

impl RowElement for f16 {
    #[inline(always)]
    fn widen<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        Self::widen_into(row, scratch);
        scratch
    }

    #[inline(always)]
    fn widen_into(row: &[Self], to: &mut [f32]) {
        half_rows::widen(row, to);
    }

    #[inline(always)]
    fn narrow(row: &[f32], to: &mut [Self]) {
        half_rows::narrow(row, to);
    }
}

// Loops that the compiler makes SIMD code of where it may; `half` converts bf16 one by one.
impl RowElement for bf16 {
    #[inline(always)]
    fn widen<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        Self::widen_into(row, scratch);
        scratch
    }

    #[inline(always)]
    fn widen_into(row: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(row) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }

    #[inline(always)]
    fn narrow(row: &[f32], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(row) {
            *to = round_to_bf16(*from);
        }
    }
}

/// To the nearest, ties to even, without a branch.
#[inline(always)]
fn round_to_bf16(from: f32) -> bf16 {
    let bits = from.to_bits();
    // A carry out of the mantissa is the next exponent; the largest finite values become infinite.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // Rounded, a NaN could become infinite; bit 6 keeps it one.
    let bits = if from.is_nan() { bits | 1 << 22 } else { rounded };
    bf16::from_bits((bits >> 16) as u16)
}

/// Asks for a row to be fetched to the second-level cache: rows of a head lie far apart, which the
/// processor does not foresee.
#[inline(always)]
pub(super) fn prefetch<T>(row: &[T]) {
    /// Bytes of a cache line, or a divisor of it.
    const LINE: usize = 64;
    for line in row.chunks((LINE / size_of::<T>()).max(1)) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch has no effect on memory, at any address; SSE is part of x86-64.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.as_ptr().cast());
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: a prefetch has no effect on memory, at any address.
        unsafe {
            std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) line.as_ptr(), options(nostack, readonly, preserves_flags));
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let _ = line;
    }
}

/// Rows and columns of the pieces that are transposed in registers.
const SQUARE: usize = 4;

/// Transposes `N` rows, from 4 to 8, of a length that is a multiple of 4 to a block `[len][N]`.
#[inline(always)]
pub(super) fn to_block<const N: usize>(rows: [&[f32]; N], block: &mut [f32]) {
    const { assert!(N > SQUARE && N <= 2 * SQUARE) };
    let rows = rows.map(|row| row.as_chunks::<SQUARE>().0);
    let count = rows.iter().map(|row| row.len()).min().unwrap_or(0);
    let pieces = block.as_chunks_mut::<N>().0.as_chunks_mut::<SQUARE>().0;
    let rows = rows.map(|row| &row[..count]);
    for (i, piece) in pieces[..count].iter_mut().enumerate() {
        let low = transposed(std::array::from_fn(|n| rows[n][i]));
        let high = transposed(std::array::from_fn(|n| rows[(SQUARE + n).min(N - 1)][i]));
        for ((to, low), high) in piece.iter_mut().zip(low).zip(high) {
            to[..SQUARE].copy_from_slice(&low);
            to[SQUARE..].copy_from_slice(&high[..N - SQUARE]);
        }
    }
}

/// Transposes rows of length `len` to a panel `[len][width]`. `rows` holds `width` rows.
#[inline(always)]
pub(super) fn to_panel(rows: &[f32], len: usize, panel: &mut [f32], width: usize) {
    let fours = rows.chunks_exact(SQUARE * len);
    let (first_single, whole) = (width / SQUARE * SQUARE, len / SQUARE * SQUARE);
    for (lane, row) in fours.remainder().chunks_exact(len).enumerate() {
        for (panel, &x) in panel.chunks_exact_mut(width).zip(row) {
            panel[first_single + lane] = x;
        }
    }
    for (four, rows) in fours.enumerate() {
        let rows: [&[f32]; SQUARE] = std::array::from_fn(|row| &rows[row * len..][..len]);
        let squares = rows.map(|row| row.as_chunks::<SQUARE>().0);
        let mut panel = panel.chunks_exact_mut(width);
        for i in (0..whole).step_by(SQUARE) {
            for column in transposed(squares.map(|row| row[i / SQUARE])) {
                let Some(panel) = panel.next() else { return };
                panel[four * SQUARE..][..SQUARE].copy_from_slice(&column);
            }
        }
        for (i, panel) in (whole..len).zip(panel) {
            panel[four * SQUARE..][..SQUARE].copy_from_slice(&rows.map(|row| row[i]));
        }
    }
}

/// The inverse of [`to_panel`].
#[inline(always)]
pub(super) fn from_panel(panel: &[f32], width: usize, rows: &mut [f32], len: usize) {
    let (first_single, whole) = (width / SQUARE * SQUARE, len / SQUARE * SQUARE);
    let mut fours = rows.chunks_exact_mut(SQUARE * len);
    for (four, rows) in fours.by_ref().enumerate() {
        let mut panel = panel.chunks_exact(width).map(|panel| &panel[four * SQUARE..][..SQUARE]);
        for i in (0..whole).step_by(SQUARE) {
            let mut square = [[0.0; SQUARE]; SQUARE];
            for (column, panel) in square.iter_mut().zip(panel.by_ref()) {
                column.copy_from_slice(panel);
            }
            for (row, to) in transposed(square).iter().zip(rows.chunks_exact_mut(len)) {
                to[i..][..SQUARE].copy_from_slice(row);
            }
        }
        for (i, panel) in (whole..len).zip(panel) {
            for (to, &x) in rows.chunks_exact_mut(len).zip(panel) {
                to[i] = x;
            }
        }
    }
    for (lane, row) in fours.into_remainder().chunks_exact_mut(len).enumerate() {
        for (to, panel) in row.iter_mut().zip(panel.chunks_exact(width)) {
            *to = panel[first_single + lane];
        }
    }
}

/// ```text
///    a0 a1 a2 a3         a0 b0 c0 d0
///    b0 b1 b2 b3    ->   a1 b1 c1 d1
///    c0 c1 c2 c3         a2 b2 c2 d2
///    d0 d1 d2 d3         a3 b3 c3 d3
/// ```
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transposed([a, b, c, d]: [[f32; SQUARE]; SQUARE]) -> [[f32; SQUARE]; SQUARE] {
    use std::arch::x86_64::{__m128, _mm_movehl_ps, _mm_movelh_ps, _mm_unpackhi_ps, _mm_unpacklo_ps};

    #[inline]
    #[target_feature(enable = "sse")]
    fn shuffled(a: __m128, b: __m128, c: __m128, d: __m128) -> [__m128; SQUARE] {
        let (ab01, ab23) = (_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        let (cd01, cd23) = (_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        [_mm_movelh_ps(ab01, cd01), _mm_movehl_ps(cd01, ab01), _mm_movelh_ps(ab23, cd23), _mm_movehl_ps(cd23, ab23)]
    }
    let (a, b, c, d) = (bytemuck::cast(a), bytemuck::cast(b), bytemuck::cast(c), bytemuck::cast(d));
    // SAFETY: SSE is part of x86-64.
    bytemuck::cast(unsafe { shuffled(a, b, c, d) })
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn transposed([a, b, c, d]: [[f32; SQUARE]; SQUARE]) -> [[f32; SQUARE]; SQUARE] {
    std::array::from_fn(|i| [a[i], b[i], c[i], d[i]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_come_back_as_they_went() {
        for width in [1, 3, 4, 16, 23] {
            for len in [1, 4, 5, 8, 11, 64] {
                let rows: Vec<f32> = (0..width * len).map(|i| i as f32).collect();
                let mut panel = vec![f32::NAN; width * len];
                to_panel(&rows, len, &mut panel, width);
                assert!((0..width * len).all(|i| panel[i] == rows[i % width * len + i / width]), "{width} {len}");
                let mut back = vec![f32::NAN; width * len];
                from_panel(&panel, width, &mut back, len);
                assert_eq!(back, rows);
            }
        }
    }

    #[test]
    fn blocks_hold_rows_side_by_side() {
        fn check<const N: usize>() {
            for len in [4, 8, 64] {
                let rows: [Vec<f32>; N] = std::array::from_fn(|n| (0..len).map(|i| (n * len + i) as f32).collect());
                let mut block = vec![f32::NAN; N * len];
                to_block(rows.each_ref().map(|row| &row[..]), &mut block);
                assert!((0..N * len).all(|at| block[at] == rows[at % N][at / N]), "{N} rows of {len}: {block:?}");
            }
        }
        check::<6>();
        check::<8>();
    }

    #[test]
    fn bf16_rows_convert_as_elements_do() {
        let every: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let mut wide = vec![0.0; every.len()];
        let wide = bf16::widen(&every, &mut wide);
        let mut back = vec![bf16::ZERO; every.len()];
        bf16::narrow(wide, &mut back);
        for ((&from, &wide), &back) in every.iter().zip(wide).zip(&back) {
            if from.is_nan() {
                assert!(wide.is_nan() && back.is_nan());
            } else {
                assert_eq!((wide.to_bits(), back.to_bits()), (from.to_f32().to_bits(), from.to_bits()));
            }
        }
    }
}
