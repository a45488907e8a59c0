//! Fitting tensors into bindings: which part of a buffer to bind for a range of batch rows, and
//! where in it the tensor lies.

use std::ops::Range;

use crate::backends::rows::{RowShape, WORD_BYTES, has_filled_heads, misaligned_by, row_strides};
use crate::call::memory::{Input, Output};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::mask::cu_seqlens::CuSeqlens;

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
    /// The same of a tensor whose elements shaders read one by one, wherever they lie.
    BatchOfElements,
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
    /// Of a tensor that comes in several segments.
    segment: Option<SegmentPlace>,
}

/// Where the tokens of a segment lie among those of all segments.
#[derive(Debug, Clone, Copy)]
pub(super) struct SegmentPlace {
    pub first: usize,
    /// Tokens of all segments.
    pub joint_seq: usize,
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
    /// The binding of a tensor without elements.
    pub fn nothing(context: &Context) -> Self {
        Self { window: context.unused_read(), offset: 0, stride_b: 0, stride_s: 0, stride_h: 0 }
    }

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
        Ok(Self { name, buffer, layout: input.layout, dtype: input.dtype, first_dim, segment: None })
    }

    pub fn output(context: &Context, name: &'static str, output: &Output<'a>, first_dim: FirstDim<'a>) -> Result<Self> {
        let buffer: &WgpuBuffer = output.memory.owned_by(context.id, &context.name)?;
        buffer.expect_unmapped(name)?;
        Ok(Self { name, buffer, layout: output.layout, dtype: output.dtype, first_dim, segment: None })
    }

    /// The same as one of several segments.
    pub fn in_segment(self, segment: SegmentPlace) -> Self {
        Self { segment: Some(segment), ..self }
    }

    /// The part of the tensor that belongs to a range of batch rows.
    fn part(&self, range: &Range<usize>) -> Result<Layout> {
        let rows = match self.first_dim {
            FirstDim::Batch | FirstDim::BatchOfElements => range.clone(),
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

    /// Whether the rows are of whole words.
    pub fn is_of_words(&self) -> bool {
        has_filled_heads(&self.layout) && self.misaligned_by().is_none()
    }

    /// Whether kernels read or write the tensor where it lies, not a copy with filled heads whose rows start at words.
    fn is_in_place(&self) -> bool {
        self.segment.is_none() && self.is_of_words()
    }

    /// Bytes of a copy of a part, with those of the other segments.
    fn copy_bytes(&self, part: &Layout) -> u64 {
        let (row, shape) = (RowShape::of(part, self.dtype.size()), part.shape());
        let rows = match (self.segment, shape) {
            (Some(segment), [batch, ..]) => *batch as u64 * segment.joint_seq as u64,
            _ => shape.iter().take(shape.len().saturating_sub(2)).map(|&size| size as u64).product(),
        };
        rows * row.bytes()
    }

    /// Bytes of a copy of all segments.
    pub fn joint_bytes(&self, range: &Range<usize>) -> Result<u64> {
        Ok(self.copy_bytes(&self.part(range)?))
    }

    /// Where all segments lie in a copy.
    pub fn joint(&self, range: &Range<usize>, copy: &wgpu::Buffer) -> Result<Placed> {
        Ok(Copied::of(self, &self.part(range)?)?.placed(copy))
    }

    /// All batch rows.
    pub fn batch_rows(&self) -> Range<usize> {
        0..self.layout.shape().first().copied().unwrap_or(0)
    }

    /// Whether both lie in one buffer.
    pub fn lies_beside(&self, other: &Self) -> bool {
        self.buffer.raw == other.buffer.raw
    }

    /// The first token among those of all segments.
    pub fn first_token(&self) -> usize {
        self.segment.map_or(0, |segment| segment.first)
    }

    /// The bytes to bind for a range of batch rows, where the tensor lies.
    pub fn bytes_in_place(&self, range: &Range<usize>) -> Result<Range<u64>> {
        Ok(self.window_bytes(&self.part(range)?))
    }

    /// The place of a range of batch rows of whole words in a window of the buffer, given in bytes.
    pub fn place_in(&self, range: &Range<usize>, bytes: Range<u64>) -> Result<Placed> {
        Ok(self.place_words(&self.part(range)?, bytes))
    }

    /// Bytes of the largest binding that a range of batch rows needs of this tensor.
    pub fn binding_bytes(&self, range: &Range<usize>) -> Result<u64> {
        let part = self.part(range)?;
        let window = self.window_bytes(&part);
        let is_copied = !matches!(self.first_dim, FirstDim::BatchOfElements) && !self.is_in_place();
        let copy = if is_copied { self.copy_bytes(&part) } else { 0 };
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
        self.place_words(part, self.window_bytes(part))
    }

    fn place_words(&self, part: &Layout, bytes: Range<u64>) -> Placed {
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

    /// The binding of a part to write. Heads that are not filled are written to scratch first:
    /// after the launch that writes, [`finish_output`](Self::finish_output) copies them.
    pub fn place_output(
        &self,
        range: &Range<usize>,
        launches: &mut Launches<'_>,
        scratch: &mut Vec<wgpu::Buffer>,
    ) -> Result<Placed> {
        match self.misaligned_by() {
            Some(got) if has_filled_heads(&self.layout) => {
                Err(Error::Misaligned { argument: self.name, expected: WORD_BYTES, got })
            }
            _ => self.place_output_anywhere(range, launches, scratch),
        }
    }

    /// The same wherever rows lie: they are written to scratch too if they do not start at words.
    pub fn place_output_anywhere(
        &self,
        range: &Range<usize>,
        launches: &mut Launches<'_>,
        scratch: &mut Vec<wgpu::Buffer>,
    ) -> Result<Placed> {
        let part = self.part(range)?;
        if self.is_in_place() {
            return Ok(self.place_aligned(&part));
        }
        let copy = launches.take_scratch(self.copy_bytes(&part).max(WORD_BYTES))?;
        let placed = Copied::of(self, &part)?.placed(&copy);
        scratch.push(copy);
        Ok(placed)
    }

    /// Copies what was written to the scratch of [`place_output`](Self::place_output) or
    /// [`place_output_anywhere`](Self::place_output_anywhere), if there is any.
    pub fn finish_output(&self, range: &Range<usize>, written: &Placed, launches: &mut Launches<'_>) -> Result<()> {
        let part = self.part(range)?;
        if self.is_in_place() || part.numel() == 0 {
            return Ok(());
        }
        let copied = Copied::of(self, &part)?;
        if self.is_of_words() {
            launches.push(copied.move_words(&copied.placed_part(&written.window.buffer), &self.place_aligned(&part)));
            return Ok(());
        }
        let (window, dst_offset) = self.place_elements(range)?;
        let [dst_stride_b, dst_stride_s, dst_stride_h] = copied.strides;
        let [src_offset, src_stride_b, src_stride_s] = copied.place_in_copy();
        let to = CopyParams { dst_offset, dst_stride_b, dst_stride_s, dst_stride_h, ..copied.params() };
        let params = CopyParams { src_offset, src_stride_b, src_stride_s, ..to };
        let shader = Shader::NarrowRows { element_bytes: self.dtype.size() };
        launches.push(copied.launch(shader, params, vec![written.window.clone(), window]));
        Ok(())
    }

    /// The binding of a part to read. A view whose rows do not start at words, or whose heads are
    /// not filled, is first copied to scratch whose rows and heads do and are.
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
            return Ok(Placed::nothing(context));
        }
        if self.is_in_place() {
            return Ok(self.place_aligned(&part));
        }
        let copy = launches.take_scratch(self.copy_bytes(&part))?;
        self.copy_input(range, &copy, launches)?;
        let placed = self.joint(range, &copy)?;
        scratch.push(copy);
        Ok(placed)
    }

    /// Copies a part that has elements to its place in a buffer, row after row.
    pub fn copy_input(&self, range: &Range<usize>, copy: &wgpu::Buffer, launches: &mut Launches<'_>) -> Result<()> {
        let part = self.part(range)?;
        let copied = Copied::of(self, &part)?;
        if self.is_of_words() {
            launches.push(copied.move_words(&self.place_aligned(&part), &copied.placed_part(copy)));
            return Ok(());
        }
        let (window, src_offset) = self.place_elements(range)?;
        let [src_stride_b, src_stride_s, src_stride_h] = copied.strides;
        let [dst_offset, dst_stride_b, dst_stride_s] = copied.place_in_copy();
        let from = CopyParams { src_offset, src_stride_b, src_stride_s, src_stride_h, ..copied.params() };
        let params = CopyParams { dst_offset, dst_stride_b, dst_stride_s, ..from };
        let shader = Shader::AlignRows { element_bytes: self.dtype.size() };
        launches.push(copied.launch(shader, params, vec![window, Window::whole(copy)]));
        Ok(())
    }
}

