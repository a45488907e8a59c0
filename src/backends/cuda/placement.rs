//! Where the tensors of an operation lie, and aligned copies of inputs that lie at odd places.

use crate::backends::rows::{WORD_BYTES, misaligned_by, row_strides};
use crate::call::op::{Input, Output};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::Layout;

use super::device::CudaDevice;
use super::memory::CudaBuffer;
use super::params::Strides;

/// Largest distance between the rows of one copy (`CU_DEVICE_ATTRIBUTE_MAX_PITCH` of every device).
const MAX_PITCH: u64 = i32::MAX as u64;

/// A tensor of an operation: `[B, S, H, D]`, packed `[n, H, D]`, or any shape where only its address matters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand<'a> {
    pub name: &'static str,
    pub buffer: &'a CudaBuffer,
    pub layout: Layout,
    pub dtype: DType,
}

/// Where the rows of a tensor lie. The first is at a multiple of 16 bytes, and so is every step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placed {
    pub address: u64,
    /// In elements; packed tensors have no batch rows.
    pub strides: Strides,
    element_bytes: u64,
}

impl Placed {
    /// A contiguous packed tensor at an address, which is a multiple of 16 bytes.
    pub fn packed(address: u64, heads: usize, head_dim: usize, dtype: DType) -> Self {
        // Both fit: rows of a tensor do.
        let strides = Strides { batch: 0, token: (heads * head_dim) as i64, head: head_dim as i64 };
        Self { address, strides, element_bytes: dtype.size() as u64 }
    }

    /// The strides in words.
    pub fn word_strides(&self) -> Strides {
        let words = |elements: i64| elements * self.element_bytes as i64 / WORD_BYTES as i64;
        let Strides { batch, token, head } = self.strides;
        Strides { batch: words(batch), token: words(token), head: words(head) }
    }
}

impl Operand<'_> {
    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.buffer.address() + self.bytes(self.layout.offset())
    }

    fn bytes(&self, elements: u64) -> u64 {
        elements * self.dtype.size() as u64
    }

    /// What keeps the rows from starting at words, in bytes; nothing if there are none.
    fn misaligned_by(&self) -> Option<u64> {
        let by = || misaligned_by(self.buffer.address(), &self.layout, self.dtype.size());
        if self.layout.numel() == 0 { None } else { by() }
    }

    /// Elements are read and written whole, so they must lie at multiples of their size; memory of the caller need not start at
    /// one.
    fn with_whole_elements(self) -> Result<Self> {
        let (address, expected) = (self.address(), self.dtype.size() as u64);
        if self.layout.numel() == 0 || address.is_multiple_of(expected) {
            return Ok(self);
        }
        Err(Error::Misaligned { argument: self.name, expected, got: address })
    }

    fn placed(&self) -> Placed {
        Placed { address: self.address(), strides: strides(&self.layout), element_bytes: self.dtype.size() as u64 }
    }

    /// Where to write.
    pub fn place_output(&self) -> Result<Placed> {
        match self.misaligned_by() {
            None => Ok(self.placed()),
            Some(got) => Err(Error::Misaligned { argument: self.name, expected: WORD_BYTES, got }),
        }
    }
}

fn strides(layout: &Layout) -> Strides {
    // Every stride fits: layouts end below an eighth of the range.
    let [batch, token, head] = row_strides(layout).map(|stride| stride as i64);
    Strides { batch, token, head }
}

impl CudaDevice {
    pub(super) fn input<'a>(&self, name: &'static str, input: &Input<'a>) -> Result<Operand<'a>> {
        Operand { name, buffer: self.source(input.memory)?, layout: input.layout, dtype: input.dtype }
            .with_whole_elements()
    }

    pub(super) fn output<'a>(&self, name: &'static str, output: &Output<'a>) -> Result<Operand<'a>> {
        Operand { name, buffer: self.sink(&output.memory)?, layout: output.layout, dtype: output.dtype }
            .with_whole_elements()
    }

    /// Where to read. A view whose rows do not start at words is first copied to scratch that lives until the launch.
    pub(super) fn place_input(&self, operand: &Operand<'_>, scratch: &mut Vec<CudaBuffer>) -> Result<Placed> {
        match operand.misaligned_by() {
            None => Ok(operand.placed()),
            Some(_) => self.place_copy(operand, scratch),
        }
    }

    /// The same for the copy engine, which is only told of steps that lead somewhere: a view with a stride of 0 is copied too.
    pub(super) fn place_input_for_maps(&self, operand: &Operand<'_>, scratch: &mut Vec<CudaBuffer>) -> Result<Placed> {
        let mut dims = operand.layout.shape().iter().zip(operand.layout.strides());
        match dims.any(|(&size, &stride)| size > 1 && stride == 0) {
            false => self.place_input(operand, scratch),
            true => self.place_copy(operand, scratch),
        }
    }

