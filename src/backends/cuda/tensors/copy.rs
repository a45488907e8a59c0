//! Launches of the kernels that move rows: pack, scatter, zero.

use crate::backends::cuda::driver::transfer;
use crate::backends::cuda::kernels::module::Entry;
use crate::backends::cuda::kernels::params::{
    MAX_PACK_TENSORS, PackParams, ROW_COPY_THREADS, RowTensor, ScatterParams,
};
use crate::backends::cuda::launcher::Launcher;
use crate::backends::rows::RowShape;
use crate::call::memory::{Input, Output};
use crate::error::{Error, Result};
use crate::mask::meta::VarlenMeta;

use super::metadata::{self, Tables};
use super::placement::{Operand, Placed, place_input};

/// Each warp copies one row at a time.
const BLOCK_ROWS: usize = ROW_COPY_THREADS as usize / 32;
/// Blocks in a grid's first dimension; the kernels stride over the rows that are left.
const MAX_BLOCKS: usize = i32::MAX as usize;

/// Copies the valid rows of each padded input to its packed output.
pub fn pack(launcher: &Launcher, pairs: &[(Input<'_>, Output<'_>)], meta: &VarlenMeta) -> Result<()> {
    let (mut scratch, mut tensors) = (Vec::new(), Vec::with_capacity(pairs.len()));
    // Outputs first: one that is refused is refused before anything is launched.
    let outputs = pairs.iter().map(|(_, to)| {
        let to = Operand::output(launcher, "packed", to)?;
        Ok((to, to.place_output(launcher, &mut scratch)?))
    });
    let outputs = outputs.collect::<Result<Vec<_>>>()?;
    for ((from, _), (_, packed)) in pairs.iter().zip(&outputs) {
        let from = Operand::input(launcher, "padded", from)?;
        let padded = place_input(launcher, &from, &mut scratch)?;
        tensors.push(row_tensor(row_shape(&from), &padded, packed));
    }
    let tables = metadata::host_tables(launcher, meta)?;
    tensors.chunks(MAX_PACK_TENSORS).try_for_each(|tensors| launch_pack(launcher, tensors, &tables))?;
    outputs.iter().try_for_each(|(to, packed)| to.finish_output(launcher, packed))
}

/// Copies packed rows to the valid rows of the padded output, and writes zeros to the others.
pub fn scatter(launcher: &Launcher, packed: &Input<'_>, padded: &Output<'_>, meta: &VarlenMeta) -> Result<()> {
    let to = Operand::output(launcher, "padded", padded)?;
    let mut scratch = Vec::new();
    let placed = to.place_output(launcher, &mut scratch)?;
    let packed = place_input(launcher, &Operand::input(launcher, "packed", packed)?, &mut scratch)?;
    let tables = metadata::host_tables(launcher, meta)?;
    launch_scatter(launcher, &row_tensor(row_shape(&to), &placed, &packed), &tables)?;
    to.finish_output(launcher, &placed)
}

/// Writes zeros to every element of a view: of any shape and offset if it is contiguous, of
/// `[B, S, H, D]` otherwise.
pub fn zero(launcher: &Launcher, out: &Output<'_>) -> Result<()> {
    let to = Operand::output(launcher, "out", out)?;
    if to.layout.numel() == 0 {
        return Ok(());
    }
    if to.layout.is_contiguous() {
        let bytes = to.layout.numel() as u64 * to.dtype.size() as u64;
        // SAFETY: a contiguous view is the bytes from its address on, inside its buffer (checked by
        // problem).
        return unsafe { transfer::fill(&launcher.context, to.address(), 0, bytes) };
    }
    zero_rows(launcher, &to)
}

