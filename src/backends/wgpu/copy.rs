//! Launches of the shaders that move rows: pack, scatter, zero.

use std::ops::Range;

use crate::backends::rows::RowShape;
use crate::call::memory::{DeviceBuffer, Input, Output};
use crate::error::{Error, Result};
use crate::mask::meta::VarlenMeta;

use super::buffer::WgpuBuffer;
use super::context::Context;
use super::dispatch::{Launch, groups_for};
use super::launches::Launches;
use super::params::CopyParams;
use super::placement::{FirstDim, Operand, Placed, copy_params, split_batch};
use super::shader::Shader;
use super::sides::Side;

/// Which way rows are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Move {
    /// Padded to packed: the valid rows.
    Pack,
    /// Packed to padded: the valid rows, and zeros in the others.
    Scatter,
}

/// Moves the rows of a tensor.
pub(super) fn move_rows(
    context: &Context,
    way: Move,
    from: &Input<'_>,
    to: &Output<'_>,
    meta: &VarlenMeta,
    launches: &mut Launches<'_>,
) -> Result<()> {
    let (padded, packed) = (("padded", FirstDim::Batch), ("packed", FirstDim::PackedRow(meta.cu_seqlens())));
    let (src, dst) = if way == Move::Pack { (padded, packed) } else { (packed, padded) };
    let from = Operand::input(context, src.0, from, src.1)?;
    let to = Operand::output(context, dst.0, to, dst.1)?;
    let row = row_shape(&from);
    for range in split_batch(context.max_binding_bytes, meta.batch(), &[from, to], |_| 0)? {
        let mut scratch = Vec::new();
        let src = from.place_input(context, &range, launches, &mut scratch)?;
        let dst = to.place_output(&range, launches, &mut scratch)?;
        move_placed(context, way, (&src, &dst), row, (Side::Host(meta), &range), launches)?;
        to.finish_output(&range, &dst, launches)?;
        launches.give_back(scratch);
    }
    Ok(())
}

/// Moves the rows of a range of batch rows between placed tensors.
pub(super) fn move_placed(
    context: &Context,
    way: Move,
    (src, dst): (&Placed, &Placed),
    row: RowShape,
    (meta, range): (Side<'_>, &Range<usize>),
    launches: &mut Launches<'_>,
) -> Result<()> {
    let packed = meta.sequences().packed_rows(range);
    let (rows, row_base) = match way {
        Move::Pack => (packed, 0),
        Move::Scatter => (range.start * meta.seq()..range.end * meta.seq(), packed.start),
    };
    if rows.is_empty() {
        return Ok(());
    }
    let (shader, list) = match way {
        Move::Pack => (Shader::PackRows, meta.indices(context)?),
        Move::Scatter => (Shader::ScatterRows, meta.inv_indices(context)?),
    };
    let params = CopyParams {
        rows: rows.len() as u32,
        first_row: rows.start as u32,
        seq: meta.seq() as u32,
        batch_base: range.start as u32,
        row_base: row_base as u32,
        ..copy_params(row, src, dst)
    };
    launches.push(Launch {
        shader,
        params: bytemuck::bytes_of(&params).to_vec(),
        windows: vec![src.window.clone(), dst.window.clone(), list],
        groups: groups_for(rows.len() as u64 * row.words()),
        operations: 0,
    });
    Ok(())
}

/// Clears a whole tensor of any shape without a shader, if its buffer holds nothing else. Returns
/// whether it did.
pub(super) fn clear_whole(context: &Context, out: &Output<'_>) -> Result<bool> {
    let Context { device, queue, faults, .. } = context;
    let buffer: &WgpuBuffer = out.memory.owned_by(context.id, &context.name)?;
    let is_whole = out.layout.is_contiguous()
        && out.layout.offset() == 0
        && out.layout.end() * out.dtype.size() as u64 == buffer.size();
    if buffer.is_external() || !is_whole {
        return Ok(false);
    }
    faults.check()?;
    faults.capture("clearing a buffer", 0, || {
        let mut encoder = device.create_command_encoder(&Default::default());
        encoder.clear_buffer(&buffer.raw, 0, None);
        queue.submit([encoder.finish()]);
    })?;
    faults.probe()?;
    faults.check()?;
    Ok(true)
}

/// Writes zeros to every element of a `[B, S, H, D]` view.
pub(super) fn zero(context: &Context, out: &Output<'_>, launches: &mut Launches<'_>) -> Result<()> {
    let &[batch, seq, _, _] = out.layout.shape() else {
        return Err(Error::Rank { argument: "out", expected: "4: [B, S, H, D]", got: out.layout.rank() });
    };
    let to = Operand::output(context, "out", out, FirstDim::Batch)?;
    let row = row_shape(&to);
    for range in split_batch(context.max_binding_bytes, batch, &[to], |_| 0)? {
        let mut scratch = Vec::new();
        // A segment may lie anywhere.
        let dst = to.place_output_anywhere(&range, launches, &mut scratch)?;
        let rows = range.len() * seq;
        let params = CopyParams { rows: rows as u32, seq: seq as u32, ..copy_params(row, &dst, &dst) };
        launches.push(Launch {
            shader: Shader::ZeroRows,
            params: bytemuck::bytes_of(&params).to_vec(),
            windows: vec![dst.window.clone()],
            groups: groups_for(rows as u64 * row.words()),
            operations: 0,
        });
        to.finish_output(&range, &dst, launches)?;
        launches.give_back(scratch);
    }
    Ok(())
}

fn row_shape(tensor: &Operand<'_>) -> RowShape {
    RowShape::of(&tensor.layout, tensor.dtype.size())
}
