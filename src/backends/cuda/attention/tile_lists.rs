//! The lists by which the sm90 and the sm100 kernel read padded tensors: which rows make their
//! tiles, and which rows they only write as zeros. `kernels/attention/tile_lists.cuh` says what
//! each list means; here they are made from the runs of the metadata.

use std::ops::Range;

use crate::backends::cuda::kernels::params::{BatchTiles, MAX_SEGMENTS, ZeroSpan};
use crate::call::cost::ZERO_SPAN_ROWS;
use crate::mask::key_mask::Run;
use crate::mask::meta::{GROUP_ROWS, VarlenMeta};

/// Where the tensors of a call are cut into segments: the first row past each segment, counted over
/// all; the largest number for the last segment and those that there are not. No segment is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ends {
    pub query: [i32; MAX_SEGMENTS],
    pub key: [i32; MAX_SEGMENTS],
}

impl Ends {
    /// Of whole tensors.
    pub const NONE: Self = Self { query: [i32::MAX; MAX_SEGMENTS], key: [i32::MAX; MAX_SEGMENTS] };
}

/// The end of a row's segment.
fn end_of(ends: &[i32; MAX_SEGMENTS], row: usize) -> usize {
    // Never negative.
    ends.iter().map(|&end| end as usize).find(|&end| end > row).unwrap_or(usize::MAX)
}

/// The lists of one call. All numbers fit an `i32`: `KeyMask` bounds batch · seq by `i32::MAX`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TileLists {
    /// The most work first.
    pub batches: Vec<BatchTiles>,
    pub query_groups: Vec<i32>,
    pub key_tiles: Vec<i32>,
    pub key_groups: Vec<i32>,
    pub zero_spans: Vec<ZeroSpan>,
}

impl TileLists {
    /// For tiles of these numbers of query rows and keys, both multiples of [`GROUP_ROWS`].
    pub fn new(
        (query, key): (&VarlenMeta, &VarlenMeta),
        ends: &Ends,
        (tile_queries, tile_keys): (usize, usize),
    ) -> Self {
        let mut lists = Self::default();
        // All numbers below fit: KeyMask bounds batch · seq by i32::MAX.
        for row in 0..query.batch() {
            let first_query_tile = lists.query_groups.len() / (tile_queries / GROUP_ROWS);
            let first_key_tile = lists.key_tiles.len();
            let query_tiles = lists.cover_queries(row, query.runs(row), &ends.query, query.seq(), tile_queries);
            if query_tiles == 0 {
                continue;
            }
            let masked_key_tiles = lists.cover_keys(key.runs(row), &ends.key, key.seq(), tile_keys);
            lists.batches.push(BatchTiles {
                batch: row as i32,
                query_tiles: query_tiles as i32,
                first_query_tile: first_query_tile as i32,
                key_tiles: (lists.key_tiles.len() - first_key_tile) as i32,
                first_key_tile: first_key_tile as i32,
                masked_key_tiles: masked_key_tiles as i32,
            });
        }
        // The longest work first: a row that starts late must not be a long one.
        lists.batches.sort_by_key(|batch| std::cmp::Reverse((batch.key_tiles, batch.query_tiles)));
        lists
    }

    /// Pairs of tiles: the work of one head, in tiles.
    #[cfg(test)]
    fn tile_pairs(&self) -> u64 {
        self.batches.iter().map(|batch| batch.query_tiles as u64 * batch.key_tiles as u64).sum()
    }

    /// Query tiles of all batch rows.
    pub fn query_tiles(&self) -> usize {
        self.batches.iter().map(|batch| batch.query_tiles as usize).sum()
    }

