//! The work of calls with key ranges on the kernels with tile lists: which key tiles each query tile
//! needs, and which block computes it. `kernels/attention/tile_lists.cuh` says what the kernel is
//! told.
//!
//! Query tiles differ in length here: those of a causal call need from one key tile to all of them.
//! So the host deals them out as they would be taken, the longest first, by blocks that fetch the
//! next one when they are done. The order has to keep keys and values in L2, too: heads whose keys
//! fit there together make a section, and sections follow one another.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use crate::backends::cuda::kernels::params::{
    ELEMENT_BYTES, MAX_WARPGROUPS, RangeTile, RangeWork, SECTION_BYTES, SM90_WARPGROUP_ROWS,
};
use crate::backends::cuda::kernels::tiles::ListTile;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::{GROUP_ROWS, VarlenMeta};

use super::split::{self, Split};
use super::tile_lists::TileLists;

/// The query tiles of a call.
#[derive(Debug, Default)]
pub struct RangeTiles {
    pub tiles: Vec<RangeTile>,
    groups: Vec<Group>,
}

/// The tiles of a batch row or sequence, and its keys.
#[derive(Debug)]
struct Group {
    tiles: Range<usize>,
    keys: usize,
}

/// What the blocks do, one round after the other: each round has an entry for each block, and the
/// last one only entries without work.
#[derive(Debug, PartialEq)]
pub struct DealtWork {
    pub work: Vec<RangeWork>,
    pub blocks: usize,
    pub split: Split,
}

/// What the work is dealt out for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deal {
    pub tile: ListTile,
    pub heads: usize,
    /// Query heads of one key/value head.
    pub group_size: usize,
    pub head_dim: usize,
    pub blocks_at_once: usize,
    /// Blocks that have zeros to write.
    pub zero_items: usize,
    /// Whether query tiles may be split.
    pub splits: bool,
}

impl RangeTile {
    /// Key tiles.
    fn steps(&self) -> usize {
        // Fits: counts are not negative.
        (self.masked + self.end - self.first) as usize
    }
}

/// What the queries of a tile see: keys that all see, and those that some of each warpgroup see.
#[derive(Debug, Clone, Copy)]
struct Seen {
    all_first: u32,
    all_end: u32,
    of_warpgroups: [[u32; 2]; MAX_WARPGROUPS],
}

impl Seen {
    const NOTHING: Self = Self { all_first: 0, all_end: u32::MAX, of_warpgroups: [[u32::MAX, 0]; MAX_WARPGROUPS] };

    /// Adds ranges of rows of one warpgroup.
    fn add(&mut self, warpgroup: usize, ranges: &[[u32; 2]]) {
        let [some_first, some_end] = &mut self.of_warpgroups[warpgroup];
        for &[first, end] in ranges {
            // One that sees nothing.
            let is_empty = first >= end;
            *some_first = (*some_first).min(if is_empty { u32::MAX } else { first });
            *some_end = (*some_end).max(if is_empty { 0 } else { end });
            self.all_first = self.all_first.max(first);
            self.all_end = self.all_end.min(end);
        }
    }

    /// The keys that some query sees; `None` if none sees any.
    fn some(&self) -> Option<Range<u32>> {
        let all = self
            .of_warpgroups
            .iter()
            .fold(Range { start: u32::MAX, end: 0 }, |all, &[first, end]| all.start.min(first)..all.end.max(end));
        (all.end > 0).then_some(all)
    }

    /// `RangeTile::some_first` and `some_end`. All fit, as tokens are counted in an i32; what sees
    /// nothing has an end of 0.
    fn of_warpgroups(&self, at: usize) -> [i32; MAX_WARPGROUPS] {
        self.of_warpgroups.map(|some| some[at].min(i32::MAX as u32) as i32)
    }
}

impl RangeTiles {
    /// Every row of padded tensors.
    pub fn padded(ranges: &KeyRanges, batch: usize, keys: usize, tile: ListTile) -> Self {
        let mut made = Self::default();
        for row in 0..batch {
            // All rows share the first one's ranges, if there is no other.
            if row >= ranges.distinct_rows() {
                made.repeat(row);
            } else {
                made.add_rows(row, ranges.row(row), keys, tile);
            }
        }
        made
    }

