//! Fitting tensors into bindings: which part of a buffer to bind for a range of batch rows, and where in it the tensor lies.

use std::ops::Range;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::mask::meta::CuSeqlens;

use super::WgpuDevice;
use super::buffer::WgpuBuffer;
use super::copy::groups_for;
use super::launch::{Launch, Window};
use super::launches::Launches;
use super::params::CopyParams;
use super::shader::Shader;

/// Bindings start at multiples of this: WebGPU's `min_storage_buffer_offset_alignment`.
pub(super) const BINDING_ALIGNMENT: u64 = 256;
/// Shaders move words of this many bytes.
pub(super) const WORD_BYTES: u64 = 16;
/// Workgroups in one dimension of a dispatch.
pub(super) const MAX_GROUPS: usize = 65_535;

/// How the first dimension of a tensor follows from a range of batch rows.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rows<'a> {
    /// `[B, S, H, D]`: it is the batch row.
    Padded,
    /// `[total, H, D]`: it is the packed row.
    Packed(&'a CuSeqlens),
}

/// A tensor of an operation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand<'a> {
    pub name: &'static str,
    pub buffer: &'a WgpuBuffer,
    pub layout: Layout,
    pub dtype: DType,
    pub rows: Rows<'a>,
}

/// Where a tensor lies in a binding, in words of 16 bytes.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub window: Window,
    pub offset: u32,
    /// Strides of batch row, token and head; a packed tensor has no batch rows.
    pub stride_b: u32,
    pub stride_s: u32,
    pub stride_h: u32,
}

impl<'a> Operand<'a> {
    /// The part of the tensor that belongs to a range of batch rows.
    fn part(&self, range: &Range<usize>) -> Result<Layout> {
        match self.rows {
            Rows::Padded => self.layout.slice(0, range.clone()),
            Rows::Packed(cu_seqlens) => {
                let values = cu_seqlens.as_slice();
                self.layout.slice(0, values[range.start] as usize..values[range.end] as usize)
            }
        }
    }

    fn bytes_of(&self, elements: u64) -> u64 {
        elements * self.dtype.size() as u64
    }

    /// The bytes to bind for a part, from an aligned start.
    fn window_bytes(&self, part: &Layout) -> Range<u64> {
        if part.numel() == 0 {
            return 0..WORD_BYTES;
        }
        let start = self.bytes_of(part.offset()) / BINDING_ALIGNMENT * BINDING_ALIGNMENT;
        start..self.bytes_of(part.end()).next_multiple_of(WORD_BYTES)
    }

    /// The first distance, of the offset and the strides that are stepped over, that is no multiple of `alignment` bytes.
    fn misaligned_by(&self, alignment: u64) -> Option<u64> {
        let dims = self.layout.shape().iter().zip(self.layout.strides());
        let leading = dims.take(self.layout.rank() - 1).filter(|&(&size, _)| size > 1).map(|(_, &stride)| stride);
        std::iter::once(self.layout.offset())
            .chain(leading)
            .map(|elements| self.bytes_of(elements))
            .find(|bytes| bytes % alignment != 0)
    }

    /// Bytes of the largest binding that a range of batch rows needs of this tensor.
    fn binding_bytes(&self, range: &Range<usize>) -> Result<u64> {
        let part = self.part(range)?;
        let window = self.window_bytes(&part);
        let copy = if self.misaligned_by(WORD_BYTES).is_some() { self.bytes_of(part.numel() as u64) } else { 0 };
        Ok((window.end - window.start).max(copy))
    }

    /// The binding of a part, for shaders that count positions in elements. Gives the position of the first element.
    pub fn place_elements(&self, range: &Range<usize>) -> Result<(Window, u32)> {
        let part = self.part(range)?;
        let bytes = self.window_bytes(&part);
        let offset = part.offset() - bytes.start / self.dtype.size() as u64;
        // Fits: a binding is below 2 GiB.
        Ok((self.window(bytes), offset as u32))
    }

    fn window(&self, bytes: Range<u64>) -> Window {
        Window {
            buffer: self.buffer.raw.clone(),
            offset: bytes.start,
            size: bytes.end.min(self.buffer.bindable()) - bytes.start,
            argument: self.buffer.is_foreign().then_some(self.name),
        }
    }

    /// The binding of a part that has elements, each row of which starts at a word.
    fn place_aligned(&self, part: &Layout) -> Placed {
        let bytes = self.window_bytes(part);
        let offset = self.bytes_of(part.offset()) - bytes.start;
        let [stride_b, stride_s, stride_h] = leading_strides(part).map(|stride| self.bytes_of(stride) / WORD_BYTES);
        Placed {
            window: self.window(bytes),
            // All fit: a binding is below 2 GiB.
            offset: (offset / WORD_BYTES) as u32,
            stride_b: stride_b as u32,
            stride_s: stride_s as u32,
            stride_h: stride_h as u32,
        }
    }

