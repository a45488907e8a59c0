//! Launches of the shaders that move rows: pack, scatter, zero.

use std::ops::Range;

use crate::call::op::{DeviceBuffer, Input, Output};
use crate::error::{Error, Result};
use crate::mask::meta::VarlenMeta;

use super::WgpuDevice;
use super::launch::{Launch, Window};
use super::launches::Launches;
use super::params::CopyParams;
use super::placement::{MAX_GROUPS, Operand, Placed, Rows, WORD_BYTES};
use super::shader::Shader;

const INVOCATIONS: usize = 256;

/// Workgroups for a grid-stride loop over `items`.
pub(super) fn groups_for(items: usize) -> [u32; 3] {
    [items.div_ceil(INVOCATIONS).clamp(1, MAX_GROUPS) as u32, 1, 1]
}

/// Heads of a row and 16-byte words of a head.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowShape {
    pub heads: usize,
    pub head_words: usize,
}

impl RowShape {
    pub fn new(heads: usize, head_dim: usize, element_bytes: usize) -> Self {
        Self { heads, head_words: head_dim * element_bytes / WORD_BYTES as usize }
    }

    /// Bytes of one row.
    pub fn bytes(self) -> u64 {
        (self.heads * self.head_words) as u64 * WORD_BYTES
    }

    /// A packed tensor of such rows at the start of a buffer.
    pub fn packed_in(self, buffer: &wgpu::Buffer) -> Placed {
        Placed {
            window: Window::whole(buffer),
            offset: 0,
            stride_b: 0,
            stride_s: (self.heads * self.head_words) as u32,
            stride_h: self.head_words as u32,
        }
    }
}