    /// Packed sequences.
    pub fn packed(ranges: &KeyRanges, key: &CuSeqlens, tile: ListTile) -> Self {
        let mut made = Self::default();
        for sequence in 0..key.batch() {
            made.add_rows(sequence, ranges.row(sequence), key.rows(sequence).len(), tile);
        }
        made
    }

    /// Padded tensors by the lists of their metadata.
    pub fn listed(ranges: &KeyRanges, lists: &TileLists, query: &VarlenMeta, key: &VarlenMeta, tile: ListTile) -> Self {
        let mut made = Self::default();
        let query_groups = tile.rows as usize / GROUP_ROWS;
        for (group, batch) in lists.batches.iter().enumerate() {
            // All numbers below fit: KeyMask bounds batch · seq by i32::MAX.
            let row = batch.batch as usize;
            let own = ranges.row(row);
            let words = query.key_mask().row_words(row);
            let keys = ListedKeys::of(lists, group, key.seq(), tile.keys as usize);
            let before = made.tiles.len();
            for number in 0..batch.query_tiles as usize {
                let mut seen = Seen::NOTHING;
                let first = (batch.first_query_tile as usize + number) * query_groups;
                for (at, &start) in lists.query_groups[first..first + query_groups].iter().enumerate() {
                    let warpgroup = at * GROUP_ROWS / SM90_WARPGROUP_ROWS as usize;
                    let rows = (start as usize).min(query.seq())..(start as usize + GROUP_ROWS).min(query.seq());
                    let is_kept = |row: usize| words[row / 64] >> (row % 64) & 1 == 1;
                    if query.is_all_valid() {
                        seen.add(warpgroup, &own[rows]);
                    } else {
                        rows.filter(|&row| is_kept(row)).for_each(|row| seen.add(warpgroup, &own[row..=row]));
                    }
                }
                made.tiles.push(RangeTile { group: group as i32, tile: number as i32, ..keys.seen(&seen) });
            }
            made.groups.push(Group { tiles: before..made.tiles.len(), keys: key.cu_seqlens().rows(row).len() });
        }
        made
    }

    /// Adds the query tiles of rows one after another, against keys in a row.
    fn add_rows(&mut self, group: usize, own: &[[u32; 2]], keys: usize, tile: ListTile) {
        let before = self.tiles.len();
        for (number, rows) in own.chunks(tile.rows as usize).enumerate() {
            let mut seen = Seen::NOTHING;
            for (warpgroup, rows) in rows.chunks(SM90_WARPGROUP_ROWS as usize).enumerate() {
                seen.add(warpgroup, rows);
            }
            // Both fit: tokens are counted in an i32.
            self.tiles.push(RangeTile { group: group as i32, tile: number as i32, ..keys_in_a_row(&seen, tile.keys) });
        }
        self.groups.push(Group { tiles: before..self.tiles.len(), keys });
    }

    /// Adds the first group's tiles again.
    fn repeat(&mut self, group: usize) {
        let Some(Group { tiles, keys }) = self.groups.first() else { return };
        let (tiles, keys, before) = (tiles.clone(), *keys, self.tiles.len());
        // Fits: tokens are counted in an i32.
        self.tiles.extend_from_within(tiles);
        self.tiles[before..].iter_mut().for_each(|tile| tile.group = group as i32);
        self.groups.push(Group { tiles: before..self.tiles.len(), keys });
    }

