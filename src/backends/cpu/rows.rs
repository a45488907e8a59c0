//! Rows of tensors as f32, and panels of rows: transposed, so that rows lie side by side in SIMD lanes.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::dtype::Element;

/// An element type with conversions of whole rows.
pub(super) trait RowElement: Element {
    /// The row as f32: itself, or converted to `scratch`, which is as long.
    fn widen<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
    /// Rounds a row to one of the same length.
    fn narrow(row: &[f32], to: &mut [Self]);
}

impl RowElement for f32 {
    #[inline(always)]
    fn widen<'a>(row: &'a [Self], _: &'a mut [f32]) -> &'a [f32] {
        row
    }

    #[inline(always)]
    fn narrow(row: &[f32], to: &mut [Self]) {
        to.copy_from_slice(row);
    }
}

impl RowElement for f16 {
    #[inline(always)]
    fn widen<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        row.convert_to_f32_slice(scratch);
        scratch
    }

    #[inline(always)]
    fn narrow(row: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(row);
    }
}

// Loops that the compiler makes SIMD code of where it may; `half` converts bf16 one by one.
impl RowElement for bf16 {
    #[inline(always)]
    fn widen<'a>(row: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        for (to, from) in scratch.iter_mut().zip(row) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
        scratch
    }

    #[inline(always)]
    fn narrow(row: &[f32], to: &mut [Self]) {
        for (to, from) in to.iter_mut().zip(row) {
            *to = Self::from_f32(*from);
        }
    }
}

/// Rows that [`to_panel`] and [`from_panel`] move together.
pub(super) const ROW_BLOCK: usize = 4;

/// Transposes rows of length `len` to a panel `[len][width]`. `rows` holds `width` rows; `scratch`, `ROW_BLOCK · len` elements.
///
/// Four rows are interleaved first, which the compiler does with shuffles, and then stored 16 bytes at a time: twice as fast as
/// element by element.
#[inline(always)]
pub(super) fn to_panel(rows: &[f32], len: usize, panel: &mut [f32], width: usize, scratch: &mut [f32]) {
    let interleaved = &mut scratch.as_chunks_mut::<ROW_BLOCK>().0[..len];
    let blocks = rows.chunks_exact(ROW_BLOCK * len);
    let first_single = width / ROW_BLOCK * ROW_BLOCK;
    for (lane, row) in blocks.remainder().chunks_exact(len).enumerate() {
        for (panel, &x) in panel.chunks_exact_mut(width).zip(row) {
            panel[first_single + lane] = x;
        }
    }
    for (block, rows) in blocks.enumerate() {
        let rows: [&[f32]; ROW_BLOCK] = std::array::from_fn(|row| &rows[row * len..][..len]);
        for i in 0..len {
            interleaved[i] = std::array::from_fn(|row| rows[row][i]);
        }
        for (panel, four) in panel.chunks_exact_mut(width).zip(&*interleaved) {
            panel[block * ROW_BLOCK..][..ROW_BLOCK].copy_from_slice(four);
        }
    }
}

/// The inverse of [`to_panel`].
#[inline(always)]
pub(super) fn from_panel(panel: &[f32], width: usize, rows: &mut [f32], len: usize, scratch: &mut [f32]) {
    let interleaved = &mut scratch.as_chunks_mut::<ROW_BLOCK>().0[..len];
    let first_single = width / ROW_BLOCK * ROW_BLOCK;
    let mut blocks = rows.chunks_exact_mut(ROW_BLOCK * len);
    for (block, rows) in blocks.by_ref().enumerate() {
        for (panel, four) in panel.chunks_exact(width).zip(&mut *interleaved) {
            four.copy_from_slice(&panel[block * ROW_BLOCK..][..ROW_BLOCK]);
        }
        for (row, to) in rows.chunks_exact_mut(len).enumerate() {
            for (to, four) in to.iter_mut().zip(&*interleaved) {
                *to = four[row];
            }
        }
    }
    for (lane, row) in blocks.into_remainder().chunks_exact_mut(len).enumerate() {
        for (to, panel) in row.iter_mut().zip(panel.chunks_exact(width)) {
            *to = panel[first_single + lane];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_come_back_as_they_went() {
        for width in [1, 3, 4, 16, 23] {
            for len in [1, 5, 8, 64] {
                let rows: Vec<f32> = (0..width * len).map(|i| i as f32).collect();
                let mut panel = vec![f32::NAN; width * len];
                let mut scratch = vec![f32::NAN; ROW_BLOCK * len];
                to_panel(&rows, len, &mut panel, width, &mut scratch);
                assert!((0..width * len).all(|i| panel[i] == rows[i % width * len + i / width]), "{width} {len}");
                let mut back = vec![f32::NAN; width * len];
                from_panel(&panel, width, &mut back, len, &mut scratch);
                assert_eq!(back, rows);
            }
        }
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
