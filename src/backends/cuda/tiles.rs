//! Tile sizes of the attention kernels, read at compile time from the headers that the kernels themselves are compiled with.

/// Sizes of the sm80 kernel for one compiled head dimension.
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

const HEADER: &[u8] = include_bytes!("../../../kernels/include/tile_shape.cuh");
const COUNT: usize = count(HEADER);
/// The table, the smallest width first.
const TILES: [Tile; COUNT] = {
    let entries: [[u32; 5]; COUNT] = parse(HEADER);
    let mut tiles = [Tile { width: 0, rows: 0, keys: 0, keys_masked: 0, warps: 0 }; COUNT];
    let mut i = 0;
    while i < COUNT {
        let [width, rows, keys, keys_masked, warps] = entries[i];
        tiles[i] = Tile { width, rows, keys, keys_masked, warps };
        i += 1;
    }
    tiles
};

/// Stages of key and value tiles, and tensors of one stage.
const STAGES: u32 = 2;
const STAGE_TENSORS: u32 = 2;
const ELEMENT_BYTES: u32 = 2;
/// Lists of rows that the fused form keeps beside the tiles: the query tile's, and those of two key tiles.
const KEY_LISTS: u32 = 2;
const LIST_ENTRY_BYTES: u32 = 4;
/// Shared memory of a block that every chip from SM80 on has.
const MAX_SHARED_BYTES: u32 = 99 << 10;

/// The forms of the sm80 kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum FormSm80 {
    /// Padded or packed rows, all of them.
    Plain,
    /// Adds the key mask, the bias and the rows to be written as zeros.
    Masked,
    /// The valid rows of padded tensors in place.
    Fused,
}

impl FormSm80 {
    /// The end of the kernel's name.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Masked => "_masked",
            Self::Fused => "_fused",
        }
    }
}

impl Tile {
    /// The smallest tile that holds a head dimension.
    pub fn of(head_dim: usize) -> Option<Self> {
        TILES.into_iter().find(|tile| tile.width as usize >= head_dim)
    }

    /// Dynamic shared memory: the query tile and the stages of key and value tiles, and the fused form's lists.
    pub const fn shared_bytes(self, form: FormSm80) -> u32 {
        let (keys, lists) = match form {
            FormSm80::Plain => (self.keys, 0),
            FormSm80::Masked => (self.keys_masked, 0),
            FormSm80::Fused => (self.keys, self.rows + KEY_LISTS * self.keys),
        };
        (self.rows + STAGES * STAGE_TENSORS * keys) * self.width * ELEMENT_BYTES + lists * LIST_ENTRY_BYTES
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
        assert!(tile.shared_bytes(FormSm80::Masked) <= MAX_SHARED_BYTES);
        assert!(tile.shared_bytes(FormSm80::Fused) <= MAX_SHARED_BYTES);
        // A thread copies one entry of a key tile's list.
        assert!(tile.keys <= tile.threads());
        assert!(tile.rows.is_multiple_of(tile.warps * 16));
        assert!(i == 0 || TILES[i - 1].width < tile.width);
        i += 1;
    }
    assert!(TILES[COUNT - 1].width as usize == crate::kernel::MAX_HEAD_DIM);
};

/// Sizes of the sm90 kernel for one compiled head dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct TileSm90 {
    /// Head dimension that the kernel is compiled for; smaller ones run in it too.
    pub width: u32,
    /// Warpgroups that compute; one more loads.
    warpgroups: u32,
    /// Keys of a step.
    pub keys: u32,
    /// Query tiles that there is room for; outputs take their places.
    query_tiles: u32,
}

/// Query tiles, the last of which are split: blocks share their keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Split {
    /// The first that is split.
    pub from: usize,
    /// Parts of each of those.
    pub parts: usize,
    /// Query tiles in all.
    pub items: usize,
}

impl Split {
    pub const fn none(items: usize) -> Self {
        // As the kernel counts items.
        Self { from: i32::MAX as usize, parts: 1, items }
    }

    /// Parts of all split query tiles.
    pub const fn part_items(&self) -> usize {
        self.items.saturating_sub(self.from) * self.parts
    }

    /// What blocks find to do.
    pub const fn work_items(&self) -> usize {
        let whole = if self.items < self.from { self.items } else { self.from };
        whole + self.part_items()
    }
}

/// More would mostly add up one another's sums.
const MAX_PARTS: usize = 8;
/// Key tiles that are worth a part.
const STEPS_OF_A_PART: usize = 2;
/// Cycles that zeroing the counts of parts takes beside the kernel.
const LAUNCH_CYCLES: usize = 3500;