    /// Adds the query tiles and the zeros of a batch row; returns the number of tiles.
    fn cover_queries(
        &mut self,
        row: usize,
        runs: &[Run],
        ends: &[i32; MAX_SEGMENTS],
        seq: usize,
        tile: usize,
    ) -> usize {
        let (before, mut covered) = (self.query_groups.len(), 0);
        for run in runs {
            let mut start = covered.max(run.start as usize);
            while start < run.end() {
                self.zeros(row, ends, covered..start);
                self.query_groups.push(start as i32);
                start = end_of(ends, start).min(start + GROUP_ROWS);
                covered = start;
            }
        }
        self.zeros(row, ends, covered..seq);
        fill_up(&mut self.query_groups, before, tile, seq);
        (self.query_groups.len() - before) / (tile / GROUP_ROWS)
    }

    fn zeros(&mut self, row: usize, ends: &[i32; MAX_SEGMENTS], span: Range<usize>) {
        let mut first = span.start;
        while first < span.end {
            let end = span.end.min(first + ZERO_SPAN_ROWS).min(end_of(ends, first));
            let rows = (end - first) as i32;
            self.zero_spans.push(ZeroSpan { batch: row as i32, first_query: first as i32, rows, unused: 0 });
            first = end;
        }
    }

    /// Adds the key tiles of a batch row; returns the number of masked ones, which come first.
    fn cover_keys(&mut self, runs: &[Run], ends: &[i32; MAX_SEGMENTS], seq: usize, tile: usize) -> usize {
        let (before, first_tile, mut covered) = (self.key_groups.len(), self.key_tiles.len(), 0);
        for run in runs {
            let mut start = covered.max(run.start as usize);
            while start < run.end() {
                let end = end_of(ends, start);
                if run.end().min(end) - start >= tile {
                    self.key_tiles.push(start as i32);
                    start += tile;
                } else {
                    self.key_groups.push(start as i32);
                    start = end.min(start + GROUP_ROWS);
                }
                covered = start;
            }
        }
        fill_up(&mut self.key_groups, before, tile, seq);
        let tile_groups = tile / GROUP_ROWS;
        let masked = before / tile_groups..self.key_groups.len() / tile_groups;
        let masked_tiles = masked.len();
        self.key_tiles.splice(first_tile..first_tile, masked.map(|tile| !(tile as i32)));
        masked_tiles
    }
}

