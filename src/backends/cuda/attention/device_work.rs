//! The work of calls with key ranges where the device alone knows the mask: which key tiles each query
//! tile needs, and which block computes it. As `range_tiles`, by the kernel of that name in
//! `kernels/rows/tile_lists.cu`. It is kept with the lists that it was made of; that of packed rows is
//! made by each call.

use std::mem::offset_of;

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::driver::transfer;
use crate::backends::cuda::kernels::module::Entry;
use crate::backends::cuda::kernels::params::{
    ELEMENT_BYTES, MAX_ORDERED_TILES, OrderedTile, RANGE_TILES_THREADS, RangeTile, RangeTilesParams, RangeWork,
    SECTION_BYTES, SectionSet, TileListCounts, TileListParams, TileListsParams,
};
use crate::backends::cuda::launcher::Launcher;
use crate::backends::cuda::tensors::key_ranges::PlacedRanges;
use crate::error::Result;

use super::call::PackedRows;
use super::range_tiles::Deal;
use super::split::{ITEM_CYCLES, STEP_CYCLES};

/// Tables start at multiples of this.
const TABLE_ALIGNMENT: u64 = 16;

/// Query tiles that a block of the kernel finds, one a warp.
const BLOCK_TILES: usize = RANGE_TILES_THREADS as usize / 32;

/// The work of calls with the same lists and key ranges. Whoever has it keeps it until the launch that
/// reads it, which keeps its memory.
#[derive(Debug)]
pub struct DeviceWork {
    _memory: CudaBuffer,
    /// A graph that makes it anew reads them.
    _ranges: PlacedRanges,
    params: RangeTilesParams,
}

impl DeviceWork {
    /// Launches the kernel that finds the work of padded tensors, by the lists that these parameters made.
    pub fn of_lists(launcher: &Launcher, lists: TileListsParams, ranges: &PlacedRanges, deal: Deal) -> Result<Self> {
        let params = RangeTilesParams {
            lists,
            ranges: ranges.params(),
            blocks_done: lists.counts + offset_of!(TileListCounts, blocks_done) as u64,
            ..Default::default()
        };
        // Not negative.
        Self::make(launcher, params, ranges, (deal, lists.seq_k as usize))
    }

    /// The same of packed sequences of at most so many keys.
    pub fn of_packed(
        launcher: &Launcher,
        rows: &PackedRows<'_>,
        ranges: &PlacedRanges,
        (deal, keys): (Deal, usize),
    ) -> Result<Self> {
        let counts = launcher.scratch(size_of::<TileListCounts>() as u64)?;
        // SAFETY: the buffer is new and has this size.
        unsafe { transfer::fill(&launcher.context, counts.address(), 0, size_of::<TileListCounts>() as u64) }?;
        let tile = deal.tile;
        let lists = TileListsParams {
            // All fit: batch · seq does.
            batch: rows.batch as i32,
            seq_q: rows.max_queries as i32,
            tile_queries: tile.rows as i32,
            tile_keys: tile.keys as i32,
            row_query_tiles: rows.max_queries.div_ceil(tile.rows as usize) as i32,
            ..Default::default()
        };
        let params = RangeTilesParams {
            lists,
            ranges: ranges.params(),
            cu_seqlens_q: rows.cu_seqlens_q.unwrap_or_default(),
            cu_seqlens_k: rows.cu_seqlens_k.unwrap_or_default(),
            blocks_done: counts.address() + offset_of!(TileListCounts, blocks_done) as u64,
            ..Default::default()
        };
        Self::make(launcher, params, ranges, (deal, keys))
    }

    fn make(
        launcher: &Launcher,
        params: RangeTilesParams,
        ranges: &PlacedRanges,
        (deal, keys): (Deal, usize),
    ) -> Result<Self> {
        // Not negative.
        let (batch, row_tiles) = (params.lists.batch as usize, params.lists.row_query_tiles as usize);
        let places = Places::of(batch * row_tiles, batch, deal);
        let memory = launcher.scratch(places.bytes)?;
        let start = memory.address();
        let params = RangeTilesParams {
            range_tiles: start + places.range_tiles,
            range_work: start + places.range_work,
            order: start + places.order,
            section_sets: start + places.section_sets,
            // All fit: a chip has few multiprocessors, and heads are counted in an i32.
            blocks: places.blocks as i32,
            heads: deal.heads as i32,
            group_size: deal.group_size as i32,
            key_bytes: deal.key_bytes() as i32,
            section_groups: section_groups(deal, keys, row_tiles) as i32,
            item_cycles: ITEM_CYCLES as i32,
            step_cycles: STEP_CYCLES as i32,
            ..params
        };
        let made = Self { _memory: memory, _ranges: ranges.clone(), params };
        made.launch(launcher)?;
        Ok(made)
    }