    /// Deals the tiles of all heads out to blocks.
    pub fn deal(&self, deal: Deal) -> DealtWork {
        let order = self.order(deal);
        let items = order.len();
        let tail = items % deal.blocks_at_once;
        let fewest = order[items - tail..].iter().map(|item| item.steps).min().unwrap_or(0);
        let split = match deal.splits {
            true => Split::of(deal.tile, items, fewest, deal.blocks_at_once),
            false => Split::none(items),
        };
        let blocks = split.work_items().max(deal.zero_items).min(deal.blocks_at_once).max(1);
        // By the time at which they are done with what they have.
        let mut free: BinaryHeap<_> = (0..blocks).map(|block| Reverse((0, block))).collect();
        let mut of_blocks = vec![vec![]; blocks];
        let mut deal_out = |cycles: usize, work: RangeWork| {
            if let Some(mut soonest) = free.peek_mut() {
                let Reverse((time, block)) = &mut *soonest;
                of_blocks[*block].push(work);
                *time += cycles;
            }
        };
        for (number, item) in order.iter().enumerate() {
            // All fit: the kernel counts work in an i32.
            let work = RangeWork { tile: item.tile as i32, head: item.head as i32, part: -1, unused: 0 };
            match number.checked_sub(split.from) {
                None => deal_out(split::item_cycles(item.steps), work),
                Some(split_item) => {
                    let cycles = split::part_cycles(item.steps, split.parts);
                    let first = split_item * split.parts;
                    (first..first + split.parts)
                        .for_each(|part| deal_out(cycles, RangeWork { part: part as i32, ..work }));
                }
            }
        }
        let rounds = of_blocks.iter().map(Vec::len).max().unwrap_or(0) + 1;
        let none = RangeWork { tile: -1, head: 0, part: -1, unused: 0 };
        let round = |round: usize| of_blocks.iter().map(move |of_block| of_block.get(round).copied().unwrap_or(none));
        DealtWork { work: (0..rounds).flat_map(round).collect(), blocks, split }
    }

    /// The tiles of all heads in the order of work.
    fn order(&self, deal: Deal) -> Vec<Item> {
        let kv_heads = deal.heads / deal.group_size.max(1);
        let mut groups: Vec<&Group> = self.groups.iter().collect();
        let longest = |group: &Group| self.tiles[group.tiles.clone()].iter().map(RangeTile::steps).max();
        groups.sort_by_cached_key(|group| Reverse(longest(group)));
        let mut order = vec![];
        // Tiles of the section, each with some kv heads.
        let (mut section, mut left) = (vec![], SECTION_BYTES);
        let mut close = |section: &mut Vec<(usize, usize, Range<usize>)>| {
            section.sort_by_key(|&(steps, ..)| Reverse(steps));
            for (steps, tile, kv_heads) in section.drain(..) {
                let heads = kv_heads.start * deal.group_size..kv_heads.end * deal.group_size;
                order.extend(heads.map(|head| Item { tile, head, steps }));
            }
        };
        for group in groups {
            // Keys and values.
            let head_bytes = (2 * group.keys * deal.head_dim * ELEMENT_BYTES as usize).max(1);
            let mut first = 0;
            while first < kv_heads {
                if left < head_bytes && left < SECTION_BYTES {
                    close(&mut section);
                    left = SECTION_BYTES;
                }
                let end = kv_heads.min(first + (left / head_bytes).max(1));
                let of_tile = |tile: usize| (self.tiles[tile].steps(), tile, first..end);
                section.extend(group.tiles.clone().map(of_tile));
                left = left.saturating_sub((end - first) * head_bytes);
                first = end;
            }
        }
        close(&mut section);
        order
    }
}

/// A query tile of a head.
#[derive(Debug, Clone, Copy)]
struct Item {
    tile: usize,
    head: usize,
    steps: usize,
}

/// Tiles from the first key that some query sees on.
fn keys_in_a_row(seen: &Seen, keys: u32) -> RangeTile {
    let Some(Range { start: first, end }) = seen.some() else { return RangeTile::default() };
    let count = (end - first).div_ceil(keys);
    let inner = match seen.all_first < seen.all_end {
        true => (seen.all_first - first).div_ceil(keys)..(seen.all_end - first) / keys,
        false => count..count,
    };
    let inner = if inner.is_empty() { count..count } else { inner };
    // All fit: tokens are counted in an i32.
    RangeTile {
        first_key: first as i32,
        inner_first: inner.start as i32,
        inner_end: inner.end as i32,
        end: count as i32,
        some_first: seen.of_warpgroups(0),
        some_end: seen.of_warpgroups(1),
        ..Default::default()
    }
}

/// The key tiles of a batch row, from left to right.
struct ListedKeys<'a> {
    /// Starts of groups, those of a masked tile after those of another.
    masked: &'a [i32],
    tile_groups: usize,
    /// Starts of full tiles.
    full: &'a [i32],
    seq: usize,
    tile: usize,
}

