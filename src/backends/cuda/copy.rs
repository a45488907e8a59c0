//! Launches of the kernels that move rows: pack, scatter, zero.

use crate::backends::rows::RowShape;
use crate::call::op::{Input, Output};
use crate::error::{Error, Result};
use crate::mask::meta::VarlenMeta;

use super::device::CudaDevice;
use super::metadata::Tables;
use super::module::Entry;
use super::params::{MAX_PACK_TENSORS, PackParams, RowTensor, ScatterParams};
use super::placement::{Operand, Placed};

/// Threads of a block of `pack_rows` and `scatter_rows`; `THREADS` of pack.cu.
const THREADS: u32 = 256;
/// Each warp takes rows of its own.
const BLOCK_ROWS: usize = THREADS as usize / 32;
/// Blocks in a grid's first dimension; kernels stride over what is left.
const MAX_BLOCKS: usize = i32::MAX as usize;

/// Parameters of a tensor of such rows in both its forms.
pub(super) fn row_tensor(row: RowShape, padded: &Placed, packed: &Placed) -> RowTensor {
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

impl CudaDevice {
    pub(super) fn pack(&self, pairs: &[(Input<'_>, Output<'_>)], meta: &VarlenMeta) -> Result<()> {
        let (mut scratch, mut tensors) = (Vec::new(), Vec::with_capacity(pairs.len()));
        // Outputs first: one that is refused is refused before anything is launched.
        let outputs = pairs.iter().map(|(_, to)| self.output("packed", to)?.place_output());
        for ((from, _), packed) in pairs.iter().zip(outputs.collect::<Result<Vec<_>>>()?) {
            let from = self.input("padded", from)?;
            let padded = self.place_input(&from, &mut scratch)?;
            tensors.push(row_tensor(row_shape(&from), &padded, &packed));
        }
        let tables = self.host_tables(meta)?;
        tensors.chunks(MAX_PACK_TENSORS).try_for_each(|tensors| self.launch_pack(tensors, &tables))
    }

    /// Packs up to [`MAX_PACK_TENSORS`] tensors of one batch.
    pub(super) fn launch_pack(&self, tensors: &[RowTensor], tables: &Tables) -> Result<()> {
        let words = tensors.iter().map(|tensor| tensor.heads as usize * tensor.head_words as usize).sum::<usize>();
        if tables.packed_rows == 0 || words == 0 {
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
        let function = self.function(Entry::Pack)?;
        let [blocks, ..] = row_grid(tables.packed_rows);
        // SAFETY: padded and packed tensors have the metadata's rows (checked by problem; scratch is made so), and their rows
        // start at words (placement); the metadata is this device's copy, whose indices are below batch · seq.
        unsafe { self.context.launch(function, [blocks, tensors.len() as u32, 1], THREADS, &params) }
    }

    pub(super) fn scatter(&self, packed: &Input<'_>, padded: &Output<'_>, meta: &VarlenMeta) -> Result<()> {
        let to = self.output("padded", padded)?;
        let padded = to.place_output()?;
        let mut scratch = Vec::new();
        let packed = self.place_input(&self.input("packed", packed)?, &mut scratch)?;
        self.launch_scatter(row_shape(&to), &packed, &padded, &self.host_tables(meta)?)
    }

    pub(super) fn launch_scatter(
        &self,
        row: RowShape,
        packed: &Placed,
        padded: &Placed,
        tables: &Tables,
    ) -> Result<()> {
        let rows = tables.batch * tables.seq;
        if rows == 0 || row.words() == 0 {
            return Ok(());
        }
        let params = ScatterParams {
            tensor: row_tensor(row, padded, packed),
            inv_indices: tables.inv_indices,
            // Both fit: KeyMask bounds batch · seq by i32::MAX.
            batch: tables.batch as i32,
            seq: tables.seq as i32,
        };
        let function = self.function(Entry::Scatter)?;
        // SAFETY: as in `launch_pack`; the metadata's packed rows are below the number that `packed` has.
        unsafe { self.context.launch(function, row_grid(rows), THREADS, &params) }
    }

    /// Zeros in every element of a view: of any shape and place if it is contiguous, of `[B, S, H, D]` otherwise.
    pub(super) fn zero(&self, out: &Output<'_>) -> Result<()> {
        let to = self.output("out", out)?;
        if to.layout.numel() == 0 {
            return Ok(());
        }
        if to.layout.is_contiguous() {
            let bytes = to.layout.numel() as u64 * to.dtype.size() as u64;
            // SAFETY: a contiguous view is the bytes from its address on, inside its buffer (checked by problem).
            return unsafe { self.context.fill(to.address(), 0, bytes) };
        }
        let &[batch, seq, ..] = to.layout.shape() else {
            return Err(Error::Rank { argument: "out", expected: "4: [B, S, H, D]", got: to.layout.rank() });
        };
        if to.layout.rank() != 4 {
            return Err(Error::Rank { argument: "out", expected: "4: [B, S, H, D]", got: to.layout.rank() });
        }
        let row = row_shape(&to);
        let function = self.function(Entry::Scatter)?;
        // The kernel counts rows in 32 bits.
        let batch_rows = (i32::MAX as usize / seq).max(1);
        for first in (0..batch).step_by(batch_rows) {
            let part = Operand { layout: to.layout.slice(0, first..batch.min(first + batch_rows))?, ..to };
            let padded = part.place_output()?;
            let batch = part.layout.shape()[0];
            let params = ScatterParams {
                tensor: row_tensor(row, &padded, &padded),
                inv_indices: 0,
                // Both fit: their product does, or batch is 1 and seq is checked by problem.
                batch: batch as i32,
                seq: seq as i32,
            };
            // SAFETY: the view lies inside its buffer (checked by problem), its rows start at words (placement), and without
            // `inv_indices` nothing is read.
            unsafe { self.context.launch(function, row_grid(batch * seq), THREADS, &params) }?;
        }
        Ok(())
    }
}

fn row_shape(operand: &Operand<'_>) -> RowShape {
    RowShape::of(&operand.layout, operand.dtype.size())
}

/// Blocks for so many rows of one tensor.
fn row_grid(rows: usize) -> [u32; 3] {
    [rows.div_ceil(BLOCK_ROWS).clamp(1, MAX_BLOCKS) as u32, 1, 1]
}
