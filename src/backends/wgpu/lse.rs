//! The log-sum-exp of rows: where it lies, launches that write it, and what it merges.

use std::ops::Range;

use crate::backends::rows::RowShape;
use crate::call::memory::Output;
use crate::call::op::{Merge, MergePart};
use crate::error::Result;

use super::context::Context;
use super::dispatch::{Launch, Window, groups_for};
use super::launches::Launches;
use super::params::{CopyParams, MergeParams};
use super::placement::{FirstDim, Operand, Placed, split_batch};
use super::shader::Shader;
use super::sides::Side;

/// Where a log-sum-exp lies in a binding, in elements.
#[derive(Debug, Clone)]
pub(super) struct PlacedLse {
    pub window: Window,
    pub offset: u32,
    /// Strides of batch row, head and token.
    pub stride_b: u32,
    pub stride_h: u32,
    pub stride_s: u32,
}

impl PlacedLse {
    /// A range of the first dimension of `[B, H, S]` or `[H, total]`.
    pub fn of(lse: &Operand<'_>, range: &Range<usize>) -> Result<Self> {
        let (window, offset) = lse.place_elements(range)?;
        // Each fits wherever it is stepped over: a binding is below 2 GiB.
        let strides: Vec<u32> = lse.layout.strides().iter().map(|&stride| stride as u32).collect();
        let (stride_b, stride_h, stride_s) = match strides[..] {
            [batch, head, token] => (batch, head, token),
            [head, row] => (0, head, row),
            _ => (0, 0, 0),
        };
        Ok(Self { window, offset, stride_b, stride_h, stride_s })
    }

    /// `[H, n]` of these packed rows, at the start of a buffer. Kernels count from the first of all
    /// packed rows, which lies before the buffer.
    pub fn of_packed_rows(buffer: &wgpu::Buffer, rows: Range<usize>) -> Self {
        // Both fit: packed rows are counted in an i32.
        let (first, count) = (rows.start as u32, rows.len() as u32);
        let offset = 0_u32.wrapping_sub(first);
        Self { window: Window::whole(buffer), offset, stride_b: 0, stride_h: count, stride_s: 1 }
    }
}

