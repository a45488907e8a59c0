//! Pack, scatter and zero fill: copies of whole rows, bit for bit, by element size.

use bytemuck::Pod;

use super::host::{self, HostInput, HostOutput, InputSegments, OutputSegments};
use super::threads::Threads;
use crate::call::memory::{Input, Output, Sink, Source};
use crate::call::segments::Segmented;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::{Layout, MAX_RANK};
use crate::mask::meta::VarlenMeta;

/// Rows that one task copies: enough to outweigh the cost of a task.
const ROWS_PER_TASK: usize = 64;
/// Bytes to copy for which it is worth to wake a thread.
const BYTES_OF_A_THREAD: usize = 1 << 18;

/// Padded `[B, S, H, D]`, in segments, to packed `[total_valid, H, D]`.
pub(super) fn pack(from: Segmented<Input<'_>>, to: Output<'_>, meta: &VarlenMeta, threads: &Threads) -> Result<()> {
    match to.dtype {
        DType::F32 => pack_elements::<u32>(from, to, meta, threads),
        DType::F16 | DType::Bf16 => pack_elements::<u16>(from, to, meta, threads),
    }
}

/// Packed `[total_valid, H, D]` to padded `[B, S, H, D]`, in segments; zeros elsewhere.
pub(super) fn scatter(from: Input<'_>, to: Segmented<Output<'_>>, meta: &VarlenMeta, threads: &Threads) -> Result<()> {
    match from.dtype {
        DType::F32 => scatter_elements::<u32>(from, to, meta, threads),
        DType::F16 | DType::Bf16 => scatter_elements::<u16>(from, to, meta, threads),
    }
}

/// A packed `[total_valid, H, D]` tensor in memory of its own.
pub(super) struct PackedScratch {
    words: Vec<u64>,
    layout: Layout,
    dtype: DType,
}

impl PackedScratch {
    /// The valid rows of a padded tensor.
    pub fn pack(padded: Segmented<Input<'_>>, meta: &VarlenMeta, threads: &Threads) -> Result<Self> {
        let (shape, dtype) =
            padded.iter().next().map_or((&[][..], DType::F32), |first| (first.layout.shape(), first.dtype));
        let &[_, _, heads, dim] = shape else {
            return Err(Error::Rank { argument: "padded", expected: "4: [B, S, H, D]", got: shape.len() });
        };
        let mut packed = Self::zeros(Layout::contiguous(&[meta.total_valid(), heads, dim])?, dtype)?;
        pack(padded, packed.output(), meta, threads)?;
        Ok(packed)
    }

    /// A tensor of the same size and type.
    pub fn like(other: &Self) -> Result<Self> {
        Self::zeros(other.layout, other.dtype)
    }

    /// The log-sum-exp of the valid rows, `[H, total_valid]`.
    pub fn lse(meta: &VarlenMeta, heads: usize) -> Result<Self> {
        Self::zeros(Layout::contiguous(&[heads, meta.total_valid()])?, DType::F32)
    }

    fn zeros(layout: Layout, dtype: DType) -> Result<Self> {
        let words = host::alloc_words(layout.numel() as u64 * dtype.size() as u64)?;
        Ok(Self { words, layout, dtype })
    }

    pub fn input(&self) -> Input<'_> {
        Input { memory: Source::Host(bytemuck::cast_slice(&self.words)), layout: self.layout, dtype: self.dtype }
    }

    pub fn output(&mut self) -> Output<'_> {
        Output { memory: Sink::Host(bytemuck::cast_slice_mut(&mut self.words)), layout: self.layout, dtype: self.dtype }
    }
}

/// Zeros in every element of a view of any rank.
pub(super) fn zero(to: Output<'_>, threads: &Threads) -> Result<()> {
    match to.dtype {
        DType::F32 => zero_elements::<u32>(to, threads),
        DType::F16 | DType::Bf16 => zero_elements::<u16>(to, threads),
    }
}

fn pack_elements<T: Pod + Send + Sync>(
    from: Segmented<Input<'_>>,
    to: Output<'_>,
    meta: &VarlenMeta,
    threads: &Threads,
) -> Result<()> {
    let (from, to, seq) = (InputSegments::<T>::inputs(from)?, HostOutput::<T>::new(to)?, meta.seq());
    let &[_, heads, dim] = to.layout.shape() else { return Ok(()) };
    let indices = meta.indices()?;
    let team = threads.team(worth(indices.len(), heads * dim * size_of::<T>()));
    team.for_each(indices.len(), ROWS_PER_TASK, |packed| {
        let flat = indices[packed];
        let (b, s) = (flat as usize / seq, flat as usize % seq);
        let rows = from.batch_rows(b);
        for h in 0..heads {
            // SAFETY: each packed row is visited once, and rows of the output do not overlap
            // (checked by problem).
            let row = unsafe { to.row(&[packed, h], dim) };
            row.copy_from_slice(rows.row(s, h, dim));
        }
    });
    Ok(())
}

fn scatter_elements<T: Pod + Send + Sync>(
    from: Input<'_>,
    to: Segmented<Output<'_>>,
    meta: &VarlenMeta,
    threads: &Threads,
) -> Result<()> {
    let (from, to, seq) = (HostInput::<T>::new(from)?, OutputSegments::<T>::outputs(to)?, meta.seq());
    let &[_, heads, dim] = from.layout.shape() else { return Ok(()) };
    let inv_indices = meta.inv_indices()?;
    let team = threads.team(worth(inv_indices.len(), heads * dim * size_of::<T>()));
    team.for_each(inv_indices.len(), ROWS_PER_TASK, |flat| {
        let packed = inv_indices[flat];
        let rows = to.batch_rows(flat / seq);
        for h in 0..heads {
            // SAFETY: each padded row is visited once, and rows of the output do not overlap
            // (checked by problem).
            let row = unsafe { rows.row(flat % seq, h, dim) };
            match usize::try_from(packed) {
                Ok(packed) => row.copy_from_slice(from.row(&[packed, h], dim)),
                Err(_) => row.fill(T::zeroed()),
            }
        }
    });
    Ok(())
}

fn zero_elements<T: Pod + Send + Sync>(to: Output<'_>, threads: &Threads) -> Result<()> {
    let to = HostOutput::<T>::new(to)?;
    // Row by row, so that what lies between the rows of a strided view keeps its contents.
    let Some((&len, leading)) = to.layout.shape().split_last() else { return Ok(()) };
    let rows: usize = leading.iter().product();
    let team = threads.team(worth(rows, len * size_of::<T>()));
    team.for_each(rows, ROWS_PER_TASK, |row| {
        let mut position = [0; MAX_RANK];
        let mut rest = row;
        for (index, &size) in position[..leading.len()].iter_mut().zip(leading).rev() {
            *index = rest % size;
            rest /= size;
        }
        // SAFETY: each row is visited once, and rows of the output do not overlap (checked by
        // problem).
        let row = unsafe { to.row(&position[..leading.len()], len) };
        row.fill(T::zeroed());
    });
    Ok(())
}

/// Threads that are worth to wake for `rows` of so many bytes.
pub(super) fn worth(rows: usize, bytes: usize) -> usize {
    rows.saturating_mul(bytes) / BYTES_OF_A_THREAD
}