    /// Launches the kernel that makes it, again if its lists were made anew.
    pub fn launch(&self, launcher: &Launcher) -> Result<()> {
        let lists = &self.params.lists;
        let function = launcher.function(Entry::RangeTiles)?;
        // Not negative, and fits: batch · seq does.
        let tiles = lists.batch as usize * lists.row_query_tiles as usize;
        let blocks = tiles.div_ceil(BLOCK_TILES).max(1) as u32;
        // SAFETY: the lists, or `cu_seqlens`, are those of the call's batch rows, the ranges of its
        // queries, and each table has room for as many entries as these can need.
        unsafe { launcher.launch(function, [blocks, 1, 1], RANGE_TILES_THREADS, &self.params) }
    }

    /// Blocks of the launch that does the work.
    pub fn blocks(&self) -> usize {
        // Not negative.
        self.params.blocks as usize
    }

    /// Parameters of that launch.
    pub fn in_params(&self, params: TileListParams) -> TileListParams {
        let RangeTilesParams { ranges, range_tiles, range_work, .. } = self.params;
        TileListParams { ranges, range_tiles, range_work, parts: 1, ..params }
    }
}

/// How many batch rows of at most so many keys and query tiles are computed together: as many as have
/// keys and values that fit in L2. Of one row the device takes as many heads as fit, by its keys.
fn section_groups(deal: Deal, keys: usize, row_tiles: usize) -> usize {
    // As many as are put in order together.
    let most = (MAX_ORDERED_TILES / row_tiles.max(1)).max(1);
    (SECTION_BYTES / (deal.key_bytes() * keys).max(1)).clamp(1, most)
}

impl Deal {
    /// Bytes of one key, in keys and values of all heads.
    fn key_bytes(self) -> usize {
        2 * (self.heads / self.group_size.max(1)) * self.head_dim * ELEMENT_BYTES as usize
    }
}

/// Where the tables lie in their memory, in bytes.
#[derive(Debug, Clone, Copy)]
struct Places {
    range_tiles: u64,
    range_work: u64,
    order: u64,
    section_sets: u64,
    bytes: u64,
    blocks: usize,
}

impl Places {
    /// For at most so many query tiles of batch rows.
    fn of(tiles: usize, batch: usize, deal: Deal) -> Self {
        let items = tiles * deal.heads;
        let blocks = items.max(deal.zero_items).min(deal.blocks_at_once).max(1);
        // Each round has an entry for each block, and the last one only entries without work.
        let rounds = items.div_ceil(blocks) + 1;
        let mut bytes = 0;
        let mut take = |entries: usize, entry_bytes: usize| {
            let start = bytes;
            bytes += (entries as u64 * entry_bytes as u64).next_multiple_of(TABLE_ALIGNMENT);
            start
        };
        Self {
            range_work: take(rounds * blocks, size_of::<RangeWork>()),
            range_tiles: take(tiles, size_of::<RangeTile>()),
            order: take(tiles, size_of::<OrderedTile>()),
            section_sets: take(batch, size_of::<SectionSet>()),
            bytes,
            blocks,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::cuda::kernels::tiles::ListTile;
    use crate::error::Error;
    use crate::kernel::Kernel;

    fn deal(heads: usize, group_size: usize) -> Result<Deal> {
        let tile = ListTile::of(Kernel::CudaSm90, 128).ok_or(Error::HeadDim { got: 128 })?;
        Ok(Deal { tile, heads, group_size, head_dim: 128, blocks_at_once: 132, zero_items: 0, splits: false })
    }

    #[test]
    fn sections_of_several_rows_fit_in_l2() -> Result<()> {
        for (heads, group_size) in [(24, 1), (16, 4), (1, 1), (5, 5)] {
            for keys in [1_usize, 77, 512, 2048, 4096, 16_384, 1 << 20] {
                let row_tiles = keys.div_ceil(128);
                let groups = section_groups(deal(heads, group_size)?, keys, row_tiles);
                let bytes = groups * heads / group_size * keys * 2 * 128 * 2;
                assert!(groups == 1 || (groups * row_tiles <= MAX_ORDERED_TILES && bytes <= SECTION_BYTES), "{groups}");
            }
        }
        assert_eq!(section_groups(deal(24, 1)?, 2048, 17), 1);
        assert_eq!(section_groups(deal(24, 1)?, 128, 1), 10);
        Ok(())
    }

    #[test]
    fn there_is_room_for_all_work_and_its_end() -> Result<()> {
        for (tiles, heads, zero_items, blocks) in
            [(136, 24, 64, 132), (1, 1, 0, 1), (1, 1, 50, 50), (0, 4, 0, 1), (3, 40, 9, 120)]
        {
            let places = Places::of(tiles, 8, Deal { zero_items, ..deal(heads, 1)? });
            assert_eq!(places.blocks, blocks);
            let entries = (places.range_tiles - places.range_work) / size_of::<RangeWork>() as u64;
            assert!(entries >= (tiles * heads + blocks) as u64 && entries.is_multiple_of(blocks as u64), "{places:?}");
        }
        // As many as run at once, though more than a block of the kernel has threads.
        let many = Places::of(512, 8, Deal { blocks_at_once: 396, ..deal(12, 1)? });
        assert_eq!(many.blocks, 396);
        Ok(())
    }
}