/// Copies the log-sum-exp of packed rows to the valid rows of a range of batch rows, and −∞ to the
/// others.
pub(super) fn scatter_lse(
    context: &Context,
    (packed, padded): (PlacedLse, PlacedLse),
    heads: usize,
    (meta, range): (Side<'_>, &Range<usize>),
    launches: &mut Launches<'_>,
) -> Result<()> {
    let list = meta.inv_indices(context)?;
    let params = CopyParams {
        src_offset: packed.offset,
        src_stride_h: packed.stride_h,
        first_row: (range.start * meta.seq()) as u32,
        batch_base: range.start as u32,
        ..padded_params(&padded, [range.len(), heads, meta.seq()])
    };
    push(Shader::ScatterLse, &params, vec![packed.window, padded.window, list], launches);
    Ok(())
}

/// Writes −∞ to every element of a `[B, H, S]` view.
pub(super) fn no_keys(context: &Context, lse: &Output<'_>, launches: &mut Launches<'_>) -> Result<()> {
    let &[batch, heads, seq] = lse.layout.shape() else { return Ok(()) };
    let to = Operand::output(context, "lse", lse, FirstDim::Batch)?;
    for range in split_batch(context.max_binding_bytes, batch, &[to], |_| 0)? {
        let placed = PlacedLse::of(&to, &range)?;
        let params = padded_params(&placed, [range.len(), heads, seq]);
        push(Shader::NoKeys, &params, vec![placed.window], launches);
    }
    Ok(())
}

/// All fit: tokens and heads are counted in an i32.
fn padded_params(to: &PlacedLse, [batch, heads, seq]: [usize; 3]) -> CopyParams {
    CopyParams {
        dst_offset: to.offset,
        dst_stride_b: to.stride_b,
        dst_stride_s: to.stride_s,
        dst_stride_h: to.stride_h,
        rows: (batch * seq) as u32,
        heads: heads as u32,
        seq: seq as u32,
        ..Default::default()
    }
}

fn push(shader: Shader, params: &CopyParams, windows: Vec<Window>, launches: &mut Launches<'_>) {
    let elements = u64::from(params.rows) * u64::from(params.heads);
    let (params, groups) = (bytemuck::bytes_of(params).to_vec(), groups_for(elements));
    launches.push(Launch { shader, params, windows, groups, operations: 0 });
}

/// Attention over the keys of both parts.
pub(super) fn merge(context: &Context, merge: &Merge<'_>, launches: &mut Launches<'_>) -> Result<()> {
    let Merge { parts: [first, second], out, lse } = merge;
    let &[batch, seq, heads, _] = out.layout.shape() else { return Ok(()) };
    let row = RowShape::of(&out.layout, out.dtype.size());
    let [out1, lse1] = operands(context, first, ["out1", "lse1"])?;
    let [out2, lse2] = operands(context, second, ["out2", "lse2"])?;
    let shader = Shader::Merge { dtype: out.dtype };
    let output = Operand::output(context, "out", out, FirstDim::Batch)?;
    let lse = lse.as_ref().map(|lse| Operand::output(context, "lse", lse, FirstDim::Batch)).transpose()?;
    let bound: Vec<_> = [out1, lse1, out2, lse2, output].into_iter().chain(lse).collect();
    for range in split_batch(context.max_binding_bytes, batch, &bound, |_| 0)? {
        let mut scratch = Vec::new();
        let out = output.place_output(&range, launches, &mut scratch)?;
        let written = out.clone();
        let mut place = |operand: &Operand<'_>| operand.place_input(context, &range, launches, &mut scratch);
        let (out1, out2) = (place(&out1)?, place(&out2)?);
        let lses = [&lse1, &lse2].map(|lse| PlacedLse::of(lse, &range));
        let [lse1, lse2] = lses;
        let placed = PlacedMerge { outs: [out1, out2, out], lses: [lse1?, lse2?] };
        let lse = lse.map(|lse| PlacedLse::of(&lse, &range)).transpose()?;
        // All fit: tokens and heads are counted in an i32.
        let params = MergeParams {
            rows: (range.len() * seq) as u32,
            seq: seq as u32,
            heads: heads as u32,
            head_words: row.head_words as u32,
            ..placed.params(lse.as_ref())
        };
        let PlacedMerge { outs: [out1, out2, out], lses: [lse1, lse2] } = placed;
        let lse = lse.map_or_else(|| context.unused_write(), |lse| lse.window);
        launches.push(Launch {
            shader,
            params: bytemuck::bytes_of(&params).to_vec(),
            windows: vec![out1.window, lse1.window, out2.window, lse2.window, out.window, lse],
            groups: groups_for((range.len() * seq) as u64 * row.words()),
            operations: 0,
        });
        output.finish_output(&range, &written, launches)?;
        launches.give_back(scratch);
    }
    Ok(())
}

fn operands<'a>(context: &Context, part: &MergePart<'a>, names: [&'static str; 2]) -> Result<[Operand<'a>; 2]> {
    let operand = |name, input| Operand::input(context, name, input, FirstDim::Batch);
    Ok([operand(names[0], &part.out)?, operand(names[1], &part.lse)?])
}

/// The tensors of one launch but the merged log-sum-exp.
struct PlacedMerge {
    outs: [Placed; 3],
    lses: [PlacedLse; 2],
}

impl PlacedMerge {
    fn params(&self, lse: Option<&PlacedLse>) -> MergeParams {
        let Self { outs: [out1, out2, out], lses: [lse1, lse2] } = self;
        let params = MergeParams {
            out1_offset: out1.offset,
            out1_stride_b: out1.stride_b,
            out1_stride_s: out1.stride_s,
            out1_stride_h: out1.stride_h,
            out2_offset: out2.offset,
            out2_stride_b: out2.stride_b,
            out2_stride_s: out2.stride_s,
            out2_stride_h: out2.stride_h,
            out_offset: out.offset,
            out_stride_b: out.stride_b,
            out_stride_s: out.stride_s,
            out_stride_h: out.stride_h,
            lse1_offset: lse1.offset,
            lse1_stride_b: lse1.stride_b,
            lse1_stride_h: lse1.stride_h,
            lse1_stride_s: lse1.stride_s,
            lse2_offset: lse2.offset,
            lse2_stride_b: lse2.stride_b,
            lse2_stride_h: lse2.stride_h,
            lse2_stride_s: lse2.stride_s,
            ..Default::default()
        };
        let Some(lse) = lse else { return params };
        MergeParams {
            lse_offset: lse.offset,
            lse_stride_b: lse.stride_b,
            lse_stride_h: lse.stride_h,
            lse_stride_s: lse.stride_s,
            has_lse: 1,
            ..params
        }
    }
}
