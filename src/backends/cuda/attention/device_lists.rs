//! Tile lists that the device makes, of masks that the host does not know: as `tile_lists`, by the
//! kernel in `kernels/rows/tile_lists.cu`. They are kept with the metadata that they were made of:
//!
//! | a graph holds a rebuild | a call | a rebuild |
//! |---|---|---|
//! | no | takes the lists that are kept, or keeps what it makes; a captured call makes its own | gives up what is kept |
//! | yes, captured after calls | takes those calls' lists, also while it is captured; makes others for itself | makes them anew with the metadata, in the graph too |
//!
//! Lists of a query's and another key's metadata are of one build of each, and not of metadata that a
//! graph rebuilds. All launches are in the order of the device's stream.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::kernels::module::Entry;
use crate::backends::cuda::kernels::params::{
    BatchTiles, MAX_SEGMENTS, TILE_LISTS_THREADS, TileListCounts, TileListParams, TileListsParams, ZeroSpan,
};
use crate::backends::cuda::kernels::tiles::ListTile;
use crate::backends::cuda::launcher::Launcher;
use crate::backends::cuda::tensors::key_ranges::PlacedRanges;
use crate::backends::cuda::tensors::metadata;
use crate::call::cost::ZERO_SPAN_ROWS;
use crate::call::op::DeviceTables;
use crate::error::Result;
use crate::fifo_cache::FifoCache;
use crate::mask::meta::GROUP_ROWS;

use super::device_work::DeviceWork;
use super::range_tiles::Deal;
use super::tile_lists::Ends;

/// Lists start at multiples of this.
const LIST_ALIGNMENT: u64 = 16;

/// The lists of calls with the same metadata, and what is made of them. Whoever has them keeps them until
/// the launch that reads them, which keeps their memory.
#[derive(Debug)]
pub struct DeviceLists {
    _memory: CudaBuffer,
    params: TileListsParams,
    /// What calls with key ranges need beside them, by the id of these and what the work is dealt out for.
    work: FifoCache<(u64, Deal), DeviceWork>,
    /// Whether a graph makes these lists anew, and the work that was there then.
    is_renewed: AtomicBool,
}

/// In place of the key's build, where the query's tables are the key's.
const OF_BOTH: u64 = 0;

/// Kept with the query's tables, by the build of the key's tables, the tile, and where segments end.
type ListsCopies = FifoCache<(u64, ListTile, Ends), DeviceLists>;

impl DeviceLists {
    /// Those for tiles of this size.
    pub fn of(
        launcher: &Launcher,
        (query, key): (&DeviceTables<'_>, &DeviceTables<'_>),
        ends: &Ends,
        tile: ListTile,
    ) -> Result<Arc<Self>> {
        let is_self = ptr::eq(query.kept, key.kept);
        let is_replayed = query.kept.is_replayed() || key.kept.is_replayed();
        let place = (if is_self { OF_BOTH } else { key.kept.build() }, tile, *ends);
        let make = || Self::make(launcher, (query, key), ends, tile);
        let Some(copies) = query.kept.copies() else { return make().map(Arc::new) };
        let copies = copies.get_or_make(launcher.id, || Ok(ListsCopies::default()))?;
        if !is_replayed && !launcher.context.is_captured()? {
            return copies.get_or_make(place, false, make);
        }
        match copies.get(&place) {
            Some(lists) if is_self && is_replayed => Ok(lists),
            _ => make().map(Arc::new),
        }
    }

    /// Makes all lists anew that calls take although a graph rebuilds the metadata, and the work of
    /// theirs; launched after the metadata.
    pub fn renew(launcher: &Launcher, tables: &DeviceTables<'_>) -> Result<()> {
        let Some(copies) = tables.kept.copies() else { return Ok(()) };
        let copies = copies.get_or_make(launcher.id, || Ok(ListsCopies::default()))?;
        for lists in copies.values_of(|&(key, ..)| key == OF_BOTH) {
            lists.is_renewed.store(true, Ordering::Relaxed);
            launch(launcher, &lists.params)?;
            for work in lists.work.values_of(|_| true) {
                work.launch(launcher)?;
            }
        }
        Ok(())
    }

