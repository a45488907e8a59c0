//! Device copies of masks and metadata, uploaded once and kept with them.

use std::ops::Range;
use std::sync::Arc;

use crate::backends::metadata::{Indices, InvIndices, MaskBits};
use crate::backends::rows::WORD_BYTES;
use crate::cache::{DeviceCopies, DeviceId};
use crate::error::Result;
use crate::host_vec;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::VarlenMeta;

use super::context::Context;
use super::transfer::uploaded;

/// `CuSeqlens::as_slice`.
#[derive(Debug)]
pub(super) struct CuSeqlensCopy(pub wgpu::Buffer);

/// Query tiles, in the order of the sequences or batch rows. Tiles of packed rows are kept with
/// their `CuSeqlens`, each as `[first row, rows, sequence, rows from the
/// first to the sequence's end]`. Tiles of padded rows are kept
/// with their `VarlenMeta`, each as `[first, rows, batch row, is dropped]`, where `first` counts
/// in the batch row's [`TokenLists`].
#[derive(Debug, Clone)]
pub(super) struct Tiles {
    pub buffer: wgpu::Buffer,
    /// Tiles of sequence `b` are `first[b]..first[b + 1]`.
    first: Arc<Vec<u32>>,
}

/// Tiles of at most `ROWS` rows. A type for each number, since the cache keeps one value per type.
#[derive(Debug)]
struct TilesOf<const ROWS: usize>(Tiles);

/// For each row of a mask the number of its kept tokens, then those tokens, then the dropped ones,
/// each ascending. `[B, 1 + S]`.
#[derive(Debug)]
pub(super) struct TokenLists {
    pub buffer: wgpu::Buffer,
    row_bytes: u64,
}

impl TokenLists {
    /// Lists of rows of `seq` tokens.
    pub fn new(buffer: wgpu::Buffer, seq: usize) -> Self {
        Self { buffer, row_bytes: 4 * (1 + seq as u64) }
    }

    /// Where the lists of a range of batch rows lie.
    pub fn bytes(&self, rows: &Range<usize>) -> Range<u64> {
        rows.start as u64 * self.row_bytes..rows.end as u64 * self.row_bytes
    }
}

impl Tiles {
    /// Tiles of which those of sequence `b` are `first[b]..first[b + 1]`.
    pub fn new(buffer: wgpu::Buffer, first: Vec<u32>) -> Self {
        Self { buffer, first: Arc::new(first) }
    }

    /// Where the tiles of a range of sequences lie.
    pub fn bytes(&self, sequences: &Range<usize>) -> Range<u64> {
        let Range { start, end } = self.of(sequences);
        u64::from(start) * WORD_BYTES..u64::from(end) * WORD_BYTES
    }

    /// Tiles of a range of sequences.
    pub fn of(&self, sequences: &Range<usize>) -> Range<u32> {
        self.first[sequences.start]..self.first[sequences.end]
    }
}

pub(super) fn mask_bits(context: &Context, mask: &KeyMask) -> Result<Arc<MaskBits<wgpu::Buffer>>> {
    MaskBits::on(context.id, mask, |bytes| uploaded(context, "mask", bytes))
}

pub(super) fn indices(context: &Context, meta: &VarlenMeta) -> Result<Arc<Indices<wgpu::Buffer>>> {
    Indices::on(context.id, meta, |bytes| uploaded(context, "indices", bytes))
}

pub(super) fn inv_indices(context: &Context, meta: &VarlenMeta) -> Result<Arc<InvIndices<wgpu::Buffer>>> {
    InvIndices::on(context.id, meta, |bytes| uploaded(context, "inv_indices", bytes))
}

pub(super) fn cu_seqlens(context: &Context, cu_seqlens: &CuSeqlens) -> Result<Arc<CuSeqlensCopy>> {
    cu_seqlens.copies().get_or_make(context.id, || {
        uploaded(context, "cu_seqlens", bytemuck::cast_slice(cu_seqlens.as_slice())).map(CuSeqlensCopy)
    })
}