impl WgpuDevice {
    pub(super) fn input<'a>(&self, name: &'static str, input: &Input<'a>, rows: Rows<'a>) -> Result<Operand<'a>> {
        let buffer = self.source(input.memory)?;
        buffer.expect_unmapped(name)?;
        Ok(Operand { name, buffer, layout: input.layout, dtype: input.dtype, rows })
    }

    pub(super) fn output<'a>(&self, name: &'static str, output: &Output<'a>, rows: Rows<'a>) -> Result<Operand<'a>> {
        let buffer = self.sink(&output.memory)?;
        buffer.expect_unmapped(name)?;
        Ok(Operand { name, buffer, layout: output.layout, dtype: output.dtype, rows })
    }

    pub(super) fn record_pack(
        &self,
        from: &Input<'_>,
        to: &Output<'_>,
        meta: &VarlenMeta,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let from = self.input("padded", from, Rows::Padded)?;
        let to = self.output("packed", to, Rows::Packed(meta.cu_seqlens()))?;
        let row = row_shape(&from);
        for range in self.split_batch(meta.batch(), &[from, to], |_| 0)? {
            let mut scratch = Vec::new();
            let src = self.place_input(&from, &range, launches, &mut scratch)?;
            let dst = to.place_output(&range)?;
            self.push_pack(&src, &dst, row, meta, &range, launches)?;
            launches.give_back(scratch);
        }
        Ok(())
    }

    /// Pack of a range of batch rows between placed tensors.
    pub(super) fn push_pack(
        &self,
        src: &Placed,
        dst: &Placed,
        row: RowShape,
        meta: &VarlenMeta,
        range: &Range<usize>,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let packed = packed_rows(meta, range);
        if packed.is_empty() {
            return Ok(());
        }
        let indices = &self.indices(meta)?.0;
        let params = CopyParams {
            rows: packed.len() as u32,
            first_row: packed.start as u32,
            seq: meta.seq() as u32,
            batch_base: range.start as u32,
            ..copy_params(src, dst, row)
        };
        launches.push(Launch {
            shader: Shader::PackRows,
            params: bytemuck::bytes_of(&params).to_vec(),
            windows: vec![src.window.clone(), dst.window.clone(), Window::whole(indices)],
            groups: groups_for(packed.len() * row.heads * row.head_words),
            operations: 0,
        });
        Ok(())
    }

    pub(super) fn record_scatter(
        &self,
        packed: &Input<'_>,
        padded: &Output<'_>,
        meta: &VarlenMeta,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let from = self.input("packed", packed, Rows::Packed(meta.cu_seqlens()))?;
        let to = self.output("padded", padded, Rows::Padded)?;
        let row = row_shape(&to);
        for range in self.split_batch(meta.batch(), &[from, to], |_| 0)? {
            let mut scratch = Vec::new();
            let src = self.place_input(&from, &range, launches, &mut scratch)?;
            let dst = to.place_output(&range)?;
            self.push_scatter(&src, &dst, row, meta, &range, launches)?;
            launches.give_back(scratch);
        }
        Ok(())
    }

    /// Scatter of a range of batch rows between placed tensors.
    pub(super) fn push_scatter(
        &self,
        src: &Placed,
        dst: &Placed,
        row: RowShape,
        meta: &VarlenMeta,
        range: &Range<usize>,
        launches: &mut Launches<'_>,
    ) -> Result<()> {
        let inv_indices = &self.inv_indices(meta)?.0;
        let rows = range.len() * meta.seq();
        let params = CopyParams {
            rows: rows as u32,
            first_row: (range.start * meta.seq()) as u32,
            seq: meta.seq() as u32,
            batch_base: range.start as u32,
            row_base: packed_rows(meta, range).start as u32,
            ..copy_params(src, dst, row)
        };
        launches.push(Launch {
            shader: Shader::ScatterRows,
            params: bytemuck::bytes_of(&params).to_vec(),
            windows: vec![src.window.clone(), dst.window.clone(), Window::whole(inv_indices)],
            groups: groups_for(rows * row.heads * row.head_words),
            operations: 0,
        });
        Ok(())
    }

    /// Clears a whole tensor of any shape without a shader, if its buffer is its own up to the last word.
    pub(super) fn clear_whole(&self, out: &Output<'_>) -> Result<bool> {
        let buffer = self.sink(&out.memory)?;
        let bytes = out.layout.end() * out.dtype.size() as u64;
        if buffer.is_foreign() || !out.layout.is_contiguous() || out.layout.offset() != 0 || bytes != buffer.size() {
            return Ok(false);
        }
        self.faults.check()?;
        self.faults.capture("clearing a buffer", 0, || {
            let mut encoder = self.device.create_command_encoder(&Default::default());
            encoder.clear_buffer(&buffer.raw, 0, None);
            self.queue.submit([encoder.finish()]);
        })?;
        self.faults.probe()?;
        self.faults.check()?;
        Ok(true)
    }

    pub(super) fn record_zero(&self, out: &Output<'_>, launches: &mut Launches<'_>) -> Result<()> {
        if out.layout.rank() != 4 {
            return Err(Error::Rank { argument: "out", expected: "4: [B, S, H, D]", got: out.layout.rank() });
        }
        let to = self.output("out", out, Rows::Padded)?;
        let row = row_shape(&to);
        let seq = to.layout.shape()[1];
        for range in self.split_batch(to.layout.shape()[0], &[to], |_| 0)? {
            let dst = to.place_output(&range)?;
            let rows = range.len() * seq;
            let params = CopyParams { rows: rows as u32, seq: seq as u32, ..copy_params(&dst, &dst, row) };
            launches.push(Launch {
                shader: Shader::ZeroRows,
                params: bytemuck::bytes_of(&params).to_vec(),
                windows: vec![dst.window],
                groups: groups_for(rows * row.heads * row.head_words),
                operations: 0,
            });
        }
        Ok(())
    }
}

/// Packed rows of a range of batch rows.
pub(super) fn packed_rows(meta: &VarlenMeta, range: &Range<usize>) -> Range<usize> {
    let values = meta.cu_seqlens().as_slice();
    values[range.start] as usize..values[range.end] as usize
}

fn row_shape(tensor: &Operand<'_>) -> RowShape {
    let (shape, rank) = (tensor.layout.shape(), tensor.layout.rank());
    RowShape::new(shape[rank - 2], shape[rank - 1], tensor.dtype.size())
}

fn copy_params(src: &Placed, dst: &Placed, row: RowShape) -> CopyParams {
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
