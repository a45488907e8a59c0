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

/// How the heads of a call share query tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sharing {
    /// Heads that share tiles; 1 where none do.
    pub packed: usize,
    /// Query tiles of all heads.
    pub tiles: usize,
}

impl Heads {
    /// For batch rows with so many groups of [`GROUP_ROWS`] queries: the heads of a key/value head share tiles where that makes fewer
    /// of them. A call whose tiles all run at once does not gain by that.
    pub fn share(self, groups: impl Iterator<Item = usize> + Clone) -> Sharing {
        let alone = self.alone(groups.clone());
        if alone.tiles <= self.multiprocessors || self.group_size == 1 {
            return alone;
        }
        let together = Sharing { packed: self.group_size, tiles: self.tiles(self.group_size, groups) };
        if together.tiles < alone.tiles { together } else { alone }
    }

    /// The same where heads share nothing.
    pub fn alone(self, groups: impl Iterator<Item = usize>) -> Sharing {
        Sharing { packed: 1, tiles: self.tiles(1, groups) }
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
        let share = |heads: Heads, rows: usize, batch| {
            let Sharing { packed, tiles } = heads.share(std::iter::repeat_n(rows.div_ceil(GROUP_ROWS), batch));
            (packed, tiles)
        };
        assert_eq!(share(heads, 165, 32), (4, 32 * 4 * 6));
        assert_eq!(share(heads, 256, 32), (1, 32 * 16 * 2));
        // All at once; no head to share with.
        assert_eq!(share(heads, 165, 4), (1, 4 * 16 * 2));
        assert_eq!(share(Heads { group_size: 1, ..heads }, 165, 32), (1, 32 * 16 * 2));
        assert_eq!(share(heads, 0, 32), (1, 0));
    }
}