    /// Launches the kernel that makes them.
    fn make(
        launcher: &Launcher,
        (query, key): (&DeviceTables<'_>, &DeviceTables<'_>),
        ends: &Ends,
        tile: ListTile,
    ) -> Result<Self> {
        let places = Places::of(query.batch, (query.seq, key.seq), (tile.rows as usize, tile.keys as usize));
        let memory = launcher.scratch(places.bytes)?;
        let start = memory.address();
        let (query_bits, query_words) = metadata::device_bits(launcher, query)?;
        let (key_bits, key_words) = metadata::device_bits(launcher, key)?;
        let params = TileListsParams {
            query_bits,
            key_bits,
            batches: start + places.batches,
            query_groups: start + places.query_groups,
            key_tiles: start + places.key_tiles,
            key_groups: start + places.key_groups,
            zero_spans: start + places.counts + size_of::<TileListCounts>() as u64,
            unordered: start + places.unordered,
            counts: start + places.counts,
            query_ends: ends.query,
            key_ends: ends.key,
            // All fit: batch · seq does, and there are fewer tiles.
            batch: query.batch as i32,
            seq_q: query.seq as i32,
            seq_k: key.seq as i32,
            query_words,
            key_words,
            tile_queries: tile.rows as i32,
            tile_keys: tile.keys as i32,
            row_query_tiles: places.row_query_tiles as i32,
            row_masked_tiles: places.row_masked_tiles as i32,
            row_key_tiles: places.row_key_tiles as i32,
        };
        launch(launcher, &params)?;
        Ok(Self { _memory: memory, params, work: FifoCache::default(), is_renewed: AtomicBool::new(false) })
    }

    /// The work of a call with key ranges: made, or as an earlier call has made it.
    pub fn work(&self, launcher: &Launcher, ranges: &PlacedRanges, deal: Deal) -> Result<Arc<DeviceWork>> {
        let place = (ranges.ranges.id(), deal);
        let make = || DeviceWork::of_lists(launcher, self.params, ranges, deal);
        match self.is_renewed.load(Ordering::Relaxed) {
            false => self.work.get_or_make(place, false, make),
            true => self.work.get(&place).map_or_else(|| make().map(Arc::new), Ok),
        }
    }

    /// Parameters of a launch, with these lists and the bits that they were made of.
    pub fn in_params(&self, params: TileListParams) -> TileListParams {
        let lists = &self.params;
        TileListParams {
            groups: lists.batch,
            zero_span_count: -1,
            key_bits: lists.key_bits,
            key_words: lists.key_words,
            row_bits: lists.query_bits,
            row_words: lists.query_words,
            batches: lists.batches,
            query_groups: lists.query_groups,
            key_tiles: lists.key_tiles,
            key_groups: lists.key_groups,
            zero_spans: lists.zero_spans,
            ..params
        }
    }
}

/// Launches the kernel that makes lists.
fn launch(launcher: &Launcher, params: &TileListsParams) -> Result<()> {
    let function = launcher.function(Entry::TileLists)?;
    // SAFETY: the bits are those of the metadata's batch rows and sequence lengths, and each list has room
    // for as many entries as these can need. Both are there: whoever has the lists has their memory, and
    // the metadata is the caller's.
    unsafe { launcher.launch(function, [1; 3], TILE_LISTS_THREADS, params) }
}

/// Where the lists lie in their memory, in bytes, and how many entries a batch row can need.
#[derive(Debug, Clone, Copy)]
struct Places {
    batches: u64,
    unordered: u64,
    query_groups: u64,
    key_groups: u64,
    key_tiles: u64,
    /// Followed by the zero spans.
    counts: u64,
    bytes: u64,
    row_query_tiles: usize,
    row_masked_tiles: usize,
    row_key_tiles: usize,
}

