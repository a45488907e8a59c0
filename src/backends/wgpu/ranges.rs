//! Ranges of keys as the attention shader reads them: those of all queries, then two for each tile:
//! what some of its queries see, and what all see.
//!
//! ```text
//!    ranges   [ q0 q1 q2 q3 q4 ... | some all  some all ... ]     each first and end, two u32s
//!                                    └ tile 0   tile 1
//! ```

use std::sync::Arc;

use crate::cache::DeviceCopies;
use crate::error::{Error, Result};
use crate::fifo_cache::FifoCache;
use crate::host_vec::reserve;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_mask::KeyMask;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;

use super::context::Context;
use super::device_meta::DeviceMeta;
use super::dispatch::{Launch, Window, groups_for};
use super::launches::Launches;
use super::metadata::{list_tokens, rows_of_fused_tiles, rows_of_packed_tiles};
use super::params::{AttentionParams, RangesParams};
use super::shader::{RangesOf, RangesStep, Shader};
use super::transfer::uploaded;

/// Where a launch finds its ranges; nowhere if it has none.
pub(super) struct Ranges<'a> {
    context: &'a Context,
    copy: Option<Arc<RangesCopy>>,
    /// The memory of ranges that are numbered anew in each call.
    scratch: Option<wgpu::Buffer>,
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
    /// Ranges before the queries, where they stand behind them.
    queries_offset: u32,
    /// Keys from the first to the last that some query of a tile sees, of the tile with the most.
    most_keys: usize,
}

/// The range of a query that a mask drops: no key, and told from one that sees none.
const DROPPED: [u32; 2] = [1, 0];

/// Which list of tiles: ids of the metadata of the fused path, or of the ranges where they are kept
/// with a mask; the rows of a tile; whether the queries stand behind the ranges.
type Key = (Option<[u64; 2]>, usize, bool);

impl<'a> Ranges<'a> {
    /// Of a call without ranges.
    pub fn none(context: &'a Context) -> Self {
        Self { context, copy: None, scratch: None }
    }

    /// Of every row of padded tensors.
    pub fn dense(context: &'a Context, ranges: Option<&KeyRanges>, tile_rows: usize) -> Result<Self> {
        let copies = ranges.map(KeyRanges::copies);
        Self::new(context, ranges.zip(copies), (None, tile_rows, false), |ranges| {
            let rows = ranges.distinct_rows();
            of_padded((0..rows).map(|b| ranges.row(b)), rows, tile_rows)
        })
    }

    /// The same, with [`DROPPED`] for the rows that a mask drops.
    pub fn dense_kept(
        context: &'a Context,
        ranges: Option<&KeyRanges>,
        kept: &KeyMask,
        tile_rows: usize,
    ) -> Result<Self> {
        let with_copies = ranges.map(|ranges| (ranges, kept.copies()));
        let key = (ranges.map(|ranges| [ranges.id(); 2]), tile_rows, false);
        Self::new(context, with_copies, key, |ranges| {
            let (batch, seq) = (kept.batch(), kept.seq());
            let mut hidden = reserve(batch * seq)?;
            for b in 0..batch {
                let seen = |(s, &range): (usize, &[u32; 2])| if kept.keeps(b, s) { range } else { DROPPED };
                hidden.extend(ranges.row(b).iter().enumerate().map(seen));
            }
            of_padded(hidden.chunks(seq.max(1)), batch, tile_rows)
        })
    }

    /// Of the kept queries of padded tensors in the order of their lists; keys are numbered in the
    /// order of theirs. With `lists_queries` the lists of all queries stand behind.
    pub fn fused(
        context: &'a Context,
        ranges: Option<&KeyRanges>,
        query: &VarlenMeta,
        key: &VarlenMeta,
        (tile_rows, lists_queries): (usize, bool),
    ) -> Result<Self> {
        let with_copies = ranges.map(|ranges| (ranges, ranges.copies()));
        Self::new(context, with_copies, (Some([query.id(), key.id()]), tile_rows, lists_queries), |ranges| {
            let numbered = ranges.of_packed_rows(query, key, false)?;
            let of_row = |b: usize| {
                let kept = numbered.row(b);
                kept.iter().copied().chain(std::iter::repeat_n([0, 0], query.seq() - kept.len()))
            };
            let tiles = rows_of_fused_tiles(query, tile_rows).map(|rows| of_tile(&numbered.packed_rows()[rows]));
            let count = query.batch() * query.seq();
            let mut lists = Lists::new((0..query.batch()).flat_map(of_row), count, tiles)?;
            if lists_queries {
                lists.add_queries(&list_tokens(query)?, query.seq())?;
            }
            Ok((lists, [query.seq(), 0]))
        })
    }