/// A copy of a part, row after row with filled heads, at its place among all segments.
struct Copied {
    /// Rows of all batch rows, and tokens of one of them.
    rows: usize,
    seq: usize,
    segment: SegmentPlace,
    row: RowShape,
    head_dim: usize,
    /// Of the part, in elements: batch row, token, head.
    strides: [u32; 3],
}

impl Copied {
    fn of(operand: &Operand<'_>, part: &Layout) -> Result<Self> {
        let (batch, seq, heads, head_dim) = match *part.shape() {
            [batch, seq, heads, head_dim] => (batch, seq, heads, head_dim),
            [seq, heads, head_dim] => (1, seq, heads, head_dim),
            _ => return Err(Error::Rank { argument: operand.name, expected: "3 or 4", got: part.rank() }),
        };
        // All fit: a binding is below 2 GiB.
        let strides = row_strides(part).map(|stride| stride as u32);
        let row = RowShape::new(heads, head_dim, operand.dtype.size());
        let segment = operand.segment.unwrap_or(SegmentPlace { first: 0, joint_seq: seq });
        Ok(Self { rows: batch * seq, seq, segment, row, head_dim, strides })
    }

    /// u32s of a head.
    fn head_u32s(&self) -> usize {
        self.row.head_words * (WORD_BYTES as usize / size_of::<u32>())
    }