impl<'a> ListedKeys<'a> {
    fn of(lists: &'a TileLists, group: usize, seq: usize, tile: usize) -> Self {
        let batch = lists.batches[group];
        let (first, tile_groups) = (batch.first_key_tile as usize, tile / GROUP_ROWS);
        let entries = &lists.key_tiles[first..first + batch.key_tiles as usize];
        let (masked, full) = entries.split_at(batch.masked_key_tiles as usize);
        // Masked tiles of a row follow one another.
        let first = masked.first().map_or(0, |&entry| !entry as usize) * tile_groups;
        Self { masked: &lists.key_groups[first..first + masked.len() * tile_groups], tile_groups, full, seq, tile }
    }

    fn seen(&self, seen: &Seen) -> RangeTile {
        let Some(Range { start: first, end }) = seen.some() else { return RangeTile::default() };
        let &Seen { all_first, all_end, .. } = seen;
        let (some_first, some_end) = (seen.of_warpgroups(0), seen.of_warpgroups(1));
        let (first, end, all_first, all_end) = (first as usize, end as usize, all_first as usize, all_end as usize);
        // The keys of a masked tile lie between the start of its first group and the end of its last.
        let is_before = |groups: &&[i32]| {
            let last = groups.iter().rev().map(|&start| start as usize).find(|&start| start < self.seq);
            last.is_none_or(|last| last + GROUP_ROWS <= first)
        };
        let is_within = |groups: &&[i32]| groups.first().is_some_and(|&start| (start as usize) < end);
        let tiles = || self.masked.chunks(self.tile_groups);
        let first_masked = tiles().take_while(is_before).count();
        let masked = tiles().skip(first_masked).take_while(is_within).count();
        let masked_tiles = self.masked.len() / self.tile_groups;
        let full = |is_left: &dyn Fn(usize) -> bool| self.full.partition_point(|&start| is_left(start as usize));
        let seen = full(&|start| start + self.tile <= first)..full(&|start| start < end);
        let inner = full(&|start| start < all_first)..full(&|start| start + self.tile <= all_end);
        let inner = inner.start.max(seen.start)..inner.end.min(seen.end);
        let inner = if inner.is_empty() { seen.end..seen.end } else { inner };
        // All fit: there are fewer than tokens. Full tiles come after masked ones.
        let entry = |full: usize| (masked_tiles + full) as i32;
        RangeTile {
            first_masked: first_masked as i32,
            masked: masked as i32,
            first: entry(seen.start),
            inner_first: entry(inner.start),
            inner_end: entry(inner.end),
            end: entry(seen.end.max(seen.start)),
            some_first,
            some_end,
            ..Default::default()
        }
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a row may have one run")]
mod tests {
    use super::super::tile_lists::Ends;
    use super::*;
    use crate::error::{Error, Result};
    use crate::kernel::Kernel;
    use crate::mask::key_mask::KeyMask;

    fn list_tile(head_dim: usize) -> Result<ListTile> {
        ListTile::of(Kernel::CudaSm90, head_dim).ok_or(Error::HeadDim { got: head_dim })
    }

    /// Tiles of different sizes.
    fn list_tiles() -> Result<Vec<ListTile>> {
        let sm90 = [64, 128, 256].map(list_tile);
        let sm100 = ListTile::of(Kernel::CudaSm100, 128).ok_or(Error::HeadDim { got: 128 });
        sm90.into_iter().chain([sm100]).collect()
    }

    fn deal(head_dim: usize, heads: usize, group_size: usize) -> Result<Deal> {
        let tile = list_tile(head_dim)?;
        Ok(Deal { tile, heads, group_size, head_dim, blocks_at_once: 132, zero_items: 0, splits: true })
    }

    /// Key positions of each key tile that a query tile needs, and whether every query is to see all.
    fn visited(made: &RangeTile, lists: Option<(&TileLists, usize)>, tile: ListTile) -> Vec<(Vec<usize>, bool)> {
        let in_a_row = |start: usize| (start..start + tile.keys as usize).collect::<Vec<_>>();
        let full = |at: i32| match lists {
            None => in_a_row((made.first_key + at * tile.keys as i32) as usize),
            Some((lists, group)) => {
                let entry = lists.key_tiles[(lists.batches[group].first_key_tile + at) as usize];
                assert!(entry >= 0, "{made:?}");
                in_a_row(entry as usize)
            }
        };
        let masked = (made.first_masked..made.first_masked + made.masked).filter_map(|at| {
            let (lists, group) = lists?;
            let entry = lists.key_tiles[(lists.batches[group].first_key_tile + at) as usize];
            assert!(entry < 0, "{made:?}");
            let groups = tile.keys as usize / GROUP_ROWS;
            let starts = &lists.key_groups[!entry as usize * groups..][..groups];
            Some((starts.iter().flat_map(|&start| start as usize..start as usize + GROUP_ROWS).collect(), false))
        });
        assert!(made.first <= made.inner_first && made.inner_first <= made.inner_end && made.inner_end <= made.end);
        let inner = made.inner_first..made.inner_end;
        masked.chain((made.first..made.end).map(|at| (full(at), inner.contains(&at)))).collect()
    }

    fn all_rules(of: [usize; 3]) -> Result<Vec<KeyRanges>> {
        let [batch, seq_q, seq_k] = of;
        let own: Vec<_> = (0..batch * seq_q).map(|at| at * 37 % (seq_k + 1)).map(|first| [first, seq_k]).collect();
        Ok(vec![
            KeyRanges::causal(of)?,
            KeyRanges::window(of, Some(64), Some(64))?,
            KeyRanges::window(of, Some(300), Some(0))?,
            KeyRanges::prefix(of, 170)?,
            KeyRanges::window(of, None, None)?,
            KeyRanges::from_ranges(of, &own)?,
            KeyRanges::from_ranges(of, &vec![[5, 5]; batch * seq_q])?,
        ])
    }

    /// Every kept key that a query sees is in one tile that its query tile needs; and inner tiles hold
    /// kept keys alone, that every query sees.
    fn expect_right(
        made: &RangeTiles,
        tile: ListTile,
        lists: Option<&TileLists>,
        queries_of: impl Fn(&RangeTile) -> Vec<(usize, [u32; 2])>,
        is_kept: impl Fn(usize, usize) -> bool,
    ) {
        for of_tile in &made.tiles {
            let group = of_tile.group as usize;
            let row = lists.map_or(group, |lists| lists.batches[group].batch as usize);
            let visited = visited(of_tile, lists.map(|lists| (lists, group)), tile);
            assert_eq!(visited.len(), of_tile.steps());
            // How often the tiles hold each key, and the keys of inner tiles.
            let mut times = vec![0; 2048];
            visited.iter().flat_map(|(keys, _)| keys).for_each(|&key| times[key] += 1);
            let inner = || visited.iter().filter(|(_, is_inner)| *is_inner).flat_map(|(keys, _)| keys);
            assert!(inner().all(|&key| is_kept(row, key)));
            let (least, most) = (inner().min().copied(), inner().max().copied());
            for (query, [first, end]) in queries_of(of_tile) {
                let mut own = (first as usize..end as usize).filter(|&key| is_kept(row, key));
                assert!(own.all(|key| times[key] == 1), "row {row}, query {query}: {of_tile:?}");
                assert!(least.is_none_or(|key| key >= first as usize) && most.is_none_or(|key| key < end as usize));
            }
        }
    }

    #[test]
    fn tiles_hold_what_queries_see_once() -> Result<()> {
        for (seq_q, seq_k) in [(700, 700), (130, 900), (900, 130)] {
            for tile in list_tiles()? {
                for ranges in all_rules([2, seq_q, seq_k])? {
                    let made = RangeTiles::padded(&ranges, 2, seq_k, tile);
                    assert_eq!(made.tiles.len(), 2 * seq_q.div_ceil(tile.rows as usize));
                    let rows = |of_tile: &RangeTile| {
                        let own = ranges.row(of_tile.group as usize).iter().copied().enumerate();
                        own.skip(of_tile.tile as usize * tile.rows as usize).take(tile.rows as usize).collect()
                    };
                    expect_right(&made, tile, None, rows, |_, key| key < seq_k);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn listed_tiles_hold_what_kept_queries_see_once() -> Result<()> {
        let seq = 900;
        let rows = [
            vec![0..seq],
            vec![213..seq],
            vec![3..5, 8..10, 18..35, 36..400, 560..seq],
            (0..seq / 3).map(|at| 3 * at..3 * at + 2).collect(),
            vec![],
        ];
        let meta = VarlenMeta::from_key_mask(&KeyMask::from_runs(seq, &rows)?)?;
        for tile in list_tiles()? {
            let lists = TileLists::new((&meta, &meta), &Ends::NONE, (tile.rows as usize, tile.keys as usize));
            for ranges in all_rules([rows.len(), seq, seq])? {
                let made = RangeTiles::listed(&ranges, &lists, &meta, &meta, tile);
                assert_eq!(made.tiles.len(), lists.query_tiles());
                let groups = tile.rows as usize / GROUP_ROWS;
                let queries = |of_tile: &RangeTile| {
                    let batch = lists.batches[of_tile.group as usize];
                    let first = (batch.first_query_tile + of_tile.tile) as usize * groups;
                    let row = batch.batch as usize;
                    let starts = lists.query_groups[first..first + groups].iter();
                    let of_groups = starts.flat_map(|&start| start as usize..start as usize + GROUP_ROWS);
                    let kept = of_groups.filter(|&at| at < seq && meta.key_mask().keeps(row, at));
                    kept.map(|at| (at, ranges.row(row)[at])).collect()
                };
                let is_kept = |row: usize, key: usize| key < seq && meta.key_mask().keeps(row, key);
                expect_right(&made, tile, Some(&lists), queries, is_kept);
            }
        }
        Ok(())
    }

    #[test]
    fn work_is_dealt_out_once_and_evenly() -> Result<()> {
        for (batch, seq, heads, group_size) in [(1, 16_384, 16, 1), (8, 2048, 16, 4), (3, 300, 5, 5), (1, 130, 2, 1)] {
            let deal = deal(128, heads, group_size)?;
            let made = RangeTiles::padded(&KeyRanges::causal([batch, seq, seq])?, batch, seq, deal.tile);
            let DealtWork { work, blocks, split } = made.deal(deal);
            assert!(blocks <= 132 && work.len().is_multiple_of(blocks));
            let mut times = vec![0; made.tiles.len() * heads];
            let mut cycles = vec![0; blocks];
            for (block, of_block) in cycles.iter_mut().enumerate() {
                let own: Vec<_> = work.iter().skip(block).step_by(blocks).collect();
                let count = own.iter().take_while(|item| item.tile >= 0).count();
                assert!(count < own.len() && own[count..].iter().all(|item| item.tile < 0));
                for item in &own[..count] {
                    times[item.tile as usize * heads + item.head as usize] += 1;
                    *of_block += split::item_cycles(made.tiles[item.tile as usize].steps());
                }
            }
            assert_eq!(split.parts, 1);
            assert!(times.iter().all(|&times| times == 1));
            let (all, most) = (cycles.iter().sum::<usize>(), cycles.iter().max().copied().unwrap_or(0));
            // No worse than the mean, or one item of the longest.
            let longest = made.tiles.iter().map(RangeTile::steps).max().map_or(0, split::item_cycles);
            assert!(most <= (all / blocks * 103 / 100).max(longest), "{most} of {all} cycles");
        }
        Ok(())
    }

    #[test]
    fn few_long_query_tiles_are_split_and_every_part_is_dealt_out() -> Result<()> {
        let deal = deal(128, 8, 1)?;
        let made = RangeTiles::padded(&KeyRanges::causal([1, 128, 16_384])?, 1, 16_384, deal.tile);
        let DealtWork { work, blocks, split } = made.deal(deal);
        assert!(split.parts > 1 && split.from == 0 && blocks == split.part_items());
        let mut parts: Vec<_> = work.iter().filter(|item| item.tile >= 0).map(|item| item.part).collect();
        parts.sort_unstable();
        assert_eq!(parts, (0..split.part_items() as i32).collect::<Vec<_>>());
        let whole = made.deal(Deal { splits: false, ..deal });
        assert!(whole.split.parts == 1 && whole.work.iter().all(|item| item.part < 0));
        Ok(())
    }

    #[test]
    fn heads_of_one_section_come_before_the_next_and_the_longest_first() -> Result<()> {
        // 8 MiB of keys and values each: two heads make a section.
        let deal = deal(128, 4, 1)?;
        let made = RangeTiles::padded(&KeyRanges::causal([1, 16_384, 16_384])?, 1, 16_384, deal.tile);
        let order = made.order(deal);
        let (first, second) = order.split_at(order.len() / 2);
        for (section, heads) in [(first, [0, 1]), (second, [2, 3])] {
            assert!(section.iter().all(|item| heads.contains(&item.head)));
            assert!(section.is_sorted_by(|a, b| a.steps >= b.steps));
        }
        Ok(())
    }
}