/// Fills up the last tile with groups that start at the end of the row, past its last token.
fn fill_up(groups: &mut Vec<i32>, before: usize, tile: usize, seq: usize) {
    let whole = before + (groups.len() - before).next_multiple_of(tile / GROUP_ROWS);
    groups.resize(whole, seq as i32);
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a row may have one run")]
mod tests {
    use super::*;
    use crate::call::cost;
    use crate::error::Result;
    use crate::mask::key_mask::KeyMask;

    /// Which rows of each batch row the lists name as computed, and as zeros.
    fn covered(lists: &TileLists, batch: usize, seq: usize, tile: usize) -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
        let (mut computed, mut zeros) = (vec![vec![0; seq]; batch], vec![vec![0; seq]; batch]);
        for row in &lists.batches {
            let groups = tile / GROUP_ROWS;
            let first = row.first_query_tile as usize * groups;
            for &start in &lists.query_groups[first..first + row.query_tiles as usize * groups] {
                (start as usize..(start as usize + GROUP_ROWS).min(seq))
                    .for_each(|at| computed[row.batch as usize][at] += 1);
            }
        }
        for span in &lists.zero_spans {
            assert!((1..=ZERO_SPAN_ROWS as i32).contains(&span.rows));
            for at in span.first_query..span.first_query + span.rows {
                zeros[span.batch as usize][at as usize] += 1;
            }
        }
        (computed, zeros)
    }

    fn keys(lists: &TileLists, row: &BatchTiles, seq: usize, tile: usize) -> Vec<(u32, bool)> {
        let mut seen = vec![(0, false); seq];
        let first = row.first_key_tile as usize;
        for &entry in &lists.key_tiles[first..first + row.key_tiles as usize] {
            let starts = match entry {
                start @ 0.. => vec![(start as usize, tile, true)],
                masked => {
                    let first = !masked as usize * (tile / GROUP_ROWS);
                    let groups = &lists.key_groups[first..first + tile / GROUP_ROWS];
                    groups.iter().map(|&start| (start as usize, GROUP_ROWS, false)).collect()
                }
            };
            for (start, rows, is_full) in starts {
                for key in &mut seen[start.min(seq)..(start + rows).min(seq)] {
                    *key = (key.0 + 1, is_full);
                }
            }
        }
        seen
    }

    #[test]
    fn every_row_is_computed_or_zeroed_once_and_every_kept_key_read_once() -> Result<()> {
        let seq = 700;
        let spans = [0..37, 40..41, 44..60, 200..461, 690..700];
        let rows = [vec![0..seq], vec![], spans.to_vec(), vec![699..700], vec![5..6, 300..640]];
        let mask = KeyMask::from_runs(seq, &rows)?;
        let meta = VarlenMeta::from_key_mask(&mask)?;
        for (queries, tile) in [(128, 160), (192, 128), (128, 112), (128, 80)] {
            let lists = TileLists::new((&meta, &meta), &Ends::NONE, (queries, tile));
            let (computed, zeros) = covered(&lists, rows.len(), seq, queries);
            for row in 0..rows.len() {
                for at in 0..seq {
                    assert_eq!(computed[row][at] + zeros[row][at], 1, "row {row}, query {at}");
                    assert!(zeros[row][at] == 0 || !mask.keeps(row, at), "row {row}: query {at} is valid");
                }
            }
            for row in &lists.batches {
                let first = row.first_key_tile as usize;
                let entries = &lists.key_tiles[first..first + row.key_tiles as usize];
                let (masked, full) = entries.split_at(row.masked_key_tiles as usize);
                assert!(masked.iter().all(|&entry| entry < 0) && full.iter().all(|&entry| entry >= 0));
                let batch = row.batch as usize;
                for (at, (times, is_full)) in keys(&lists, row, seq, tile).into_iter().enumerate() {
                    assert!(times <= 1 && (times == 1 || !mask.keeps(batch, at)), "row {batch}, key {at}");
                    assert!(!is_full || mask.keeps(batch, at), "row {batch}: key {at} stands in a full tile");
                }
            }
            assert_eq!(lists.batches.len(), 4);
            assert!(lists.batches.windows(2).all(|pair| pair[0].key_tiles >= pair[1].key_tiles));
        }
        Ok(())
    }

    #[test]
    fn nothing_crosses_the_end_of_a_segment() -> Result<()> {
        let seq = 700;
        let rows = [vec![0..seq], vec![], vec![0..37, 40..461, 690..700]];
        let meta = VarlenMeta::from_key_mask(&KeyMask::from_runs(seq, &rows)?)?;
        let mut ends = Ends::NONE;
        ends.query[..3].copy_from_slice(&[7, 50, 691]);
        ends.key[..4].copy_from_slice(&[1, 100, 260, 420]);
        let rows_of = |ends: &[i32; MAX_SEGMENTS], start: usize, rows: usize| rows.min(end_of(ends, start) - start);
        for (queries, tile) in [(128, 160), (192, 128)] {
            let lists = TileLists::new((&meta, &meta), &ends, (queries, tile));
            let mut times = [vec![vec![0; seq]; rows.len()], vec![vec![0; seq]; rows.len()]];
            let mut count = |side: usize, row: i32, start: usize, rows: usize| {
                (start..(start + rows).min(seq)).for_each(|at| times[side][row as usize][at] += 1);
            };
            for span in &lists.zero_spans {
                let (first, rows) = (span.first_query as usize, span.rows as usize);
                assert_eq!(rows_of(&ends.query, first, rows), rows);
                count(0, span.batch, first, rows);
            }
            for row in &lists.batches {
                let (groups, tile_groups) = (queries / GROUP_ROWS, tile / GROUP_ROWS);
                let first = row.first_query_tile as usize * groups;
                for &start in &lists.query_groups[first..first + row.query_tiles as usize * groups] {
                    count(0, row.batch, start as usize, rows_of(&ends.query, start as usize, GROUP_ROWS));
                }
                let first = row.first_key_tile as usize;
                for &entry in &lists.key_tiles[first..first + row.key_tiles as usize] {
                    if entry >= 0 {
                        assert_eq!(rows_of(&ends.key, entry as usize, tile), tile);
                        count(1, row.batch, entry as usize, tile);
                        continue;
                    }
                    for &start in &lists.key_groups[!entry as usize * tile_groups..][..tile_groups] {
                        count(1, row.batch, start as usize, rows_of(&ends.key, start as usize, GROUP_ROWS));
                    }
                }
            }
            let [query_times, key_times] = times;
            assert!(query_times.iter().flatten().all(|&times| times == 1));
            for (row, times) in key_times.iter().enumerate() {
                for (at, &times) in times.iter().enumerate() {
                    assert!(times <= 1 && (times == 1 || !meta.key_mask().keeps(row, at)), "row {row}, key {at}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn the_cost_model_counts_as_many_tiles() -> Result<()> {
        let seq = 900;
        let rows = [
            vec![0..seq],
            vec![3..5, 8..10, 18..35, 36..400, 560..seq],
            (0..seq / 3).map(|at| 3 * at..3 * at + 2).collect(),
            (0..seq / 64).map(|at| 64 * at..64 * at + 63).collect(),
            vec![1..161],
        ];
        let meta = VarlenMeta::from_key_mask(&KeyMask::from_runs(seq, &rows)?)?;
        for (queries, tile) in [(128, 160), (192, 128), (256, 128), (128, 80)] {
            let lists = TileLists::new((&meta, &meta), &Ends::NONE, (queries, tile));
            for row in &lists.batches {
                let runs = meta.runs(row.batch as usize);
                let (full, groups) = cost::key_tiles(runs, tile);
                let masked = (groups * GROUP_ROWS).div_ceil(tile);
                assert_eq!((row.key_tiles as usize, row.masked_key_tiles as usize), (full + masked, masked), "{row:?}");
                assert_eq!(row.query_tiles as usize, (cost::groups(runs) * GROUP_ROWS).div_ceil(queries), "{row:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_joint_mask_costs_hardly_more_than_its_packed_rows() -> Result<()> {
        let rows: Vec<_> = [37, 200, 256].map(|text| vec![0..text, 256..4352]).to_vec();
        let meta = VarlenMeta::from_key_mask(&KeyMask::from_runs(4352, &rows)?)?;
        let lists = TileLists::new((&meta, &meta), &Ends::NONE, (128, 160));
        let packed: usize =
            [37, 200, 256].map(|text: usize| (text + 4096).div_ceil(128) * (text + 4096).div_ceil(160)).iter().sum();
        assert!(lists.tile_pairs() <= packed as u64 * 104 / 100, "{} of {packed}", lists.tile_pairs());
        assert_eq!(lists.query_tiles(), 33 + 34 + 34);
        Ok(())
    }

    #[test]
    fn rows_with_queries_and_no_keys_are_listed() -> Result<()> {
        let query = VarlenMeta::from_key_mask(&KeyMask::from_lengths(20, &[20, 3])?)?;
        let key = VarlenMeta::from_key_mask(&KeyMask::from_lengths(30, &[0, 30])?)?;
        let lists = TileLists::new((&query, &key), &Ends::NONE, (128, 160));
        let pairs: Vec<_> = lists.batches.iter().map(|row| (row.batch, row.query_tiles, row.key_tiles)).collect();
        assert_eq!(pairs, [(1, 1, 1), (0, 1, 0)]);
        assert_eq!(lists.query_groups[..2], [0, 16]);
        assert_eq!(lists.query_groups[2..8], [20; 6]);
        Ok(())
    }
}