    /// Offset of the first row in the copy, and strides of batch row and token, in u32s.
    fn place_in_copy(&self) -> [u32; 3] {
        let (SegmentPlace { first, joint_seq }, row) = (self.segment, self.row.heads * self.head_u32s());
        // All fit where they are stepped over: a binding is below 2 GiB.
        [first * row, joint_seq * row, row].map(|count| count as u32)
    }

    /// Without the place of the part.
    fn params(&self) -> CopyParams {
        // All fit: a binding is below 2 GiB.
        CopyParams {
            rows: self.rows as u32,
            heads: self.row.heads as u32,
            head_words: self.head_u32s() as u32,
            head_dim: self.head_dim as u32,
            seq: self.seq as u32,
            ..Default::default()
        }
    }

    fn launch(&self, shader: Shader, params: CopyParams, windows: Vec<Window>) -> Launch {
        Launch {
            shader,
            params: bytemuck::bytes_of(&params).to_vec(),
            windows,
            groups: groups_for((self.rows * self.row.heads * self.head_u32s()) as u64),
            operations: 0,
        }
    }

    /// A launch that moves rows of words.
    fn move_words(&self, src: &Placed, dst: &Placed) -> Launch {
        let row = self.row;
        let params = CopyParams { rows: self.rows as u32, seq: self.seq as u32, ..copy_params(row, src, dst) };
        Launch {
            shader: Shader::MoveRows,
            params: bytemuck::bytes_of(&params).to_vec(),
            windows: vec![src.window.clone(), dst.window.clone()],
            groups: groups_for(self.rows as u64 * row.words()),
            operations: 0,
        }
    }

    /// Where the part itself lies in the buffer of the copy.
    fn placed_part(&self, copy: &wgpu::Buffer) -> Placed {
        let placed = self.placed(copy);
        // Fits if there is a row: a binding is below 2 GiB.
        Placed { offset: placed.stride_s.wrapping_mul(self.segment.first as u32), ..placed }
    }

    /// Where the copy lies in its buffer.
    fn placed(&self, copy: &wgpu::Buffer) -> Placed {
        let placed = Placed::packed(self.row, copy);
        Placed { stride_b: placed.stride_s.wrapping_mul(self.segment.joint_seq as u32), ..placed }
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

/// Where a copy reads and writes rows. All fits: a binding is below 2 GiB.
pub(super) fn copy_params(row: RowShape, src: &Placed, dst: &Placed) -> CopyParams {
    CopyParams {
        src_offset: src.offset,
        src_stride_b: src.stride_b,
        src_stride_s: src.stride_s,
        src_stride_h: src.stride_h,
        dst_offset: dst.offset,
        dst_stride_b: dst.stride_b,
        dst_stride_s: dst.stride_s,
        dst_stride_h: dst.stride_h,
        heads: row.heads as u32,
        head_words: row.head_words as u32,
        ..Default::default()
    }
}
