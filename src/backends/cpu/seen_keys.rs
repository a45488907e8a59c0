//! Which keys of a tile the queries of a strip see, where queries see different ones.
//!
//! ```text
//!    keys of a tile     0 . . . . . . . . . . . . . . 119
//!    query a                  first xxxxxxxxxxx end
//!    query b                     first xxxxxxxxxxxxx end
//!                             |--------- part ---------|     what is computed for the strip
//!                                |-- common --|              seen by all: no score here is masked
//! ```

use std::ops::Range;

use super::strip::{Limits, Strips};
use crate::error::Result;
use crate::host_vec;

/// The keys of each query of a tile of queries, numbered among those that take part.
pub(super) struct SeenKeys {
    /// `[first, end)` of each lane.
    lanes: Vec<Range<u32>>,
    /// Of each strip: what some query sees, and what all see.
    strips: Vec<[Range<usize>; 2]>,
    /// First and end of the lanes of a strip, from the start of the key tile.
    firsts: Vec<f32>,
    ends: Vec<f32>,
}

impl SeenKeys {
    /// For as many lanes, in strips of at most `widest`.
    pub fn new(lanes: usize, widest: usize) -> Result<Self> {
        Ok(Self {
            lanes: host_vec::reserve(lanes)?,
            strips: host_vec::reserve(lanes)?,
            firsts: host_vec::reserve(widest)?,
            ends: host_vec::reserve(widest)?,
        })
    }

    /// Takes the keys of each of `count` queries; lanes to spare see what the last query sees.
    pub fn start(&mut self, strips: Strips, count: usize, keys_of: impl Fn(usize) -> Range<usize>) {
        self.lanes.clear();
        self.lanes.extend((0..strips.lanes()).map(|lane| {
            let Range { start, end } = keys_of(lane.min(count - 1));
            // Both fit: ranges are made of u32s.
            start as u32..end as u32
        }));
        self.strips.clear();
        self.strips.extend(strips.ranges().map(|lanes| {
            let (mut union, mut common) = ((usize::MAX, 0), (0, usize::MAX));
            for seen in &self.lanes[lanes] {
                let (first, end) = (seen.start as usize, seen.end as usize);
                common = (common.0.max(first), common.1.min(end));
                if first < end {
                    union = (union.0.min(first), union.1.max(end));
                }
            }
            [union.0..union.1, common.0..common.1]
        }));
    }

    /// Whether a lane sees a key at all. No lane past the tile's does.
    pub fn sees_any(&self, lane: usize) -> bool {
        self.lanes.get(lane).is_some_and(|seen| !seen.is_empty())
    }

    /// Whether some query of a strip sees a key of a tile.
    pub fn strip_sees(&self, strip: usize, tile: &Range<usize>) -> bool {
        let [union, _] = &self.strips[strip];
        union.start.max(tile.start) < union.end.min(tile.end)
    }

    /// What a strip needs of a tile of keys: the part of it, in keys from the tile's start and from a
    /// whole block on, and the limits of each lane where not all see the whole part. None if no
    /// query of the strip sees a key of the tile.
    pub fn of_strip(
        &mut self,
        strip: usize,
        lanes: &Range<usize>,
        tile: &Range<usize>,
        block: usize,
    ) -> Option<(Range<usize>, Option<Limits<'_>>)> {
        let [union, common] = &self.strips[strip];
        let (first, end) = (union.start.max(tile.start), union.end.min(tile.end));
        if first >= end {
            return None;
        }
        let part = (first - tile.start) / block * block..end - tile.start;
        let start = tile.start + part.start;
        let common = [common.start, common.end].map(|key| key.clamp(start, end) - start);
        if common == [0, part.len()] {
            return Some((part, None));
        }
        let common = if common[0] < common[1] { common } else { [0; 2] };
        // What lies outside of the tile counts from its borders; so small a number is exact in f32.
        let place = |key: u32| (key as usize).clamp(tile.start, tile.end) - tile.start;
        self.firsts.clear();
        self.firsts.extend(self.lanes[lanes.clone()].iter().map(|seen| place(seen.start) as f32));
        self.ends.clear();
        self.ends.extend(self.lanes[lanes.clone()].iter().map(|seen| place(seen.end) as f32));
        Some((part, Some(Limits { firsts: &self.firsts, ends: &self.ends, common })))
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::SeenKeys;
    use crate::backends::cpu::processor::Processor;
    use crate::backends::cpu::strip::Strips;

    #[test]
    fn parts_hold_what_some_query_sees_and_common_keys_are_seen_by_all() {
        const QUERIES: usize = 75;
        // Windows, queries that see nothing, and some that see a lot.
        let keys_of = |lane: usize| -> Range<usize> {
            let first = lane + lane % 3 * 7;
            first..first + [40, 44, 0, 120][if lane < 30 { lane % 2 } else { lane % 4 }]
        };
        for processor in Processor::all() {
            let strips = Strips::new(processor, QUERIES, true);
            let mut seen = SeenKeys::new(strips.lanes(), strips.widest()).unwrap();
            seen.start(strips, QUERIES, keys_of);
            let mut common_keys = 0;
            for (strip, lanes) in strips.ranges().enumerate() {
                for tile in [0..48, 48..96, 96..240] {
                    let sees = |lane: usize, key| keys_of(lane.min(QUERIES - 1)).contains(&key);
                    let seen_by_some = |key: &usize| lanes.clone().any(|lane| sees(lane, *key));
                    let Some((part, limits)) = seen.of_strip(strip, &lanes, &tile, strips.block_keys()) else {
                        assert!(!tile.clone().any(|key| seen_by_some(&key)));
                        continue;
                    };
                    let start = tile.start + part.start;
                    let [first, end] = limits.map_or([0, part.len()], |limits| limits.common);
                    assert!(first <= end && end <= part.len());
                    assert!(tile.clone().filter(seen_by_some).all(|key| (start..start + part.len()).contains(&key)));
                    assert!((start + first..start + end).all(|key| lanes.clone().all(|lane| sees(lane, key))));
                    common_keys += end - first;
                }
            }
            assert!(common_keys > 0);
        }
    }
}
