//! Ranges of keys as the attention shader reads them: those of all queries, then two for each tile:
//! what some of its queries see, and what all see.
//!
//! ```text
//!    ranges   [ q0 q1 q2 q3 q4 ... | some all  some all ... ]     each first and end, two u32s
//!                                    └ tile 0   tile 1
//! ```

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::fifo_cache::FifoCache;
use crate::host_vec::reserve;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::{CuSeqlens, VarlenMeta};

use super::context::Context;
use super::dispatch::Window;
use super::metadata::{rows_of_fused_tiles, rows_of_packed_tiles};
use super::params::AttentionParams;
use super::transfer::uploaded;

/// Where a launch finds its ranges; nowhere if it has none.
pub(super) struct Ranges<'a> {
    context: &'a Context,
    copy: Option<Arc<RangesCopy>>,
}

/// The ranges of one list of tiles on a device.
#[derive(Debug)]
struct RangesCopy {
    buffer: wgpu::Buffer,
    /// Ranges before those of the next batch row; 0 if all share the first one's.
    row_stride: u32,
    unions_offset: u32,
    /// Tiles before those of the next batch row.
    unions_stride: u32,
    /// Keys from the first to the last that some query of a tile sees, of the tile with the most.
    most_keys: usize,
}

/// Which list of tiles: ids of the metadata of the fused path, and the rows of a tile.
type Key = (Option<[u64; 2]>, usize);

impl<'a> Ranges<'a> {
    /// Of every row of padded tensors.
    pub fn dense(context: &'a Context, ranges: Option<&KeyRanges>, tile_rows: usize) -> Result<Self> {
        Self::new(context, ranges, (None, tile_rows), |ranges| {
            let rows = ranges.distinct_rows();
            let tiles = (0..rows).flat_map(|b| ranges.row(b).chunks(tile_rows)).map(of_tile);
            let seq_q = if rows == 0 { 0 } else { ranges.row(0).len() };
            let lists = Lists::new((0..rows).flat_map(|b| ranges.row(b)).copied(), rows * seq_q, tiles)?;
            let strides = if rows > 1 { [seq_q, seq_q.div_ceil(tile_rows)] } else { [0, 0] };
            Ok((lists, strides))
        })
    }

    /// Of the kept queries of padded tensors in the order of their lists; keys are numbered in the
    /// order of theirs.
    pub fn fused(
        context: &'a Context,
        ranges: Option<&KeyRanges>,
        query: &VarlenMeta,
        key: &VarlenMeta,
        tile_rows: usize,
    ) -> Result<Self> {
        Self::new(context, ranges, (Some([query.id(), key.id()]), tile_rows), |ranges| {
            let numbered = ranges.of_packed_rows(query, key, false)?;
            let of_row = |b: usize| {
                let kept = numbered.row(b);
                kept.iter().copied().chain(std::iter::repeat_n([0, 0], query.seq() - kept.len()))
            };
            let tiles = rows_of_fused_tiles(query, tile_rows).map(|rows| of_tile(&numbered.packed_rows()[rows]));
            let count = query.batch() * query.seq();
            Ok((Lists::new((0..query.batch()).flat_map(of_row), count, tiles)?, [query.seq(), 0]))
        })
    }

    /// Of packed rows.
    pub fn packed(
        context: &'a Context,
        ranges: Option<&KeyRanges>,
        query: &CuSeqlens,
        tile_rows: usize,
    ) -> Result<Self> {
        Self::new(context, ranges, (None, tile_rows), |ranges| {
            let rows = ranges.packed_rows();
            let tiles = rows_of_packed_tiles(query, tile_rows).map(|tile| of_tile(&rows[tile]));
            Ok((Lists::new(rows.iter().copied(), rows.len(), tiles)?, [0, 0]))
        })
    }

    fn new(
        context: &'a Context,
        ranges: Option<&KeyRanges>,
        key: Key,
        make: impl FnOnce(&KeyRanges) -> Result<(Lists, [usize; 2])>,
    ) -> Result<Self> {
        let Some(ranges) = ranges else { return Ok(Self { context, copy: None }) };
        // One value of each type is kept, so all lists are in one.
        let copies = ranges.copies().get_or_make(context.id, || Ok(FifoCache::<Key, RangesCopy>::default()))?;
        let copy = copies.get_or_make(key, false, || {
            // All numbers fit a u32: ranges are of at most i32::MAX queries.
            let (Lists { both, unions_offset }, strides) = make(ranges)?;
            let of_tile = |some_and_all: &[[u32; 2]]| (some_and_all[0][1] - some_and_all[0][0]) as usize;
            let most_keys = both[unions_offset..].chunks_exact(2).map(of_tile).max().unwrap_or(0);
            let [row_stride, unions_stride] = strides.map(|stride| stride as u32);
            let buffer = uploaded(context, "ranges", bytemuck::cast_slice(&both))?;
            Ok(RangesCopy { buffer, row_stride, unions_offset: unions_offset as u32, unions_stride, most_keys })
        })?;
        let (limit, got) = (context.max_binding_bytes, copy.buffer.size());
        if got > limit {
            let limit_name = "max_storage_buffer_binding_size (bytes)";
            return Err(Error::TooLarge { argument: "ranges", limit_name, limit, got });
        }
        Ok(Self { context, copy: Some(copy) })
    }

    /// Keys that a tile meets at most, of `keys`.
    pub fn most_keys(&self, keys: usize) -> usize {
        self.copy.as_ref().map_or(keys, |copy| copy.most_keys.min(keys))
    }

    /// The binding, and the parameters with its places; the launch's first tile is number
    /// `first_tile` of the list.
    pub fn bind(&self, params: AttentionParams, first_tile: u32) -> Result<(Window, AttentionParams)> {
        let Some(copy) = &self.copy else { return Ok((self.context.unused_read(), params)) };
        let RangesCopy { ref buffer, row_stride, unions_offset, unions_stride, .. } = **copy;
        let unions_offset = unions_offset + 2 * first_tile;
        Ok((
            Window::whole(buffer),
            AttentionParams { ranges_stride: row_stride, unions_offset, unions_stride, ..params },
        ))
    }
}

/// Ranges, and those of tiles behind them.
struct Lists {
    both: Vec<[u32; 2]>,
    unions_offset: usize,
}

impl Lists {
    fn new(
        ranges: impl Iterator<Item = [u32; 2]>,
        count: usize,
        tiles: impl Iterator<Item = [[u32; 2]; 2]>,
    ) -> Result<Self> {
        // A tile has a row at least.
        let mut both = reserve(3 * count + 1)?;
        both.extend(ranges);
        let unions_offset = both.len();
        both.extend(tiles.flatten());
        // A binding is never empty.
        both.push([0, 0]);
        Ok(Self { both, unions_offset })
    }
}

/// What some query of a tile sees, and what all see; empty ranges for none.
fn of_tile(ranges: &[[u32; 2]]) -> [[u32; 2]; 2] {
    let seen = || ranges.iter().filter(|[first, end]| first < end);
    let first = seen().map(|range| range[0]).min().unwrap_or(0);
    let some = [first, seen().map(|range| range[1]).max().unwrap_or(first)];
    let [firsts, ends] = [0, 1].map(|side| ranges.iter().map(move |range| range[side]));
    [some, [firsts.max().unwrap_or(0), ends.min().unwrap_or(0)]]
}