    /// Of packed rows.
    pub fn packed(
        context: &'a Context,
        ranges: Option<&KeyRanges>,
        query: &CuSeqlens,
        tile_rows: usize,
    ) -> Result<Self> {
        let copies = ranges.map(KeyRanges::copies);
        Self::new(context, ranges.zip(copies), (None, tile_rows, false), |ranges| {
            let rows = ranges.packed_rows();
            let tiles = rows_of_packed_tiles(query, tile_rows).map(|tile| of_tile(&rows[tile]));
            Ok((Lists::new(rows.iter().copied(), rows.len(), tiles)?, [0, 0]))
        })
    }

    fn new(
        context: &'a Context,
        ranges: Option<(&KeyRanges, &DeviceCopies)>,
        key: Key,
        make: impl FnOnce(&KeyRanges) -> Result<(Lists, [usize; 2])>,
    ) -> Result<Self> {
        let Some((ranges, copies)) = ranges else { return Ok(Self::none(context)) };
        // One value of each type is kept, so all lists are in one.
        let copies = copies.get_or_make(context.id, || Ok(FifoCache::<Key, RangesCopy>::default()))?;
        let copy = copies.get_or_make(key, false, || {
            // All numbers fit a u32: ranges are of at most i32::MAX queries.
            let (Lists { all, unions_offset, queries_offset }, strides) = make(ranges)?;
            let of_tile = |some_and_all: &[[u32; 2]]| (some_and_all[0][1] - some_and_all[0][0]) as usize;
            let most_keys = all[unions_offset..queries_offset].chunks_exact(2).map(of_tile).max().unwrap_or(0);
            let [row_stride, unions_stride] = strides.map(|stride| stride as u32);
            let buffer = uploaded(context, "ranges", bytemuck::cast_slice(&all))?;
            let [unions_offset, queries_offset] = [unions_offset, queries_offset].map(|offset| offset as u32);
            Ok(RangesCopy { buffer, row_stride, unions_offset, unions_stride, queries_offset, most_keys })
        })?;
        expect_bindable(context, copy.buffer.size())?;
        Ok(Self { context, copy: Some(copy), scratch: None })
    }

    /// Of queries and keys that only the device knows: numbered by launches before attention's, in
    /// scratch. With `lists_queries` the lists of all queries stand behind.
    pub fn of_device(
        context: &'a Context,
        ranges: Option<&KeyRanges>,
        (query, key): (&DeviceMeta, &DeviceMeta),
        of: RangesOf,
        (tile_rows, lists_queries): (usize, bool),
        launches: &mut Launches<'_>,
    ) -> Result<Self> {
        let given = Self::dense(context, ranges, tile_rows)?;
        let Some(copy) = given.copy else { return Ok(Self::none(context)) };
        let list = match of {
            RangesOf::Fused => Some(query.fused_tiles(tile_rows)?),
            RangesOf::Packed => Some(query.packed_tiles(tile_rows)?),
            RangesOf::Dense => None,
        };
        let (batch, queries) = (query.batch, query.batch * query.seq);
        let tiles_of_row = query.seq.div_ceil(tile_rows);
        let tiles = list.as_ref().map_or(batch * tiles_of_row, |list| list.of(&(0..batch)).len());
        let unions_offset = queries;
        let queries_offset = unions_offset + 2 * tiles;
        let count = queries_offset + if lists_queries { queries } else { 0 };
        let bytes = size_of::<[u32; 2]>() as u64 * count as u64;
        expect_bindable(context, bytes)?;
        let buffer = launches.take_scratch(bytes)?;
        let row_stride = if of == RangesOf::Packed { 0 } else { query.seq };
        // All fit: the buffer is below 2 GiB.
        let params = RangesParams {
            batch: batch as u32,
            seq_q: query.seq as u32,
            seq_k: key.seq as u32,
            given_stride: copy.row_stride,
            query_words: query.row_words,
            key_words: key.row_words,
            tiles: tiles as u32,
            tile_rows: tile_rows as u32,
            numbered_stride: row_stride as u32,
            unions_offset: unions_offset as u32,
            queries_offset: queries_offset as u32,
            lists_queries: u32::from(lists_queries),
        };
        let numbered = Window::whole(&buffer);
        let keys = [&key.bits, &key.word_starts, &key.cu_seqlens].map(Window::whole);
        let of_queries = match of {
            RangesOf::Fused => Window::whole(&query.token_lists.buffer),
            RangesOf::Packed => Window::whole(&query.indices),
            RangesOf::Dense => Window::whole(&query.bits),
        };
        let keys = keys.into_iter().filter(|_| of != RangesOf::Dense);
        let steps = [
            (
                RangesStep::Queries(of),
                [Window::whole(&copy.buffer)].into_iter().chain(keys).chain([of_queries, numbered.clone()]).collect(),
                queries,
            ),
            (
                RangesStep::Tiles { listed: list.is_some() },
                list.iter().map(|list| Window::whole(&list.buffer)).chain([numbered]).collect(),
                tiles,
            ),
        ];
        for (step, windows, count) in steps {
            launches.push(Launch {
                shader: Shader::Ranges(step),
                params: bytemuck::bytes_of(&params).to_vec(),
                windows,
                groups: groups_for(count as u64),
                operations: 0,
            });
        }
        let numbered = RangesCopy {
            buffer: buffer.clone(),
            row_stride: row_stride as u32,
            unions_offset: unions_offset as u32,
            unions_stride: if of == RangesOf::Dense { tiles_of_row as u32 } else { 0 },
            queries_offset: queries_offset as u32,
            most_keys: usize::MAX,
        };
        Ok(Self { context, copy: Some(Arc::new(numbered)), scratch: Some(buffer) })
    }