    fn place_copy(&self, operand: &Operand<'_>, scratch: &mut Vec<CudaBuffer>) -> Result<Placed> {
        let (layout, element_bytes) = (&operand.layout, operand.dtype.size() as u64);
        let copy = self.scratch(operand.bytes(layout.numel() as u64))?;
        for rectangle in StridedCopy::new(layout, element_bytes).rectangles(operand.address(), copy.address()) {
            // SAFETY: the rectangles cover the view, which lies inside its buffer (checked by problem), and the scratch, which
            // is as large.
            unsafe { self.context.copy(&rectangle) }?;
        }
        let row_major = Layout::contiguous(layout.shape())?;
        let placed = Placed { address: copy.address(), strides: strides(&row_major), element_bytes };
        scratch.push(copy);
        Ok(placed)
    }
}

/// Rows of bytes to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rectangle {
    /// Addresses of the first row.
    pub from: u64,
    pub to: u64,
    /// Bytes of a row.
    pub width: u64,
    pub rows: u64,
    /// Bytes from row to row.
    pub from_pitch: u64,
    pub to_pitch: u64,
}

/// A dimension that is stepped over, in bytes.
#[derive(Debug, Clone, Copy)]
struct Step {
    count: u64,
    from: u64,
    to: u64,
}

/// A copy of a strided view to row-major memory as few rectangles.
#[derive(Debug)]
struct StridedCopy {
    width: u64,
    rows: Step,
    /// One rectangle for each combination of these.
    outer: Vec<Step>,
}

impl StridedCopy {
    /// The view is not empty, and its last dimension is contiguous.
    fn new(layout: &Layout, element_bytes: u64) -> Self {
        let dims = layout.shape().iter().zip(layout.strides());
        let mut dims = dims.map(|(&size, &stride)| (size as u64, stride * element_bytes)).rev();
        let mut width = dims.next().map_or(1, |(size, _)| size) * element_bytes;
        let mut steps: Vec<Step> = Vec::new();
        let mut to = width;
        for (count, from) in dims.filter(|&(count, _)| count > 1) {
            // Dimensions that continue the one inside them become part of it.
            match steps.last_mut() {
                None if from == width => width *= count,
                Some(inner) if from == inner.from * inner.count => inner.count *= count,
                _ => steps.push(Step { count, from, to }),
            }
            to *= count;
        }
        // The driver copies rows that do not overlap and are not too far apart.
        let fits = |step: &Step| step.from >= width && step.from <= MAX_PITCH && step.to <= MAX_PITCH;
        let longest = (0..steps.len()).filter(|&i| fits(&steps[i])).max_by_key(|&i| steps[i].count);
        let rows = longest.map_or(Step { count: 1, from: width, to: width }, |i| steps.remove(i));
        Self { width, rows, outer: steps }
    }

    fn rectangles(&self, from: u64, to: u64) -> impl Iterator<Item = Rectangle> + '_ {
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

    /// Runs a copy on host memory, from byte 0 to byte 0; gives the result and the number of rectangles.
    fn run(layout: &Layout, memory: &[u8], element_bytes: u64) -> (Vec<u8>, usize) {
        let mut copied = vec![0xff; layout.numel() * element_bytes as usize];
        let rectangles: Vec<_> =
            StridedCopy::new(layout, element_bytes).rectangles(layout.offset() * element_bytes, 0).collect();
        for Rectangle { from, to, width, rows, from_pitch, to_pitch } in &rectangles {
            for row in 0..*rows {
                let (from, to) = ((from + row * from_pitch) as usize, (to + row * to_pitch) as usize);
                copied[to..][..*width as usize].copy_from_slice(&memory[from..][..*width as usize]);
            }
        }
        (copied, rectangles.len())
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
            // Row-major at an odd place, rows apart, heads outside the sequence, a broadcast batch row, packed rows, sizes of one.
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
                assert_eq!(copied, naive(&layout, &memory, element_bytes as usize), "{layout:?}");
                assert!(rectangles <= most, "{layout:?}: {rectangles} rectangles");
            }
        }
        Ok(())
    }

    #[test]
    fn steps_past_the_largest_pitch_are_rectangles_of_their_own() -> Result<()> {
        let layout = Layout::strided(&[3, 8], &[1 << 31, 1], 1)?;
        let rectangles: Vec<_> = StridedCopy::new(&layout, 2).rectangles(2, 0).collect();
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