const HEADER_SM90: &[u8] = include_bytes!("../../../kernels/include/tile_shape_sm90.cuh");
const COUNT_SM90: usize = count(HEADER_SM90);
/// The table, the smallest width first.
const TILES_SM90: [TileSm90; COUNT_SM90] = {
    let entries: [[u32; 4]; COUNT_SM90] = parse(HEADER_SM90);
    let mut tiles = [TileSm90 { width: 0, warpgroups: 0, keys: 0, query_tiles: 0 }; COUNT_SM90];
    let mut i = 0;
    while i < COUNT_SM90 {
        let [width, warpgroups, keys, query_tiles] = entries[i];
        tiles[i] = TileSm90 { width, warpgroups, keys, query_tiles };
        i += 1;
    }
    tiles
};

/// Query rows and threads of a warpgroup.
const WARPGROUP_ROWS: u32 = 64;
const WARPGROUP_THREADS: u32 = 128;
/// Shared memory for barriers, and what aligning the tiles takes.
const SHARED_BYTES_BESIDE_TILES: u32 = 1024;
/// Shared memory of a block on compute capability 9.0.
const MAX_SHARED_BYTES_SM90: u32 = 227 << 10;

impl TileSm90 {
    /// The smallest tile that holds a head dimension.
    pub fn of(head_dim: usize) -> Option<Self> {
        TILES_SM90.into_iter().find(|tile| tile.width as usize >= head_dim)
    }

    /// An estimate of what an item takes, fitted to measurements at head dimension 128 on an H100: a step a key tile, and what starts and
    /// ends it.
    const fn item_cycles(steps: usize) -> usize {
        steps * 3300 + 7000
    }

    /// How the query tiles of a launch are shared out: those of a last wave in as many parts as take the least time. `fewest_steps` is the
    /// number of key tiles of the item with the fewest, 0 to split none.
    pub fn split(items: usize, fewest_steps: usize, multiprocessors: usize) -> Split {
        let tail = items % multiprocessors;
        let cycles = |parts: usize| {
            if parts == 1 {
                return Self::item_cycles(fewest_steps);
            }
            let rounds = (tail * parts).div_ceil(multiprocessors);
            // Parts are computed by the exact softmax, in order; each is written, and all of a query tile are read by one block.
            let a_part = Self::item_cycles(fewest_steps.div_ceil(parts)) * 9 / 8 + 5000;
            LAUNCH_CYCLES + rounds * a_part + parts * 2500
        };
        let most = if tail == 0 { 1 } else { (fewest_steps / STEPS_OF_A_PART).clamp(1, MAX_PARTS) };
        match (1..=most).min_by_key(|&parts| cycles(parts)) {
            None | Some(1) => Split::none(items),
            Some(parts) => Split { from: items - tail, parts, items },
        }
    }

    /// What a part of a query tile leaves for the others: f32 sums of the output, and a maximum and a sum for each of two rows in each
    /// of a lane's four columns.
    pub const fn part_bytes(self) -> u64 {
        (self.warpgroups * WARPGROUP_THREADS) as u64 * (self.width as u64 / 8 + 1) * 16
    }

    /// Counts of the parts of a query tile, one a warpgroup.
    pub const fn part_count_bytes(self) -> u64 {
        self.warpgroups as u64 * 4
    }

    /// The end of the kernel's name.
    pub fn name(self) -> String {
        format!("d{}_w{}", self.width, self.warpgroups)
    }

    /// Query rows of a tile.
    pub const fn rows(self) -> u32 {
        self.warpgroups * WARPGROUP_ROWS
    }

    /// Threads of a block.
    pub const fn threads(self) -> u32 {
        (self.warpgroups + 1) * WARPGROUP_THREADS
    }

    /// Dynamic shared memory: the query tiles and the stages of key and value tiles.
    pub const fn shared_bytes(self) -> u32 {
        let rows = self.query_tiles * self.rows() + STAGES * STAGE_TENSORS * self.keys;
        rows * self.width * ELEMENT_BYTES + SHARED_BYTES_BESIDE_TILES
    }
}

const _: () = {
    let mut i = 0;
    while i < COUNT_SM90 {
        let tile = TILES_SM90[i];
        assert!(tile.shared_bytes() <= MAX_SHARED_BYTES_SM90);
        assert!(tile.keys.is_multiple_of(crate::mask::meta::GROUP_ROWS as u32));
        assert!(i == 0 || TILES_SM90[i - 1].width < tile.width);
        i += 1;
    }
    assert!(TILES_SM90[COUNT_SM90 - 1].width as usize == crate::kernel::MAX_HEAD_DIM);
};

/// Sizes of the sm100 kernel for one compiled head dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct TileSm100 {
    /// Head dimension that the kernel is compiled for; smaller ones run in it too.
    pub width: u32,
    /// Stages of keys, and of values.
    stages: u32,
}

