//! Tile sizes of the sm80 kernel, read at compile time from the header that the kernel itself is compiled with.

/// Sizes for one compiled head dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    /// Head dimension that the kernel is compiled for; smaller ones run in it too.
    pub width: u32,
    /// Query rows of a thread block.
    pub rows: u32,
    keys: u32,
    keys_masked: u32,
    pub warps: u32,
}

const HEADER: &[u8] = include_bytes!("../../kernels/include/tile_shape.cuh");
const COUNT: usize = count(HEADER);
/// The table, the smallest width first.
const TILES: [Tile; COUNT] = parse(HEADER);

/// Stages of key and value tiles, and tensors of one stage.
const STAGES: u32 = 2;
const STAGE_TENSORS: u32 = 2;
const ELEMENT_BYTES: u32 = 2;
/// Shared memory of a block that every chip from SM80 on has.
const MAX_SHARED_BYTES: u32 = 96 << 10;

impl Tile {
    /// The smallest tile that holds a head dimension.
    pub fn of(head_dim: usize) -> Option<Self> {
        TILES.into_iter().find(|tile| tile.width as usize >= head_dim)
    }

    /// Dynamic shared memory: the query tile and the stages of key and value tiles.
    pub const fn shared_bytes(self, masked: bool) -> u32 {
        let keys = if masked { self.keys_masked } else { self.keys };
        (self.rows + STAGES * STAGE_TENSORS * keys) * self.width * ELEMENT_BYTES
    }

    /// Threads of a block.
    pub const fn threads(self) -> u32 {
        self.warps * 32
    }
}

const _: () = {
    assert!(COUNT > 0);
    let mut i = 0;
    while i < COUNT {
        let tile = TILES[i];
        assert!(tile.shared_bytes(false) <= MAX_SHARED_BYTES && tile.shared_bytes(true) <= MAX_SHARED_BYTES);
        assert!(tile.rows.is_multiple_of(tile.warps * 16));
        assert!(i == 0 || TILES[i - 1].width < tile.width);
        i += 1;
    }
    assert!(TILES[COUNT - 1].width as usize == crate::problem::MAX_HEAD_DIM);
};

/// Where the next entry's numbers start: an entry is `X(` and a digit.
const fn next_entry(text: &[u8], mut at: usize) -> Option<usize> {
    while at + 2 < text.len() {
        if text[at] == b'X' && text[at + 1] == b'(' && text[at + 2].is_ascii_digit() {
            return Some(at + 2);
        }
        at += 1;
    }
    None
}

const fn count(text: &[u8]) -> usize {
    let (mut count, mut at) = (0, 0);
    while let Some(entry) = next_entry(text, at) {
        count += 1;
        at = entry;
    }
    count
}

const fn parse<const N: usize>(text: &[u8]) -> [Tile; N] {
    let mut tiles = [Tile { width: 0, rows: 0, keys: 0, keys_masked: 0, warps: 0 }; N];
    let (mut i, mut at) = (0, 0);
    while let Some(entry) = next_entry(text, at) {
        at = entry;
        let mut numbers = [0_u32; 5];
        let mut field = 0;
        while text[at] != b')' {
            match text[at] {
                digit @ b'0'..=b'9' => numbers[field] = numbers[field] * 10 + (digit - b'0') as u32,
                b',' => field += 1,
                byte => assert!(byte == b' ', "an entry holds numbers, commas and spaces"),
            }
            at += 1;
        }
        assert!(field == 4, "an entry has five numbers");
        let [width, rows, keys, keys_masked, warps] = numbers;
        tiles[i] = Tile { width, rows, keys, keys_masked, warps };
        i += 1;
    }
    tiles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_and_comments_are_not() {
        const TEXT: &[u8] =
            b"//  X(head_dim, rows)\n#define TILES(X) \\\n  X(32, 128, 64, 48, 4) \\\n X(256,64,  32,16,8)\n";
        const PARSED: [Tile; count(TEXT)] = parse(TEXT);
        assert_eq!(
            PARSED,
            [
                Tile { width: 32, rows: 128, keys: 64, keys_masked: 48, warps: 4 },
                Tile { width: 256, rows: 64, keys: 32, keys_masked: 16, warps: 8 },
            ]
        );
    }

    #[test]
    fn every_head_dim_has_a_tile_at_least_as_wide() {
        for head_dim in (8..=256).step_by(8) {
            assert!(Tile::of(head_dim).is_some_and(|tile| tile.width as usize >= head_dim), "{head_dim}");
        }
        assert_eq!(Tile::of(64).map(|tile| tile.width), Some(64));
        assert_eq!(Tile::of(72).map(|tile| tile.width), Some(96));
        assert_eq!(Tile::of(264), None);
    }

    #[test]
    fn shared_memory_is_the_kernels_sum() {
        let tile = Tile { width: 128, rows: 128, keys: 64, keys_masked: 32, warps: 4 };
        let tile_bytes = |rows: u32| rows * 128 * 2;
        assert_eq!(tile.shared_bytes(false), tile_bytes(128) + 2 * (tile_bytes(64) + tile_bytes(64)));
        assert_eq!(tile.shared_bytes(true), tile_bytes(128) + 2 * (tile_bytes(32) + tile_bytes(32)));
    }
}