impl Places {
    fn of(batch: usize, (seq_q, seq_k): (usize, usize), (tile_queries, tile_keys): (usize, usize)) -> Self {
        // Groups do not overlap, and only the last of a segment ends early.
        let groups = |seq: usize| seq.div_ceil(GROUP_ROWS) + MAX_SEGMENTS - 1;
        let row_query_tiles = groups(seq_q).div_ceil(tile_queries / GROUP_ROWS);
        let row_masked_tiles = groups(seq_k).div_ceil(tile_keys / GROUP_ROWS);
        let row_key_tiles = row_masked_tiles + seq_k / tile_keys;
        // There is a span before each group and after the last one, and one more for each piece of
        // rows and each segment that a span is cut at.
        let zero_spans = groups(seq_q) + 1 + seq_q / ZERO_SPAN_ROWS + MAX_SEGMENTS - 1;
        let mut bytes = 0;
        let mut take = |entries: usize, entry_bytes: usize| {
            let start = bytes;
            bytes += (batch as u64 * entries as u64 * entry_bytes as u64).next_multiple_of(LIST_ALIGNMENT);
            start
        };
        let batches = take(1, size_of::<BatchTiles>());
        let unordered = take(1, size_of::<BatchTiles>());
        let query_groups = take(row_query_tiles * (tile_queries / GROUP_ROWS), size_of::<i32>());
        let key_groups = take(row_masked_tiles * (tile_keys / GROUP_ROWS), size_of::<i32>());
        let key_tiles = take(row_key_tiles, size_of::<i32>());
        let counts = take(zero_spans, size_of::<ZeroSpan>());
        bytes += size_of::<TileListCounts>() as u64;
        Self {
            batches,
            unordered,
            query_groups,
            key_groups,
            key_tiles,
            counts,
            bytes,
            row_query_tiles,
            row_masked_tiles,
            row_key_tiles,
        }
    }
}

// The kernel finds the number of spans where it would find a span before the first.
const _: () = assert!(size_of::<TileListCounts>() == size_of::<ZeroSpan>());

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a row may have one run")]
mod tests {
    use super::super::tile_lists::TileLists;
    use super::*;
    use crate::mask::key_mask::KeyMask;
    use crate::mask::meta::VarlenMeta;

    #[test]
    fn there_is_room_for_the_lists_of_every_mask() -> Result<()> {
        let mut ends = Ends::NONE;
        ends.query[..7].copy_from_slice(&[1, 18, 35, 52, 69, 86, 103]);
        ends.key[..7].copy_from_slice(&[1, 18, 35, 52, 69, 86, 103]);
        for seq in [1_usize, 15, 16, 17, 110, 129, 700] {
            let alternating = (0..seq.div_ceil(2)).map(|at| 2 * at..2 * at + 1).collect::<Vec<_>>();
            let sparse = (0..seq.div_ceil(17)).map(|at| 17 * at..17 * at + 1).collect::<Vec<_>>();
            let ends_alone = std::iter::once(0..1).chain((seq > 1).then_some(seq - 1..seq)).collect::<Vec<_>>();
            for runs in [vec![0..seq], vec![], alternating, sparse, ends_alone] {
                let meta = VarlenMeta::from_key_mask(&KeyMask::from_runs(seq, &[runs])?)?;
                for (queries, keys) in [(128, 160), (192, 128), (128, 112), (128, 80)] {
                    let places = Places::of(1, (seq, seq), (queries, keys));
                    for ends in [&Ends::NONE, &ends] {
                        let lists = TileLists::new((&meta, &meta), ends, (queries, keys));
                        let masked = lists.batches.iter().map(|row| row.masked_key_tiles as usize).sum::<usize>();
                        assert!(lists.query_tiles() <= places.row_query_tiles);
                        assert!(masked <= places.row_masked_tiles);
                        assert!(lists.key_tiles.len() - masked <= places.row_key_tiles - places.row_masked_tiles);
                        let span_bytes = places.bytes - places.counts - size_of::<TileListCounts>() as u64;
                        assert!(
                            size_of_val(&*lists.zero_spans) as u64 <= span_bytes,
                            "{seq}: {}",
                            lists.zero_spans.len()
                        );
                    }
                }
            }
        }
        Ok(())
    }
}