const HEADER_SM100: &[u8] = include_bytes!("../../../kernels/include/tile_shape_sm100.cuh");
const COUNT_SM100: usize = count(HEADER_SM100);
/// The table, the smallest width first.
const TILES_SM100: [TileSm100; COUNT_SM100] = {
    let entries: [[u32; 2]; COUNT_SM100] = parse(HEADER_SM100);
    let mut tiles = [TileSm100 { width: 0, stages: 0 }; COUNT_SM100];
    let mut i = 0;
    while i < COUNT_SM100 {
        let [width, stages] = entries[i];
        tiles[i] = TileSm100 { width, stages };
        i += 1;
    }
    tiles
};

/// Rows of a query tile, of which a block has two, and keys of a step.
const TILE_ROWS_SM100: u32 = 128;
const QUERY_TILES_SM100: u32 = 2;
const THREADS_SM100: u32 = 512;
/// Shared memory for barriers, factors and what warps tell one another.
const SHARED_BYTES_BESIDE_TILES_SM100: u32 = 3072;

impl TileSm100 {
    /// The smallest tile that holds a head dimension.
    pub fn of(head_dim: usize) -> Option<Self> {
        TILES_SM100.into_iter().find(|tile| tile.width as usize >= head_dim)
    }

    /// Dynamic shared memory: the query tiles, the stages of key and value tiles and the output tile.
    pub const fn shared_bytes(self) -> u32 {
        let tiles = QUERY_TILES_SM100 + STAGE_TENSORS * self.stages + 1;
        tiles * TILE_ROWS_SM100 * self.width * ELEMENT_BYTES + SHARED_BYTES_BESIDE_TILES_SM100
    }
}

const _: () = {
    let mut i = 0;
    while i < COUNT_SM100 {
        let tile = TILES_SM100[i];
        // As much as on compute capability 9.0; and more than half of it, so that a multiprocessor runs one block.
        assert!(tile.shared_bytes() <= MAX_SHARED_BYTES_SM90 && tile.shared_bytes() > MAX_SHARED_BYTES_SM90 / 2);
        assert!(i == 0 || TILES_SM100[i - 1].width < tile.width);
        i += 1;
    }
    assert!(TILES_SM100[COUNT_SM100 - 1].width as usize == crate::kernel::Kernel::CudaSm100.max_head_dim());
};

/// The tile of a kernel that works by lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum ListTile {
    Sm90(TileSm90),
    Sm100(TileSm100),
}

impl ListTile {
    /// Query rows of a block.
    pub const fn rows(self) -> u32 {
        match self {
            Self::Sm90(tile) => tile.rows(),
            Self::Sm100(_) => QUERY_TILES_SM100 * TILE_ROWS_SM100,
        }
    }

    /// Keys of a step.
    pub const fn keys(self) -> u32 {
        match self {
            Self::Sm90(tile) => tile.keys,
            Self::Sm100(_) => TILE_ROWS_SM100,
        }
    }

    /// Threads of a block.
    pub const fn threads(self) -> u32 {
        match self {
            Self::Sm90(tile) => tile.threads(),
            Self::Sm100(_) => THREADS_SM100,
        }
    }

    /// Columns of a panel, as tiles lie in shared memory.
    pub const fn panel(self) -> u32 {
        let width = match self {
            Self::Sm90(tile) => tile.width,
            Self::Sm100(tile) => tile.width,
        };
        if width.is_multiple_of(64) { 64 } else { 32 }
    }

    /// Dynamic shared memory of a block.
    pub const fn shared_bytes(self) -> u32 {
        match self {
            Self::Sm90(tile) => tile.shared_bytes(),
            Self::Sm100(tile) => tile.shared_bytes(),
        }
    }

    /// The kernel's name, but for the element type.
    pub fn names(self) -> (&'static str, String) {
        match self {
            Self::Sm90(tile) => ("sm90", tile.name()),
            Self::Sm100(tile) => ("sm100", format!("d{}", tile.width)),
        }
    }
}

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