pub(super) fn token_lists(context: &Context, meta: &VarlenMeta) -> Result<Arc<TokenLists>> {
    meta.copies().get_or_make(context.id, || {
        let buffer = uploaded(context, "token_lists", bytemuck::cast_slice(&list_tokens(meta)?))?;
        Ok(TokenLists::new(buffer, meta.seq()))
    })
}

/// Tiles of packed rows, of `tile_rows` rows each: a power of two from 16 to 256.
pub(super) fn packed_tiles(context: &Context, cu_seqlens: &CuSeqlens, tile_rows: usize) -> Result<Tiles> {
    kept_tiles(context, cu_seqlens.copies(), tile_rows, || cut_packed(cu_seqlens, tile_rows))
}

/// Tiles of padded rows, of `tile_rows` rows each: a power of two from 16 to 256.
pub(super) fn fused_tiles(context: &Context, query: &VarlenMeta, tile_rows: usize) -> Result<Tiles> {
    kept_tiles(context, query.copies(), tile_rows, || cut_fused(query, tile_rows))
}

fn kept_tiles(
    context: &Context,
    copies: &DeviceCopies,
    tile_rows: usize,
    make: impl FnOnce() -> Result<(Vec<[u32; 4]>, Vec<u32>)>,
) -> Result<Tiles> {
    let upload = || {
        let (tiles, first) = make()?;
        Ok(Tiles::new(uploaded(context, "tiles", bytemuck::cast_slice(&tiles))?, first))
    };
    fn of_rows<const ROWS: usize>(
        copies: &DeviceCopies,
        id: DeviceId,
        upload: impl FnOnce() -> Result<Tiles>,
    ) -> Result<Tiles> {
        Ok(copies.get_or_make(id, || upload().map(TilesOf::<ROWS>))?.0.clone())
    }
    match tile_rows {
        16 => of_rows::<16>(copies, context.id, upload),
        32 => of_rows::<32>(copies, context.id, upload),
        64 => of_rows::<64>(copies, context.id, upload),
        128 => of_rows::<128>(copies, context.id, upload),
        _ => of_rows::<256>(copies, context.id, upload),
    }
}

/// First row and number of rows of each tile of [`packed_tiles`], in its order.
pub(super) fn rows_of_packed_tiles(cu_seqlens: &CuSeqlens, tile_rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..cu_seqlens.batch()).flat_map(move |sequence| tiles_of(cu_seqlens.rows(sequence), tile_rows))
}

/// Packed rows of each tile of [`fused_tiles`], in its order; none of tiles of dropped queries.
pub(super) fn rows_of_fused_tiles(query: &VarlenMeta, tile_rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..query.batch()).flat_map(move |b| {
        let rows = query.cu_seqlens().rows(b);
        let dropped = (query.seq() - rows.len()).div_ceil(tile_rows);
        tiles_of(rows, tile_rows).chain(std::iter::repeat_n(0..0, dropped))
    })
}

fn tiles_of(rows: Range<usize>, tile_rows: usize) -> impl Iterator<Item = Range<usize>> {
    rows.clone().step_by(tile_rows).map(move |first| first..rows.end.min(first + tile_rows))
}

/// Packed rows of a range of batch rows.
pub(super) fn packed_rows(cu_seqlens: &CuSeqlens, batch_rows: &Range<usize>) -> Range<usize> {
    let values = cu_seqlens.as_slice();
    values[batch_rows.start] as usize..values[batch_rows.end] as usize
}

/// Rows of the longest sequence of a range.
pub(super) fn longest(cu_seqlens: &CuSeqlens, sequences: &Range<usize>) -> usize {
    sequences.clone().map(|sequence| cu_seqlens.rows(sequence).len()).max().unwrap_or(0)
}

// All numbers below fit a u32: KeyMask bounds batch · seq by i32::MAX, CuSeqlens rows and
// sequences.