    /// The binding of a part to write.
    pub fn place_output(&self, range: &Range<usize>) -> Result<Placed> {
        match self.misaligned_by(WORD_BYTES) {
            None => Ok(self.place_aligned(&self.part(range)?)),
            Some(got) => Err(Error::Misaligned { argument: self.name, expected: WORD_BYTES, got }),
        }
    }
}

/// Strides of batch row, token and head; 0 for those that a shader never steps over.
fn leading_strides(layout: &Layout) -> [u64; 3] {
    let stepped = |dim: usize| if layout.shape()[dim] > 1 { layout.strides()[dim] } else { 0 };
    match layout.rank() {
        4 => [stepped(0), stepped(1), stepped(2)],
        3 => [0, stepped(0), stepped(1)],
        _ => [0, 0, stepped(0)],
    }
}

impl WgpuDevice {
    /// The binding of a part to read. A view whose rows do not start at words is first copied to scratch that is.
    pub(super) fn place_input(
        &self,
        operand: &Operand<'_>,
        range: &Range<usize>,
        launches: &mut Launches<'_>,
        scratch: &mut Vec<wgpu::Buffer>,
    ) -> Result<Placed> {
        let part = operand.part(range)?;
        if part.numel() == 0 {
            // Its buffer may hold less than one word.
            let (window, offset) = (self.unused_read(), 0);
            return Ok(Placed { window, offset, stride_b: 0, stride_s: 0, stride_h: 0 });
        }
        if operand.misaligned_by(WORD_BYTES).is_none() {
            return Ok(operand.place_aligned(&part));
        }
        let size = operand.dtype.size();
        let (heads, head_dim) = (part.shape()[part.rank() - 2], part.shape()[part.rank() - 1]);
        let (batch, seq) = match part.rank() {
            4 => (part.shape()[0], part.shape()[1]),
            _ => (1, part.shape()[0]),
        };
        let copy = launches.take_scratch(operand.bytes_of(part.numel() as u64))?;
        let (window, src_offset) = operand.place_elements(range)?;
        // All fit: a binding is below 2 GiB.
        let [src_stride_b, src_stride_s, src_stride_h] = leading_strides(&part).map(|stride| stride as u32);
        let head_u32s = head_dim * size / 4;
        let params = CopyParams {
            src_offset,
            src_stride_b,
            src_stride_s,
            src_stride_h,
            rows: (batch * seq) as u32,
            heads: heads as u32,
            head_words: head_u32s as u32,
            seq: seq as u32,
            ..Default::default()
        };
        launches.push(Launch {
            shader: Shader::AlignRows { element_bytes: size },
            params: bytemuck::bytes_of(&params).to_vec(),
            windows: vec![window, Window::whole(&copy)],
            groups: groups_for(batch * seq * heads * head_u32s),
            operations: 0,
        });
        let row_words = (heads * head_dim * size) as u32 / WORD_BYTES as u32;
        let placed = Placed {
            window: Window::whole(&copy),
            offset: 0,
            stride_b: row_words.wrapping_mul(seq as u32),
            stride_s: row_words,
            stride_h: row_words / heads as u32,
        };
        scratch.push(copy);
        Ok(placed)
    }

    /// Splits batch rows into ranges for which every operand, and scratch or lists of `other_bytes(range)`, fit one binding each.
    pub(super) fn split_batch(
        &self,
        batch: usize,
        operands: &[Operand<'_>],
        other_bytes: impl Fn(&Range<usize>) -> u64,
    ) -> Result<Vec<Range<usize>>> {
        let limit = self.capabilities.max_binding_bytes;
        let excess = |range: &Range<usize>| -> Result<Option<(&'static str, u64)>> {
            for operand in operands {
                let bytes = operand.binding_bytes(range)?;
                if bytes > limit {
                    return Ok(Some((operand.name, bytes)));
                }
            }
            let bytes = other_bytes(range);
            Ok((bytes > limit).then_some(("packed rows or token lists", bytes)))
        };
        let mut ranges = Vec::new();
        let mut start = 0;
        while start < batch {
            let mut end = batch.min(start + MAX_GROUPS);
            // Halving finds a range that fits in few steps; the ranges need not be as long as can be.
            while let Some((argument, got)) = excess(&(start..end))? {
                if end - start == 1 {
                    let limit_name = "one batch row in max_storage_buffer_binding_size (bytes)";
                    return Err(Error::TooLarge { argument, limit_name, limit, got });
                }
                end = start + (end - start) / 2;
            }
            ranges.push(start..end);
            start = end;
        }
        Ok(ranges)
    }
}