    /// Frees what the launches of a call numbered, after the last of them.
    pub fn finish(self, launches: &mut Launches<'_>) {
        launches.give_back(self.scratch);
    }

    /// Keys that a tile meets at most, of `keys`.
    pub fn most_keys(&self, keys: usize) -> usize {
        self.copy.as_ref().map_or(keys, |copy| copy.most_keys.min(keys))
    }

    /// Ranges before the queries that stand behind them.
    pub fn queries_offset(&self) -> u32 {
        self.copy.as_ref().map_or(0, |copy| copy.queries_offset)
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

fn expect_bindable(context: &Context, got: u64) -> Result<()> {
    let (argument, limit_name, limit) =
        ("ranges", "max_storage_buffer_binding_size (bytes)", context.max_binding_bytes);
    if got > limit { Err(Error::TooLarge { argument, limit_name, limit, got }) } else { Ok(()) }
}

/// Ranges, those of tiles behind them, and perhaps queries behind those.
struct Lists {
    all: Vec<[u32; 2]>,
    unions_offset: usize,
    queries_offset: usize,
}

impl Lists {
    fn new(
        ranges: impl Iterator<Item = [u32; 2]>,
        count: usize,
        tiles: impl Iterator<Item = [[u32; 2]; 2]>,
    ) -> Result<Self> {
        // A tile has a row at least.
        let mut all = reserve(3 * count + 1)?;
        all.extend(ranges);
        let unions_offset = all.len();
        all.extend(tiles.flatten());
        let queries_offset = all.len();
        // A binding is never empty.
        all.push([0, 0]);
        Ok(Self { all, unions_offset, queries_offset })
    }

    /// Puts the queries of token lists, `[B, 1 + S]`, behind the others, each in the place of a range.
    fn add_queries(&mut self, lists: &[u32], seq: usize) -> Result<()> {
        let mut all = reserve(self.queries_offset + lists.len())?;
        all.extend_from_slice(&self.all[..self.queries_offset]);
        all.extend(lists.chunks_exact(1 + seq).flat_map(|list| &list[1..]).map(|&token| [token, 0]));
        self.all = all;
        Ok(())
    }
}

/// The lists of all rows of padded tensors, and the strides of rows and of tiles between batch rows:
/// 0 if there is one row for all.
fn of_padded<'r>(
    rows: impl Iterator<Item = &'r [[u32; 2]]> + Clone,
    count: usize,
    tile_rows: usize,
) -> Result<(Lists, [usize; 2])> {
    let tiles = rows.clone().flat_map(|row| row.chunks(tile_rows)).map(of_tile);
    let seq_q = rows.clone().next().map_or(0, <[_]>::len);
    let lists = Lists::new(rows.flatten().copied(), count * seq_q, tiles)?;
    let strides = if count > 1 { [seq_q, seq_q.div_ceil(tile_rows)] } else { [0, 0] };
    Ok((lists, strides))
}

/// What some query of a tile sees, and what all see; empty ranges for none.
fn of_tile(ranges: &[[u32; 2]]) -> [[u32; 2]; 2] {
    let seen = || ranges.iter().filter(|[first, end]| first < end);
    let first = seen().map(|range| range[0]).min().unwrap_or(0);
    let some = [first, seen().map(|range| range[1]).max().unwrap_or(first)];
    let [firsts, ends] = [0, 1].map(|side| ranges.iter().map(move |range| range[side]));
    [some, [firsts.max().unwrap_or(0), ends.min().unwrap_or(0)]]
}