pub(super) fn list_tokens(meta: &VarlenMeta) -> Result<Vec<u32>> {
    let mut lists = host_vec::reserve(meta.batch() * (1 + meta.seq()))?;
    for row in 0..meta.batch() {
        lists.push(meta.cu_seqlens().rows(row).len() as u32);
        let runs = meta.runs(row);
        runs.iter().for_each(|run| lists.extend(run.start..run.end() as u32));
        let mut covered = 0;
        for run in runs {
            lists.extend(covered..run.start);
            covered = run.end() as u32;
        }
        lists.extend(covered..meta.seq() as u32);
    }
    Ok(lists)
}

/// The tiles, and the first of each sequence.
fn cut_packed(cu_seqlens: &CuSeqlens, tile_rows: usize) -> Result<(Vec<[u32; 4]>, Vec<u32>)> {
    let count = (0..cu_seqlens.batch()).map(|sequence| cu_seqlens.rows(sequence).len().div_ceil(tile_rows)).sum();
    let (mut tiles, mut first) = (host_vec::reserve(count)?, host_vec::reserve(1 + cu_seqlens.batch())?);
    first.push(0);
    for sequence in 0..cu_seqlens.batch() {
        let rows = cu_seqlens.rows(sequence);
        let tile =
            |row: usize| [row as u32, tile_rows.min(rows.end - row) as u32, sequence as u32, (rows.end - row) as u32];
        tiles.extend(rows.clone().step_by(tile_rows).map(tile));
        first.push(tiles.len() as u32);
    }
    Ok((tiles, first))
}

/// The tiles, and the first of each batch row.
fn cut_fused(query: &VarlenMeta, tile_rows: usize) -> Result<(Vec<[u32; 4]>, Vec<u32>)> {
    let tiles_of = |row| {
        let kept = query.cu_seqlens().rows(row).len();
        kept.div_ceil(tile_rows) + (query.seq() - kept).div_ceil(tile_rows)
    };
    let count = (0..query.batch()).map(tiles_of).sum();
    let (mut tiles, mut first) = (host_vec::reserve(count)?, host_vec::reserve(1 + query.batch())?);
    first.push(0);
    for row in 0..query.batch() {
        let kept = query.cu_seqlens().rows(row).len();
        for (queries, is_dropped) in [(0..kept, 0), (kept..query.seq(), 1)] {
            let tile = |start: usize| [start as u32, tile_rows.min(queries.end - start) as u32, row as u32, is_dropped];
            tiles.extend(queries.clone().step_by(tile_rows).map(tile));
        }
        first.push(tiles.len() as u32);
    }
    Ok((tiles, first))
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a row may have one run")]
mod tests {
    use super::*;

    #[test]
    fn lists_hold_every_token_once_the_kept_ones_first() -> Result<()> {
        let mask = KeyMask::from_runs(6, &[vec![0..1, 3..5], vec![], vec![0..6]])?;
        let lists = list_tokens(&VarlenMeta::from_key_mask(&mask)?)?;
        assert_eq!(lists, [[3, 0, 3, 4, 1, 2, 5], [0, 0, 1, 2, 3, 4, 5], [6, 0, 1, 2, 3, 4, 5]].concat());
        Ok(())
    }

    #[test]
    fn tiles_hold_every_query_once() -> Result<()> {
        let (seq, full) = (150, 64);
        let mask = KeyMask::from_runs(seq, &[vec![3..70, 80..149], vec![], vec![0..150]])?;
        let (tiles, first) = cut_fused(&VarlenMeta::from_key_mask(&mask)?, 64)?;
        let kept = [[0, full, 0, 0], [64, full, 0, 0], [128, 8, 0, 0]];
        let dropped = [[136, 14, 0, 1], [0, full, 1, 1], [64, full, 1, 1], [128, 22, 1, 1]];
        let last = [[0, full, 2, 0], [64, full, 2, 0], [128, 22, 2, 0]];
        assert_eq!(tiles, [&kept[..], &dropped, &last].concat());
        assert_eq!(first, [0, 4, 7, 10]);
        Ok(())
    }
}
