//! Tiles whose keys several workgroups share.
//!
//! Tiles of as many keys take as long, and the last of them run beside nothing: of 816 tiles on 132
//! multiprocessors the last 24 take as long as each 132 before them. wgpu does not tell how many
//! multiprocessors there are. So the last tiles are split, and their splits fill what the others leave,
//! however much that is.

/// Splits of a tile.
pub(super) const SPLITS: u32 = 4;
/// Steps of keys from which the start and the end of a split cost little beside its work.
const LEAST_STEPS: usize = 64;
/// Tiles to split: into as many workgroups as large GPUs have multiprocessors.
const SPLIT_TILES: u64 = 32;
/// Tiles from which the last ones take little of the time.
const MANY_TILES: u64 = 2000;

/// How many of the last heads have their tiles split, where each has `tiles` of at most `steps` steps of keys.
pub(super) fn split_heads(heads: usize, tiles: u64, steps: usize) -> usize {
    let is_worth_it = steps >= LEAST_STEPS && tiles > 0 && tiles * (heads as u64) < MANY_TILES;
    if is_worth_it { heads.min(SPLIT_TILES.div_ceil(tiles) as usize) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_heads_are_split_until_they_fill_a_large_gpu() {
        // Heads, tiles of one, steps of keys; heads that are split.
        for (heads, tiles, steps, expected) in [
            (24, 34, 136, 1),
            (24, 4, 136, 8),
            (2, 1, 79, 2),
            (12, 64, 256, 1),
            (24, 34, 63, 0),
            (24, 84, 1000, 0),
            (24, 0, 100, 0),
        ] {
            assert_eq!(split_heads(heads, tiles, steps), expected, "{heads} heads of {tiles} tiles of {steps} steps");
        }
    }
}