/// The fields of every entry: numbers, and `true` and `false` as 1 and 0.
const fn parse<const N: usize, const FIELDS: usize>(text: &[u8]) -> [[u32; FIELDS]; N] {
    let mut entries = [[0_u32; FIELDS]; N];
    let (mut i, mut at) = (0, 0);
    while let Some(entry) = next_entry(text, at) {
        at = entry;
        let mut field = 0;
        while text[at] != b')' {
            match text[at] {
                digit @ b'0'..=b'9' => entries[i][field] = entries[i][field] * 10 + (digit - b'0') as u32,
                // Of the letters of both words only one says which it is.
                b't' => entries[i][field] = 1,
                b'r' | b'u' | b'e' | b'f' | b'a' | b'l' | b's' => {}
                b',' => field += 1,
                byte => assert!(byte == b' ', "an entry holds numbers, words, commas and spaces"),
            }
            at += 1;
        }
        assert!(field + 1 == FIELDS, "every entry has as many fields as the table");
        i += 1;
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_and_comments_are_not() {
        const TEXT: &[u8] = b"//  X(head_dim, rows)\n#define TILES(X) \\\n  X(32, 128, false) \\\n X(256,64,  true)\n";
        const PARSED: [[u32; 3]; count(TEXT)] = parse(TEXT);
        assert_eq!(PARSED, [[32, 128, 0], [256, 64, 1]]);
    }

    #[test]
    fn every_head_dim_has_a_tile_at_least_as_wide() {
        for head_dim in (8..=256).step_by(8) {
            assert!(Tile::of(head_dim).is_some_and(|tile| tile.width as usize >= head_dim), "{head_dim}");
        }
        assert_eq!(Tile::of(64).map(|tile| tile.width), Some(64));
        assert_eq!(Tile::of(72).map(|tile| tile.width), Some(96));
        assert_eq!(Tile::of(264), None);
        assert_eq!(TileSm90::of(8).map(|tile| tile.width), Some(64));
        assert_eq!(TileSm90::of(72).map(|tile| tile.width), Some(96));
        assert_eq!(TileSm90::of(264), None);
    }

    #[test]
    fn a_last_wave_that_leaves_multiprocessors_idle_is_split() {
        let split = |items, fewest_steps| TileSm90::split(items, fewest_steps, 132);
        // Twelve query tiles after nine waves.
        let Split { from, parts, items } = split(1200, 20);
        assert_eq!((from, items), (1188, 1200));
        assert!((2..=MAX_PARTS).contains(&parts) && 12 * parts <= 132, "{parts} parts");
        let few = split(3, 100);
        assert_eq!((few.from, few.parts, few.part_items(), few.work_items()), (0, MAX_PARTS, 24, 24));
        // Whole waves; nearly whole ones; too few keys; keys that the host does not know; nothing.
        for (items, steps) in [(792, 26), (131, 100), (12, 3), (12, 0), (0, 0)] {
            assert_eq!(split(items, steps), Split::none(items), "{items} items of {steps} key tiles");
            assert_eq!((split(items, steps).part_items(), split(items, steps).work_items()), (0, items));
        }
    }

    #[test]
    fn every_head_dim_that_sm100_has_is_in_the_narrowest_tile() {
        for (head_dim, width) in [(8, 64), (64, 64), (72, 96), (96, 96), (104, 128), (128, 128)] {
            assert_eq!(TileSm100::of(head_dim).map(|tile| tile.width), Some(width), "{head_dim}");
        }
        assert_eq!(TileSm100::of(136), None);
    }

    /// As attention_sm100.cu lays it out.
    #[test]
    fn a_block_of_sm100_has_two_query_tiles_an_output_tile_and_its_stages() {
        for (head_dim, stages, panel) in [(64, 4, 64), (96, 3, 32), (128, 2, 64)] {
            let tile = TileSm100::of(head_dim).map(ListTile::Sm100);
            let found = tile.map(|tile| (tile.rows(), tile.keys(), tile.threads(), tile.panel(), tile.shared_bytes()));
            let tile_bytes = 128 * head_dim as u32 * 2;
            assert_eq!(found, Some((256, 128, 512, panel, (3 + 2 * stages) * tile_bytes + 3072)), "{head_dim}");
            assert_eq!(tile.map(ListTile::names), Some(("sm100", format!("d{head_dim}"))));
        }
    }

    #[test]
    fn lists_of_sm90_are_those_of_its_own_shapes() {
        let tile = TileSm90::of(128);
        let by_lists = tile.map(ListTile::Sm90);
        assert_eq!(by_lists.map(ListTile::rows), tile.map(TileSm90::rows));
        assert_eq!(by_lists.map(ListTile::threads), tile.map(TileSm90::threads));
        assert_eq!(by_lists.map(ListTile::shared_bytes), tile.map(TileSm90::shared_bytes));
        assert_eq!(by_lists.map(ListTile::names), tile.map(|tile| ("sm90", tile.name())));
    }

    #[test]
    fn shared_memory_is_the_kernels_sum() {
        let tile = Tile { width: 128, rows: 128, keys: 64, keys_masked: 32, warps: 4 };
        let tile_bytes = |rows: u32| rows * 128 * 2;
        let plain = tile_bytes(128) + 2 * (tile_bytes(64) + tile_bytes(64));
        assert_eq!(tile.shared_bytes(FormSm80::Plain), plain);
        assert_eq!(tile.shared_bytes(FormSm80::Fused), plain + 4 * (128 + 64 + 64));
        assert_eq!(tile.shared_bytes(FormSm80::Masked), tile_bytes(128) + 2 * (tile_bytes(32) + tile_bytes(32)));
    }
}
