//! Which query heads share query tiles. All heads of a key/value head read the same keys, so a tile may hold queries of several of
//! them: a batch row of 165 queries and 4 such heads fills 6 tiles of 128 rows, not 4 · 2. (FlashAttention-3 calls it `pack_gqa`.)

use crate::mask::meta::GROUP_ROWS;

/// The heads of a call, and where it is computed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    /// Query heads.
    pub count: usize,
    /// Those of one key/value head.
    pub group_size: usize,
    /// Query rows of a tile, a multiple of [`GROUP_ROWS`].
    pub tile_rows: usize,
    pub multiprocessors: usize,
}

impl Heads {
    /// Heads that share query tiles, for batch rows with so many groups of [`GROUP_ROWS`] queries: those of a key/value head where
    /// that makes fewer tiles, else 1. A call whose tiles all run at once does not gain by fewer of them.
    pub fn packed(self, groups: impl Iterator<Item = usize> + Clone) -> usize {
        let (alone, packed) = (self.tiles(1, groups.clone()), self.tiles(self.group_size, groups));
        if alone > self.multiprocessors && packed < alone { self.group_size } else { 1 }
    }

    /// Query tiles of all heads, of which `packed` share tiles.
    pub fn tiles(self, packed: usize, groups: impl Iterator<Item = usize>) -> usize {
        let tile_groups = self.tile_rows / GROUP_ROWS;
        let tiles: usize = groups.map(|groups| (groups * packed).div_ceil(tile_groups)).sum();
        tiles * (self.count / packed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_share_tiles_where_that_makes_fewer_of_them() {
        let heads = Heads { count: 16, group_size: 4, tile_rows: 128, multiprocessors: 132 };
        let packed = |heads: Heads, rows: usize, batch| {
            let groups = std::iter::repeat_n(rows.div_ceil(GROUP_ROWS), batch);
            (heads.packed(groups.clone()), heads.tiles(heads.packed(groups.clone()), groups))
        };
        assert_eq!(packed(heads, 165, 32), (4, 32 * 4 * 6));
        assert_eq!(packed(heads, 256, 32), (1, 32 * 16 * 2));
        // All at once; no head to share with.
        assert_eq!(packed(heads, 165, 4), (1, 4 * 16 * 2));
        assert_eq!(packed(Heads { group_size: 1, ..heads }, 165, 32), (1, 32 * 16 * 2));
        assert_eq!(packed(heads, 0, 32), (1, 0));
    }
}
