//! A copy of a strided view to another one, mostly row-major memory, or back, as few rectangles.

use crate::backends::cuda::driver::transfer::Rectangle;
use crate::layout::Layout;

/// Largest distance between the rows of one rectangle (`CU_DEVICE_ATTRIBUTE_MAX_PITCH` of every
/// device).
const MAX_PITCH: u64 = i32::MAX as u64;

/// A dimension of size above 1, in bytes.
#[derive(Debug, Clone, Copy)]
struct Step {
    count: u64,
    from: u64,
    to: u64,
}

/// A copy of a strided view to another one as few rectangles.
#[derive(Debug)]
pub struct StridedCopy {
    width: u64,
    rows: Step,
    /// One rectangle for each combination of these.
    outer: Vec<Step>,
}

impl StridedCopy {
    /// For a view that is not empty and whose last dimension is contiguous, as in the other view,
    /// whose strides are `to_strides`. Both have the view's shape: what else the other one's rows
    /// hold stays as it is.
    pub fn new(layout: &Layout, to_strides: &[u64], element_bytes: u64) -> Self {
        let dims = layout.shape().iter().zip(layout.strides()).zip(to_strides);
        let bytes = |stride: u64| stride * element_bytes;
        let mut dims = dims.map(|((&size, &from), &to)| (size as u64, bytes(from), bytes(to))).rev();
        let mut width = dims.next().map_or(1, |(size, ..)| size) * element_bytes;
        let mut steps: Vec<Step> = Vec::new();
        for (count, from, to) in dims.filter(|&(count, ..)| count > 1) {
            // A dimension that continues the one inside it becomes part of that.
            match steps.last_mut() {
                None if [from, to] == [width; 2] => width *= count,
                Some(inner) if [from, to] == [inner.from, inner.to].map(|step| step * inner.count) => {
                    inner.count *= count;
                }
                _ => steps.push(Step { count, from, to }),
            }
        }
        // The driver copies rows that do not overlap and are not too far apart.
        let fits = |step: &Step| step.from >= width && step.from <= MAX_PITCH && step.to <= MAX_PITCH;
        let longest = (0..steps.len()).filter(|&i| fits(&steps[i])).max_by_key(|&i| steps[i].count);
        let rows = longest.map_or(Step { count: 1, from: width, to: width }, |i| steps.remove(i));
        Self { width, rows, outer: steps }
    }