fn zero_rows(launcher: &Launcher, to: &Operand<'_>) -> Result<()> {
    let &[batch, seq, _, _] = to.layout.shape() else {
        return Err(Error::Rank { argument: "out", expected: "4: [B, S, H, D]", got: to.layout.rank() });
    };
    let row = row_shape(to);
    let function = launcher.function(Entry::Scatter)?;
    // The kernel counts rows in 32 bits.
    let batch_rows = (i32::MAX as usize / seq).max(1);
    for first in (0..batch).step_by(batch_rows) {
        let part = Operand { layout: to.layout.slice(0, first..batch.min(first + batch_rows))?, ..*to };
        let mut scratch = Vec::new();
        let padded = part.place_output_anywhere(launcher, &mut scratch)?;
        let batch = part.layout.shape()[0];
        let params = ScatterParams {
            tensor: row_tensor(row, &padded, &padded),
            inv_indices: 0,
            // Both fit: their product does, or batch is 1 and seq is checked by problem.
            batch: batch as i32,
            seq: seq as i32,
        };
        // SAFETY: the view lies inside its buffer (checked by problem), its rows start at words
        // (placement), and without `inv_indices` nothing is read.
        unsafe { launcher.launch(function, row_grid(batch * seq), ROW_COPY_THREADS, &params) }?;
        part.finish_output_anywhere(launcher, &padded)?;
    }
    Ok(())
}

/// Packs up to [`MAX_PACK_TENSORS`] tensors of one batch.
pub fn launch_pack(launcher: &Launcher, tensors: &[RowTensor], tables: &Tables) -> Result<()> {
    if tables.packed_rows == 0 || tensors.iter().all(has_no_words) {
        return Ok(());
    }
    let mut params = PackParams {
        indices: tables.indices,
        cu_seqlens: tables.cu_seqlens,
        // All fit: KeyMask bounds batch · seq by i32::MAX.
        batch: tables.batch as i32,
        seq: tables.seq as i32,
        ..Default::default()
    };
    params.tensors.iter_mut().zip(tensors).for_each(|(slot, tensor)| *slot = *tensor);
    let function = launcher.function(Entry::Pack)?;
    let [blocks, ..] = row_grid(tables.packed_rows);
    let grid = [blocks, tensors.len() as u32, 1];
    // SAFETY: padded and packed tensors have the metadata's rows (checked by problem; scratch is
    // made so), and their rows start at words (placement). The metadata is this device's copy,
    // whose indices are below batch · seq.
    unsafe { launcher.launch(function, grid, ROW_COPY_THREADS, &params) }
}

/// Scatters one tensor.
pub fn launch_scatter(launcher: &Launcher, tensor: &RowTensor, tables: &Tables) -> Result<()> {
    let rows = tables.batch * tables.seq;
    if rows == 0 || has_no_words(tensor) {
        return Ok(());
    }
    let params = ScatterParams {
        tensor: *tensor,
        inv_indices: tables.inv_indices,
        // Both fit: KeyMask bounds batch · seq by i32::MAX.
        batch: tables.batch as i32,
        seq: tables.seq as i32,
    };
    let function = launcher.function(Entry::Scatter)?;
    // SAFETY: as in `launch_pack`; the metadata's packed rows are below the number that the packed
    // tensor has.
    unsafe { launcher.launch(function, row_grid(rows), ROW_COPY_THREADS, &params) }
}

/// Parameters of a tensor of such rows, padded and packed.
pub fn row_tensor(row: RowShape, padded: &Placed, packed: &Placed) -> RowTensor {
    let packed_strides = packed.word_strides();
    RowTensor {
        padded: padded.address,
        packed: packed.address,
        padded_strides: padded.word_strides(),
        packed_token_stride: packed_strides.token,
        packed_head_stride: packed_strides.head,
        // Both fit: checked by problem.
        heads: row.heads as i32,
        head_words: row.head_words as i32,
    }
}

fn row_shape(operand: &Operand<'_>) -> RowShape {
    RowShape::of(&operand.layout, operand.dtype.size())
}

fn has_no_words(tensor: &RowTensor) -> bool {
    tensor.heads == 0 || tensor.head_words == 0
}

/// Blocks for this many rows of one tensor.
pub fn row_grid(rows: usize) -> [u32; 3] {
    [rows.div_ceil(BLOCK_ROWS).clamp(1, MAX_BLOCKS) as u32, 1, 1]
}
