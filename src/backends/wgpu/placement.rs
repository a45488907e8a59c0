//! Fitting tensors into bindings: which part of a buffer to bind for a range of batch rows, and
//! where in it the tensor lies.

use std::ops::Range;

use crate::backends::rows::{RowShape, WORD_BYTES, misaligned_by, row_strides};
use crate::call::op::{Input, Output};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::mask::meta::CuSeqlens;

use super::buffer::WgpuBuffer;
use super::context::Context;
use super::dispatch::{BINDING_ALIGNMENT, Launch, MAX_GROUPS, Window, groups_for};
use super::launches::Launches;
use super::metadata::packed_rows;
use super::params::CopyParams;
use super::shader::Shader;

/// What the first dimension of a tensor is.
#[derive(Debug, Clone, Copy)]
pub(super) enum FirstDim<'a> {
    /// `[B, S, H, D]`: the batch row.
    Batch,
    /// `[total, H, D]`: the packed row.
    PackedRow(&'a CuSeqlens),
}

/// A tensor of an operation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand<'a> {
    pub name: &'static str,
    pub buffer: &'a WgpuBuffer,
    pub layout: Layout,
    pub dtype: DType,
    first_dim: FirstDim<'a>,
}

/// Where a tensor lies in a binding, in words of 16 bytes.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub window: Window,
    pub offset: u32,
    /// Strides of batch row, token and head. A packed tensor has no batch rows.
    pub stride_b: u32,
    pub stride_s: u32,
    pub stride_h: u32,
}

impl Placed {
    /// A packed tensor at the start of a buffer.
    pub fn packed(row: RowShape, buffer: &wgpu::Buffer) -> Self {
        Self {
            window: Window::whole(buffer),
            offset: 0,
            stride_b: 0,
            // Both fit: a binding is below 2 GiB.
            stride_s: row.words() as u32,
            stride_h: row.head_words as u32,
        }
    }
}

impl<'a> Operand<'a> {
    pub fn input(context: &Context, name: &'static str, input: &Input<'a>, first_dim: FirstDim<'a>) -> Result<Self> {
        let buffer: &WgpuBuffer = input.memory.owned_by(context.id, &context.name)?;
        buffer.expect_unmapped(name)?;
        Ok(Self { name, buffer, layout: input.layout, dtype: input.dtype, first_dim })
    }

    pub fn output(context: &Context, name: &'static str, output: &Output<'a>, first_dim: FirstDim<'a>) -> Result<Self> {
        let buffer: &WgpuBuffer = output.memory.owned_by(context.id, &context.name)?;
        buffer.expect_unmapped(name)?;
        Ok(Self { name, buffer, layout: output.layout, dtype: output.dtype, first_dim })
    }

    /// The part of the tensor that belongs to a range of batch rows.
    fn part(&self, range: &Range<usize>) -> Result<Layout> {
        let rows = match self.first_dim {
            FirstDim::Batch => range.clone(),
            FirstDim::PackedRow(cu_seqlens) => packed_rows(cu_seqlens, range),
        };
        self.layout.slice(0, rows)
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

    /// What keeps the rows from starting at words, in bytes. All buffers start at a word.
    fn misaligned_by(&self) -> Option<u64> {
        misaligned_by(0, &self.layout, self.dtype.size())
    }

    /// Bytes of the largest binding that a range of batch rows needs of this tensor.
    fn binding_bytes(&self, range: &Range<usize>) -> Result<u64> {
        let part = self.part(range)?;
        let window = self.window_bytes(&part);
        let copy = if self.misaligned_by().is_some() { self.bytes_of(part.numel() as u64) } else { 0 };
        Ok((window.end - window.start).max(copy))
    }

    /// The binding of a part, for shaders that count positions in elements. Returns the position
    /// of the first element too.
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
            argument: self.buffer.is_external().then_some(self.name),
        }
    }

    /// The binding of a part that has elements, each row of which starts at a word.
    fn place_aligned(&self, part: &Layout) -> Placed {
        let bytes = self.window_bytes(part);
        let offset = self.bytes_of(part.offset()) - bytes.start;
        let [stride_b, stride_s, stride_h] = row_strides(part).map(|stride| self.bytes_of(stride) / WORD_BYTES);
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
        match self.misaligned_by() {
            None => Ok(self.place_aligned(&self.part(range)?)),
            Some(got) => Err(Error::Misaligned { argument: self.name, expected: WORD_BYTES, got }),
        }
    }

    /// The binding of a part to read. A view whose rows do not start at words is first copied to
    /// scratch whose rows do.
    pub fn place_input(
        &self,
        context: &Context,
        range: &Range<usize>,
        launches: &mut Launches<'_>,
        scratch: &mut Vec<wgpu::Buffer>,
    ) -> Result<Placed> {
        let part = self.part(range)?;
        if part.numel() == 0 {
            // Its buffer may be smaller than one word.
            return Ok(Placed { window: context.unused_read(), offset: 0, stride_b: 0, stride_s: 0, stride_h: 0 });
        }
        if self.misaligned_by().is_none() {
            return Ok(self.place_aligned(&part));
        }
        let copy = launches.take_scratch(self.bytes_of(part.numel() as u64))?;
        let placed = self.copy_aligned(range, &part, &copy, launches)?;
        scratch.push(copy);
        Ok(placed)
    }

    /// Copies a part to a buffer, row after row.
    fn copy_aligned(
        &self,
        range: &Range<usize>,
        part: &Layout,
        copy: &wgpu::Buffer,
        launches: &mut Launches<'_>,
    ) -> Result<Placed> {
        let (batch, seq, heads, head_dim) = match *part.shape() {
            [batch, seq, heads, head_dim] => (batch, seq, heads, head_dim),
            [seq, heads, head_dim] => (1, seq, heads, head_dim),
            _ => return Err(Error::Rank { argument: self.name, expected: "3 or 4", got: part.rank() }),
        };
        let (window, src_offset) = self.place_elements(range)?;
        // All fit: a binding is below 2 GiB.
        let [src_stride_b, src_stride_s, src_stride_h] = row_strides(part).map(|stride| stride as u32);
        let element_bytes = self.dtype.size();
        let head_u32s = head_dim * element_bytes / 4;
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
            shader: Shader::AlignRows { element_bytes },
            params: bytemuck::bytes_of(&params).to_vec(),
            windows: vec![window, Window::whole(copy)],
            groups: groups_for((batch * seq * heads * head_u32s) as u64),
            operations: 0,
        });
        let row = RowShape::new(heads, head_dim, element_bytes);
        let placed = Placed::packed(row, copy);
        Ok(Placed { stride_b: placed.stride_s.wrapping_mul(seq as u32), ..placed })
    }
}

/// Splits batch rows into ranges for which every operand, and scratch or lists of
/// `other_bytes(range)`, fit one binding each of at most `limit` bytes.
pub(super) fn split_batch(
    limit: u64,
    batch: usize,
    operands: &[Operand<'_>],
    other_bytes: impl Fn(&Range<usize>) -> u64,
) -> Result<Vec<Range<usize>>> {
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
        // Halving finds a range that fits in few steps. The ranges need not be as long as possible.
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
