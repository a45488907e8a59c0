//! The log-sum-exp of rows: where it lies, launches that write it, and what it merges.

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::kernels::module::Entry;
use crate::backends::cuda::kernels::params::{MergeParams, ROW_COPY_THREADS, ScatterLseParams};
use crate::backends::cuda::launcher::Launcher;
use crate::backends::rows::RowShape;
use crate::call::memory::Output;
use crate::call::op::{Merge, MergePart};
use crate::error::Result;

use super::copy::row_grid;
use super::metadata::Tables;
use super::placement::{Operand, Placed, place_input};

/// Blocks of the grid of a kernel that strides over elements.
const MAX_BLOCKS: usize = 1 << 16;

/// Where a log-sum-exp lies, f32; tokens are contiguous.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlacedLse {
    pub address: u64,
    /// In elements; packed rows have no batch rows.
    pub batch_stride: i64,
    pub head_stride: i64,
}

impl PlacedLse {
    /// `[B, H, S]` or `[H, total]`. The last dimension is contiguous: checked by problem, as for
    /// every tensor.
    pub fn of(lse: &Operand<'_>) -> Result<Self> {
        // Every stride fits: layouts end below an eighth of the range.
        let (batch_stride, head_stride) = match *lse.layout.strides() {
            [batch, head, _] => (batch as i64, head as i64),
            [head, _] => (0, head as i64),
            _ => (0, 0),
        };
        Ok(Self { address: lse.address(), batch_stride, head_stride })
    }
}

/// Copies the packed log-sum-exp to the valid rows of the padded one, and writes −∞ to the others.
pub fn scatter_lse(
    launcher: &Launcher,
    [packed, padded]: [&PlacedLse; 2],
    heads: usize,
    tables: &Tables,
) -> Result<()> {
    let params = ScatterLseParams {
        packed: packed.address,
        packed_head_stride: packed.head_stride,
        inv_indices: tables.inv_indices,
        ..padded_params(padded, [tables.batch, heads, tables.seq])
    };
    launch(launcher, &params)
}

/// Writes −∞ to every element of a `[B, H, S]` view.
pub fn no_keys(launcher: &Launcher, lse: &Output<'_>) -> Result<()> {
    let &[batch, heads, seq] = lse.layout.shape() else { return Ok(()) };
    let placed = PlacedLse::of(&Operand::output(launcher, "lse", lse)?)?;
    launch(launcher, &padded_params(&placed, [batch, heads, seq]))
}

/// All fit: heads are counted in an i32, and batch · seq is (checked by problem).
fn padded_params(padded: &PlacedLse, [batch, heads, seq]: [usize; 3]) -> ScatterLseParams {
    ScatterLseParams {
        padded: padded.address,
        batch_stride: padded.batch_stride,
        head_stride: padded.head_stride,
        batch: batch as i32,
        seq: seq as i32,
        heads: heads as i32,
        ..Default::default()
    }
}

fn launch(launcher: &Launcher, params: &ScatterLseParams) -> Result<()> {
    let elements = params.batch as usize * params.seq as usize * params.heads as usize;
    if elements == 0 {
        return Ok(());
    }
    // Fits: few blocks.
    let blocks = elements.div_ceil(ROW_COPY_THREADS as usize).min(MAX_BLOCKS) as u32;
    let function = launcher.function(Entry::ScatterLse)?;
    // SAFETY: the padded tensor has the problem's shape and lies inside its buffer (checked by
    // problem), the packed one has the tables' rows for each head (scratch is made so), and the
    // tables' packed rows are below their number. Without `inv_indices` nothing is read.
    unsafe { launcher.launch(function, [blocks, 1, 1], ROW_COPY_THREADS, params) }
}

/// Attention over the keys of both parts.
pub fn merge(launcher: &Launcher, merge: &Merge<'_>) -> Result<()> {
    let Merge { parts: [first, second], out, lse } = merge;
    let &[batch, seq, heads, _] = out.layout.shape() else { return Ok(()) };
    let row = RowShape::of(&out.layout, out.dtype.size());
    // The outputs first: one that is refused is refused before anything is launched.
    let mut scratch = Vec::new();
    let output = Operand::output(launcher, "out", out)?;
    let to = output.place_output(launcher, &mut scratch)?;
    let lse = lse.as_ref().map(|lse| PlacedLse::of(&Operand::output(launcher, "lse", lse)?)).transpose()?;
    let lse = lse.unwrap_or_default();
    let (out1, lse1) = place(launcher, first, ["out1", "lse1"], &mut scratch)?;
    let (out2, lse2) = place(launcher, second, ["out2", "lse2"], &mut scratch)?;
    let params = MergeParams {
        out1: out1.address,
        lse1: lse1.address,
        out2: out2.address,
        lse2: lse2.address,
        out: to.address,
        lse: lse.address,
        out1_strides: out1.word_strides(),
        out2_strides: out2.word_strides(),
        out_strides: to.word_strides(),
        lse1_batch_stride: lse1.batch_stride,
        lse1_head_stride: lse1.head_stride,
        lse2_batch_stride: lse2.batch_stride,
        lse2_head_stride: lse2.head_stride,
        lse_batch_stride: lse.batch_stride,
        lse_head_stride: lse.head_stride,
        // All fit: checked by problem.
        batch: batch as i32,
        seq: seq as i32,
        heads: heads as i32,
        head_words: row.head_words as i32,
    };
    let function = launcher.function(Entry::Merge { dtype: out.dtype })?;
    // SAFETY: all tensors have the shape of the output and lie inside their buffers, and no output
    // shares memory with another tensor (checked by problem). Rows start at words (placement).
    unsafe { launcher.launch(function, row_grid(batch * seq), ROW_COPY_THREADS, &params) }?;
    output.finish_output(launcher, &to)
}

fn place(
    launcher: &Launcher,
    part: &MergePart<'_>,
    [out, lse]: [&'static str; 2],
    scratch: &mut Vec<CudaBuffer>,
) -> Result<(Placed, PlacedLse)> {
    let placed = place_input(launcher, &Operand::input(launcher, out, &part.out)?, scratch)?;
    Ok((placed, PlacedLse::of(&Operand::input(launcher, lse, &part.lse)?)?))
}