    pub fn rectangles(&self, from: u64, to: u64) -> impl Iterator<Item = Rectangle> + '_ {
        let count: u64 = self.outer.iter().map(|step| step.count).product();
        (0..count).map(move |index| {
            let (mut rest, mut from, mut to) = (index, from, to);
            for step in &self.outer {
                from += rest % step.count * step.from;
                to += rest % step.count * step.to;
                rest /= step.count;
            }
            let Step { count: rows, from: from_pitch, to: to_pitch } = self.rows;
            Rectangle { from, to, width: self.width, rows, from_pitch, to_pitch }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Result;

    /// Runs a copy on host memory; returns the result and the number of rectangles.
    fn run(layout: &Layout, memory: &[u8], element_bytes: u64) -> (Vec<u8>, usize) {
        let width = layout.shape().last().map_or(1, |&size| size as u64) * element_bytes;
        run_to(layout, memory, element_bytes, width)
    }

    /// The same to rows of `to_width` bytes.
    fn run_to(layout: &Layout, memory: &[u8], element_bytes: u64, to_width: u64) -> (Vec<u8>, usize) {
        let heads = layout.numel() / layout.shape().last().copied().unwrap_or(1);
        let mut copied = vec![0xff; heads * to_width as usize];
        let to_strides = row_major(layout.shape(), to_width / element_bytes);
        let copy = StridedCopy::new(layout, &to_strides, element_bytes);
        let rectangles: Vec<_> = copy.rectangles(layout.offset() * element_bytes, 0).collect();
        for Rectangle { from, to, width, rows, from_pitch, to_pitch } in &rectangles {
            for row in 0..*rows {
                let (from, to) = ((from + row * from_pitch) as usize, (to + row * to_pitch) as usize);
                copied[to..][..*width as usize].copy_from_slice(&memory[from..][..*width as usize]);
            }
        }
        (copied, rectangles.len())
    }

    /// The strides of a row-major tensor with so many elements from one head to the next.
    fn row_major(shape: &[usize], width: u64) -> Vec<u64> {
        let mut strides = vec![1; shape.len()];
        let mut step = width;
        for dim in (0..shape.len() - 1).rev() {
            strides[dim] = step;
            step *= shape[dim] as u64;
        }
        strides
    }

    fn naive(layout: &Layout, memory: &[u8], element_bytes: usize) -> Vec<u8> {
        let (shape, strides) = (layout.shape(), layout.strides());
        let mut bytes = Vec::new();
        for index in 0..layout.numel() {
            let (mut rest, mut position) = (index, layout.offset() as usize);
            for (&size, &stride) in shape.iter().zip(strides).rev() {
                position += rest % size * stride as usize;
                rest /= size;
            }
            bytes.extend_from_slice(&memory[position * element_bytes..][..element_bytes]);
        }
        bytes
    }

    #[test]
    fn strided_copies_gather_every_row_in_few_rectangles() -> Result<()> {
        let memory: Vec<u8> = (0..20_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for (shape, strides, offset, most) in [
            // Row-major at an odd offset, rows apart, heads outside the sequence, a broadcast batch
            // row, packed rows, sizes of one.
            (&[2, 6, 4, 16][..], &[384, 64, 16, 1][..], 1, 1),
            (&[2, 6, 4, 16], &[408, 68, 17, 1], 0, 1),
            (&[2, 6, 4, 16], &[408, 17, 102, 1], 3, 8),
            (&[2, 6, 4, 16], &[0, 68, 17, 1], 0, 2),
            (&[5, 3, 8], &[31, 9, 1], 7, 3),
            (&[1, 1, 1, 8], &[3, 5, 7, 1], 1, 1),
        ] {
            let layout = Layout::strided(shape, strides, offset)?;
            for element_bytes in [2, 4] {
                let (copied, rectangles) = run(&layout, &memory, element_bytes);
                let expected = naive(&layout, &memory, element_bytes as usize);
                assert_eq!(copied, expected, "{layout:?}");
                assert!(rectangles <= most, "{layout:?}: {rectangles} rectangles");
                // Wider rows, whose ends are left alone.
                let width = shape.last().map_or(0, |&size| size as u64 * element_bytes);
                let gap = 3 * element_bytes;
                let (copied, rectangles) = run_to(&layout, &memory, element_bytes, width + gap);
                let wide = copied.chunks((width + gap) as usize).map(|row| row.split_at(width as usize));
                let (rows, ends): (Vec<_>, Vec<_>) = wide.unzip();
                assert_eq!(rows.concat(), expected, "{layout:?}");
                assert!(ends.concat().iter().all(|&byte| byte == 0xff), "{layout:?}");
                assert!(rectangles <= 8, "{layout:?}: {rectangles} rectangles");
            }
        }
        Ok(())
    }

    #[test]
    fn steps_past_the_largest_pitch_are_rectangles_of_their_own() -> Result<()> {
        let layout = Layout::strided(&[3, 8], &[1 << 31, 1], 1)?;
        let rectangles: Vec<_> = StridedCopy::new(&layout, &[8, 1], 2).rectangles(2, 0).collect();
        let far = |row: u64| Rectangle {
            from: 2 + (row << 32),
            to: row * 16,
            width: 16,
            rows: 1,
            from_pitch: 16,
            to_pitch: 16,
        };
        assert_eq!(rectangles, [far(0), far(1), far(2)]);
        Ok(())
    }
}
