//! Tile lists that the device makes, of masks that the host does not know: as `tile_lists`, by the
//! kernel in `kernels/rows/tile_lists.cu`. They are made anew by each call, since the metadata may be
//! built anew between two runs of a captured graph.

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::kernels::module::Entry;
use crate::backends::cuda::kernels::params::{
    BatchTiles, MAX_SEGMENTS, TILE_LISTS_THREADS, TileListCounts, TileListParams, TileListsParams, ZeroSpan,
};
use crate::backends::cuda::kernels::tiles::ListTile;
use crate::backends::cuda::launcher::Launcher;
use crate::backends::cuda::tensors::metadata;
use crate::call::op::DeviceTables;
use crate::error::Result;
use crate::mask::meta::GROUP_ROWS;

use super::tile_lists::{Ends, ZERO_ROWS};

/// Lists start at multiples of this.
const LIST_ALIGNMENT: u64 = 16;

/// The lists of one call. They live until the launch that reads them, which keeps their memory.
pub struct DeviceLists {
    _memory: CudaBuffer,
    params: TileListsParams,
}

impl DeviceLists {
    /// Launches the kernel that makes them for tiles of this size.
    pub fn make(
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
        let function = launcher.function(Entry::TileLists)?;
        // SAFETY: the bits are those of the metadata's batch rows and sequence lengths, and each list
        // has room for as many entries as these can need.
        unsafe { launcher.launch(function, [1; 3], TILE_LISTS_THREADS, &params) }?;
        Ok(Self { _memory: memory, params })
    }

    /// The parameters that made them.
    pub fn made_by(&self) -> &TileListsParams {
        &self.params
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
        let zero_spans = groups(seq_q) + 1 + seq_q / ZERO_ROWS + MAX_SEGMENTS - 1;
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
