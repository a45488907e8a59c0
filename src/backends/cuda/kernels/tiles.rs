//! Tiles of the attention kernels: the tables that the kernels are compiled with
//! (`kernels/attention/*/tiles.h`), read at compile time, and what grids and shared memory follow
//! from them.

use crate::call::cost::Tiling;
use crate::kernel::Kernel;
#[cfg(test)]
use crate::kernel::SegmentAccess;

use super::params::{
    ELEMENT_BYTES, GROUP_ROWS, SM90_EXTRA_SHARED_BYTES, SM90_MAX_SHARED_BYTES, SM90_WARPGROUP_ROWS,
    SM100_EXTRA_SHARED_BYTES, SM100_QUERY_TILES, SM100_THREADS, SM100_TILE_ROWS, STAGES, WARPGROUP_THREADS,
};

// Metadata counts groups, which the kernels' tiles are made of.
const _: () = assert!(GROUP_ROWS as usize == crate::mask::meta::GROUP_ROWS);

/// Tensors of one stage: keys and values.
const STAGE_TENSORS: u32 = 2;

/// Sizes of the sm80 kernel for one compiled head dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Head dimension that the kernel is compiled for; smaller ones run in it too.
    pub width: u32,
    /// Query rows of a thread block.
    pub rows: u32,
    keys: u32,
    keys_masked: u32,
    warps: u32,
}

/// Blocks in the second and third dimension of a grid; in the second, heads of the sm80 kernel.
pub const MAX_GRID: usize = 65_535;

/// The forms of the sm80 kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FormSm80 {
    /// Padded or packed rows, all of them.
    Plain,
    /// Adds the key mask, the bias and the rows to be written as zeros.
    Masked,
    /// The valid rows of padded tensors.
    Fused,
    /// Padded or packed rows with key ranges, and what `Masked` adds.
    Ranged,
    /// What `Fused` computes with key ranges, and rows to be written as zeros.
    FusedRanged,
    /// What `Ranged` computes with score modifiers, whether or not there are ranges.
    Modified,
    /// What `FusedRanged` computes with score modifiers, whether or not there are ranges.
    FusedModified,
}

impl FormSm80 {
    /// Every form.
    #[cfg(test)]
    pub const ALL: [Self; 7] =
        [Self::Plain, Self::Masked, Self::Fused, Self::Ranged, Self::FusedRanged, Self::Modified, Self::FusedModified];

    /// The end of the kernel's name.
    const fn suffix(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Masked => "_masked",
            Self::Fused => "_fused",
            Self::Ranged => "_ranged",
            Self::FusedRanged => "_fused_ranged",
            Self::Modified => "_modified",
            Self::FusedModified => "_fused_modified",
        }
    }
}

impl Tile {
    const TABLE: [[u32; 5]; count(SM80_TILES)] = parse(SM80_TILES);

    /// Lists of rows that the fused form keeps beside the tiles: the query tile's, and those of two
    /// key tiles.
    const KEY_LISTS: u32 = 2;
    const LIST_ENTRY_BYTES: u32 = 4;
    const SCORE_BYTES: u32 = 4;
    /// Shared memory of a block that every chip from SM80 on has.
    const MAX_SHARED_BYTES: u32 = 99 << 10;
    /// Two warps divide the columns of wider tiles between them. Such tiles have two forms alone, which do what all others do.
    const MAX_UNDIVIDED_WIDTH: u32 = 256;

    /// The narrowest tile that holds a head dimension.
    pub fn of(head_dim: usize) -> Option<Self> {
        narrowest(&Self::TABLE, head_dim).map(Self::new)
    }

    const fn new([width, rows, keys, keys_masked, warps]: [u32; 5]) -> Self {
        Self { width, rows, keys, keys_masked, warps }
    }

    const fn is_divided(self) -> bool {
        self.width > Self::MAX_UNDIVIDED_WIDTH
    }

    /// The compiled form that computes one.
    pub const fn compiled_form(self, form: FormSm80) -> FormSm80 {
        match form {
            form if !self.is_divided() => form,
            FormSm80::Plain | FormSm80::Masked | FormSm80::Ranged | FormSm80::Modified => FormSm80::Modified,
            FormSm80::Fused | FormSm80::FusedRanged | FormSm80::FusedModified => FormSm80::FusedModified,
        }
    }

    /// Dynamic shared memory: the query tile and the stages of key and value tiles, the fused
    /// form's lists, and the scores that two warps add up.
    pub const fn shared_bytes(self, form: FormSm80) -> u32 {
        let (keys, lists) = match form {
            FormSm80::Plain => (self.keys, 0),
            FormSm80::Masked | FormSm80::Ranged | FormSm80::Modified => (self.keys_masked, 0),
            FormSm80::Fused | FormSm80::FusedRanged | FormSm80::FusedModified => {
                (self.keys, self.rows + Self::KEY_LISTS * self.keys)
            }
        };
        let scores = if self.is_divided() { self.rows * keys * Self::SCORE_BYTES } else { 0 };
        (self.rows + STAGES * STAGE_TENSORS * keys) * self.width * ELEMENT_BYTES
            + lists * Self::LIST_ENTRY_BYTES
            + scores
    }

    /// Threads of a block.
    pub const fn threads(self) -> u32 {
        self.warps * 32
    }

    /// Blocks of the plain and the fused form that the registers of a multiprocessor have room for, as
    /// `kernels/attention/sm80/attention.cu` is compiled.
    const fn most_blocks(self) -> u32 {
        if self.width == 64 { 3 } else { 8 / self.warps }
    }

    /// The end of the kernel's name, after the element type.
    pub fn name(self, form: FormSm80) -> String {
        format!("d{}{}", self.width, form.suffix())
    }
}

const _: () = {
    assert_widths(&Tile::TABLE, Kernel::CudaSm80);
    let mut i = 0;
    while i < Tile::TABLE.len() {
        let tile = Tile::new(Tile::TABLE[i]);
        assert!(tile.shared_bytes(FormSm80::Masked) <= Tile::MAX_SHARED_BYTES);
        assert!(tile.shared_bytes(FormSm80::Fused) <= Tile::MAX_SHARED_BYTES);
        // A thread copies one entry of a key tile's list.
        assert!(tile.keys <= tile.threads());
        // A warp computes 16 rows at a time, two together those of a wide tile.
        assert!(tile.rows.is_multiple_of(tile.warps * 16 / if tile.is_divided() { 2 } else { 1 }));
        i += 1;
    }
};

/// A form of a kernel with tile lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ListForm {
    /// Whether each query sees a range of keys.
    pub has_ranges: bool,
    /// Whether tensors are read and written where their segments lie.
    pub has_segments: bool,
}

#[cfg(test)]
impl ListForm {
    pub const PLAIN: Self = Self { has_ranges: false, has_segments: false };
    /// Every form.
    pub const ALL: [Self; 4] = [
        Self::PLAIN,
        Self { has_ranges: true, ..Self::PLAIN },
        Self { has_segments: true, ..Self::PLAIN },
        Self { has_ranges: true, has_segments: true },
    ];

    /// Whether a kernel has it.
    pub fn is_of(self, kernel: Kernel) -> bool {
        let takes_segments = kernel.traits().segments == SegmentAccess::InPlaceFused;
        (kernel.has_ranges() || !self.has_ranges) && (takes_segments || !self.has_segments)
    }
}

/// Sizes of a kernel with tile lists for one compiled head dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ListTile {
    /// Whose sizes they are.
    pub kernel: Kernel,
    /// Head dimension that the kernel is compiled for; smaller ones run in it too.
    width: u32,
    /// Query rows of a block.
    pub rows: u32,
    /// Keys of a step.
    pub keys: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Warpgroups that share a query tile's rows, if several blocks can share its keys.
    pub splitting_warpgroups: Option<u32>,
    /// Whether it is one of the shorter ones.
    is_short: bool,
    /// Whether two blocks share what they load; only for calls without a mask.
    pub is_paired: bool,
    /// Blocks that share a multiprocessor; several only for narrow key ranges and for few query tiles.
    pub blocks: u32,
}

impl ListTile {
    const SM90: [[u32; 5]; count(SM90_TILES)] = parse(SM90_TILES);
    const SM90_SHORT: [[u32; 5]; count(SM90_SHORT_TILES)] = parse(SM90_SHORT_TILES);
    const SM90_SHORT_RANGED: [[u32; 5]; count(SM90_SHORT_RANGED_TILES)] = parse(SM90_SHORT_RANGED_TILES);
    const SM90_NARROW: [[u32; 6]; count(SM90_NARROW_TILES)] = parse(SM90_NARROW_TILES);
    const SM90_SMALL: [[u32; 6]; count(SM90_SMALL_TILES)] = parse(SM90_SMALL_TILES);
    const SM90_PAIR: [[u32; 5]; count(SM90_PAIR_TILES)] = parse(SM90_PAIR_TILES);
    const SM90_SHORT_PAIR: [[u32; 5]; count(SM90_SHORT_PAIR_TILES)] = parse(SM90_SHORT_PAIR_TILES);
    const SM100: [[u32; 2]; count(SM100_TILES)] = parse(SM100_TILES);

    /// The narrowest tile of a kernel that holds a head dimension.
    pub fn of(kernel: Kernel, head_dim: usize) -> Option<Self> {
        match kernel {
            Kernel::CudaSm90 => narrowest(&Self::SM90, head_dim).map(Self::sm90),
            Kernel::CudaSm100 => narrowest(&Self::SM100, head_dim).map(Self::sm100),
            _ => None,
        }
    }

    /// Those with fewer keys a step, for whole tensors without key ranges.
    pub fn short(self) -> impl Iterator<Item = Self> {
        let entries = Self::SM90_SHORT.into_iter().filter(move |entry| entry[0] == self.width);
        entries.filter(move |_| self.kernel == Kernel::CudaSm90).map(Self::sm90_short)
    }

    /// Those of so many keys a step, for whole tensors without key ranges, if the kernel has them.
    pub fn short_of(self, keys: usize) -> Option<Self> {
        self.short().find(|tile| tile.keys as usize == keys)
    }

    /// Those with fewer keys a step, for whole tensors with key ranges, if the kernel has them.
    pub fn short_ranged(self) -> Option<Self> {
        let entry = Self::SM90_SHORT_RANGED.into_iter().find(|entry| entry[0] == self.width);
        entry.filter(|_| self.kernel == Kernel::CudaSm90).map(Self::sm90_short)
    }

    const fn sm90_short(entry: [u32; 5]) -> Self {
        Self { is_short: true, ..Self::sm90(entry) }
    }

    /// The same for key ranges of whole tensors that are very narrow, if the kernel has it: several blocks share a multiprocessor. Only
    /// for rows as wide as the tile: others take so long to write that some calls take longer.
    pub fn narrow(self, head_dim: usize) -> Option<Self> {
        let entry = Self::SM90_NARROW.into_iter().find(|entry| entry[0] as usize == head_dim);
        entry.filter(|_| self.kernel == Kernel::CudaSm90).map(Self::sm90_narrow)
    }

    /// The same for whole tensors without a mask and of few query tiles: the keys of a step are the same.
    pub fn small(self, head_dim: usize) -> Option<Self> {
        let is_like = |entry: &[u32; 6]| entry[0] as usize == head_dim && entry[2] == self.keys;
        let entry = Self::SM90_SMALL.into_iter().find(is_like);
        entry.filter(|_| self.kernel == Kernel::CudaSm90).map(Self::sm90_narrow)
    }

    /// The same for whole tensors without a mask, in pairs of blocks, if the kernel has it.
    pub fn paired(self) -> Option<Self> {
        let longest = Self::SM90_PAIR.map(Self::sm90);
        let short = Self::SM90_SHORT_PAIR.map(Self::sm90_short);
        let found = longest.into_iter().chain(short).find(|&tile| tile == self);
        found.map(|tile| Self { is_paired: true, ..tile })
    }

    const fn sm90_narrow([width, warpgroups, keys, query_tiles, stages, blocks]: [u32; 6]) -> Self {
        Self { blocks, ..Self::sm90([width, warpgroups, keys, query_tiles, stages]) }
    }

    /// Shared memory: the query tiles, whose places outputs take, and the stages of key and value
    /// tiles.
    const fn sm90([width, warpgroups, keys, query_tiles, stages]: [u32; 5]) -> Self {
        let rows = warpgroups * SM90_WARPGROUP_ROWS;
        let tile_rows = query_tiles * rows + stages * STAGE_TENSORS * keys;
        Self {
            kernel: Kernel::CudaSm90,
            width,
            rows,
            keys,
            // One more warpgroup loads.
            threads: (warpgroups + 1) * WARPGROUP_THREADS,
            shared_bytes: tile_rows * width * ELEMENT_BYTES + SM90_EXTRA_SHARED_BYTES,
            splitting_warpgroups: Some(warpgroups),
            is_short: false,
            is_paired: false,
            blocks: 1,
        }
    }

    /// Shared memory: the query tiles, the stages of key and value tiles, and the output tile.
    const fn sm100([width, stages]: [u32; 2]) -> Self {
        let tiles = SM100_QUERY_TILES + STAGE_TENSORS * stages + 1;
        Self {
            kernel: Kernel::CudaSm100,
            width,
            rows: SM100_QUERY_TILES * SM100_TILE_ROWS,
            keys: SM100_TILE_ROWS,
            threads: SM100_THREADS,
            shared_bytes: tiles * SM100_TILE_ROWS * width * ELEMENT_BYTES + SM100_EXTRA_SHARED_BYTES,
            splitting_warpgroups: None,
            is_short: false,
            is_paired: false,
            blocks: 1,
        }
    }

    /// Columns of a panel, as tiles lie in shared memory.
    pub const fn panel(self) -> u32 {
        if self.width.is_multiple_of(64) { 64 } else { 32 }
    }

    /// Bytes that a part of a split query tile leaves for the others: f32 sums of the output, and a
    /// maximum and a sum for each of two rows in each of a lane's four columns.
    pub fn part_bytes(self) -> u64 {
        let threads = u64::from(self.splitting_warpgroups.unwrap_or_default() * WARPGROUP_THREADS);
        threads * (u64::from(self.width) / 8 + 1) * 16
    }

    /// Bytes that count the parts of a split query tile, one counter a warpgroup.
    pub fn part_count_bytes(self) -> u64 {
        u64::from(self.splitting_warpgroups.unwrap_or_default()) * 4
    }

    /// The end of the kernel's name, after the element type.
    pub fn name(self, ListForm { has_ranges, has_segments }: ListForm) -> String {
        let Self { width, splitting_warpgroups, is_short, is_paired, keys, blocks, .. } = self;
        let warpgroups = splitting_warpgroups.map_or_else(String::new, |warpgroups| format!("_w{warpgroups}"));
        let short = if is_short { format!("_k{keys}") } else { String::new() };
        let shared = match (blocks > 1, has_ranges) {
            (true, true) => "_narrow",
            (true, false) => "_small",
            (false, _) => "",
        };
        let paired = if is_paired { "_pair" } else { "" };
        let ranged = if has_ranges { "_ranged" } else { "" };
        let segments = if has_segments { "_segments" } else { "" };
        format!("d{width}{warpgroups}{short}{shared}{paired}{ranged}{segments}")
    }

    /// Of a table of `sm90`.
    const fn assert_sm90_fits(table: &[[u32; 5]]) {
        let mut i = 0;
        while i < table.len() {
            Self::sm90(table[i]).assert_fits();
            i += 1;
        }
    }

    /// Of a table of `sm90` whose blocks share a multiprocessor.
    const fn assert_sm90_narrow_fits(table: &[[u32; 6]]) {
        let mut i = 0;
        while i < table.len() {
            Self::sm90_narrow(table[i]).assert_fits();
            i += 1;
        }
    }

    const fn assert_fits(self) {
        // A block alone may have all of a multiprocessor's but what the driver takes.
        let all = SM90_MAX_SHARED_BYTES + RESERVED_SHARED_BYTES;
        assert!(self.blocks * (self.shared_bytes + RESERVED_SHARED_BYTES) <= all);
        assert!(self.rows.is_multiple_of(GROUP_ROWS) && self.keys.is_multiple_of(GROUP_ROWS));
    }
}

const _: () = {
    assert_widths(&ListTile::SM90, Kernel::CudaSm90);
    assert_widths(&ListTile::SM100, Kernel::CudaSm100);
    ListTile::assert_sm90_fits(&ListTile::SM90);
    ListTile::assert_sm90_fits(&ListTile::SM90_SHORT);
    ListTile::assert_sm90_fits(&ListTile::SM90_SHORT_RANGED);
    ListTile::assert_sm90_narrow_fits(&ListTile::SM90_NARROW);
    ListTile::assert_sm90_narrow_fits(&ListTile::SM90_SMALL);
    let mut i = 0;
    while i < ListTile::SM100.len() {
        let tile = ListTile::sm100(ListTile::SM100[i]);
        tile.assert_fits();
        // Tensor memory is one block's: a multiprocessor has no room for a second one.
        assert!(tile.shared_bytes > SM90_MAX_SHARED_BYTES / 2);
        i += 1;
    }
};

/// Shared memory that the driver takes for each block.
const RESERVED_SHARED_BYTES: u32 = 1 << 10;

/// Every tile, as the cost model sees it on a chip with so much shared memory for the blocks of a multiprocessor.
pub fn tilings(shared_bytes: u32) -> impl Iterator<Item = Tiling> {
    let sm80 = Tile::TABLE.map(|entry| {
        let tile = Tile::new(entry);
        let fit = shared_bytes / (tile.shared_bytes(FormSm80::Plain) + RESERVED_SHARED_BYTES);
        Tiling {
            kernel: Kernel::CudaSm80,
            width: tile.width as usize,
            rows: tile.rows as usize,
            keys: tile.keys as usize,
            blocks: tile.most_blocks().min(fit).max(1) as usize,
            splits: false,
            max_heads: MAX_GRID,
        }
    });
    let by_lists = |tile: ListTile| Tiling {
        kernel: tile.kernel,
        width: tile.width as usize,
        rows: tile.rows as usize,
        keys: tile.keys as usize,
        blocks: 1,
        splits: tile.splitting_warpgroups.is_some(),
        max_heads: usize::MAX,
    };
    let sm90 = ListTile::SM90.map(ListTile::sm90);
    let short = sm90.into_iter().flat_map(ListTile::short).map(by_lists);
    let sm100 = ListTile::SM100.map(ListTile::sm100).map(by_lists);
    sm80.into_iter().chain(sm90.map(by_lists)).chain(short).chain(sm100)
}

const SM80_TILES: &[u8] = include_bytes!("../../../../kernels/attention/sm80/tiles.h");
const SM90_TILES: &[u8] = include_bytes!("../../../../kernels/attention/sm90/tiles.h");
const SM90_SHORT_TILES: &[u8] = include_bytes!("../../../../kernels/attention/sm90/short_tiles.h");
const SM90_SHORT_RANGED_TILES: &[u8] = include_bytes!("../../../../kernels/attention/sm90/short_ranged_tiles.h");
const SM90_NARROW_TILES: &[u8] = include_bytes!("../../../../kernels/attention/sm90/narrow_tiles.h");
const SM90_SMALL_TILES: &[u8] = include_bytes!("../../../../kernels/attention/sm90/small_tiles.h");
const SM90_PAIR_TILES: &[u8] = include_bytes!("../../../../kernels/attention/sm90/pair_tiles.h");
const SM90_SHORT_PAIR_TILES: &[u8] = include_bytes!("../../../../kernels/attention/sm90/short_pair_tiles.h");
const SM100_TILES: &[u8] = include_bytes!("../../../../kernels/attention/sm100/tiles.h");

/// The first entry of a table, by rising widths, that is as wide as a head dimension.
fn narrowest<const FIELDS: usize>(table: &[[u32; FIELDS]], head_dim: usize) -> Option<[u32; FIELDS]> {
    table.iter().find(|entry| entry[0] as usize >= head_dim).copied()
}

/// Widths rise up to the largest head dimension of the kernel.
const fn assert_widths<const FIELDS: usize>(table: &[[u32; FIELDS]], kernel: Kernel) {
    let (mut i, mut widest) = (0, 0);
    while i < table.len() {
        assert!(table[i][0] > widest);
        widest = table[i][0];
        i += 1;
    }
    assert!(widest as usize == kernel.max_head_dim());
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

/// Entries of a table.
const fn count(text: &[u8]) -> usize {
    let (mut count, mut at) = (0, 0);
    while let Some(entry) = next_entry(text, at) {
        count += 1;
        at = entry;
    }
    count
}

/// The numbers of every entry.
const fn parse<const N: usize, const FIELDS: usize>(text: &[u8]) -> [[u32; FIELDS]; N] {
    let mut entries = [[0_u32; FIELDS]; N];
    let (mut i, mut at) = (0, 0);
    while let Some(entry) = next_entry(text, at) {
        at = entry;
        let mut field = 0;
        while text[at] != b')' {
            match text[at] {
                digit @ b'0'..=b'9' => entries[i][field] = entries[i][field] * 10 + (digit - b'0') as u32,
                b',' => field += 1,
                byte => assert!(byte == b' ', "an entry holds numbers, commas and spaces"),
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
    use crate::call::cost::Machine;
    use crate::call::cost_cases::check;
    use crate::error::Result;

    /// An H100, by what the blocks of a multiprocessor share there.
    fn h100() -> Machine {
        let Some(machine) = Machine::new((9, 0), 132, tilings(228 * 1024)) else { unreachable!("the H100 has a row") };
        machine
    }

    #[test]
    fn the_script_that_fits_the_constants_has_the_same_formulas() -> Result<()> {
        check(&h100(), &[Kernel::CudaSm80, Kernel::CudaSm90])
    }

    #[test]
    fn entries_are_read_and_comments_are_not() {
        const TEXT: &[u8] = b"//  X(head_dim, rows)\n#define TILES(X) \\\n  X(32, 128, 0) \\\n X(256,64,  1)\n";
        const PARSED: [[u32; 3]; count(TEXT)] = parse(TEXT);
        assert_eq!(PARSED, [[32, 128, 0], [256, 64, 1]]);
    }

    #[test]
    fn every_head_dim_is_in_the_narrowest_tile_that_holds_it() {
        for head_dim in (8..=512).step_by(8) {
            assert!(Tile::of(head_dim).is_some_and(|tile| tile.width as usize >= head_dim), "{head_dim}");
        }
        assert_eq!(Tile::of(64).map(|tile| tile.width), Some(64));
        assert_eq!(Tile::of(72).map(|tile| tile.width), Some(96));
        assert_eq!(
            (Tile::of(256).map(|tile| tile.width), Tile::of(264).map(|tile| tile.width)),
            (Some(256), Some(512))
        );
        assert_eq!(Tile::of(520), None);
        let width = |kernel, head_dim| ListTile::of(kernel, head_dim).map(|tile| tile.width);
        for (head_dim, expected) in [(8, 64), (64, 64), (72, 96), (96, 96), (104, 128), (128, 128)] {
            assert_eq!(width(Kernel::CudaSm90, head_dim), Some(expected), "{head_dim}");
            assert_eq!(width(Kernel::CudaSm100, head_dim), Some(expected), "{head_dim}");
        }
        assert_eq!((width(Kernel::CudaSm90, 136), width(Kernel::CudaSm100, 136)), (Some(192), None));
        assert_eq!((width(Kernel::CudaSm90, 264), width(Kernel::CudaSm80, 64)), (None, None));
    }

    /// As kernels/attention/sm100/block.cuh lays it out.
    #[test]
    fn a_block_of_sm100_has_two_query_tiles_an_output_tile_and_its_stages() {
        for (head_dim, stages, panel) in [(64, 4, 64), (96, 3, 32), (128, 2, 64)] {
            let tile = ListTile::of(Kernel::CudaSm100, head_dim);
            let found = tile.map(|tile| (tile.rows, tile.keys, tile.threads, tile.panel(), tile.shared_bytes));
            let tile_bytes = 128 * head_dim as u32 * 2;
            assert_eq!(found, Some((256, 128, 512, panel, (3 + 2 * stages) * tile_bytes + 3072)), "{head_dim}");
            assert_eq!(tile.map(|tile| tile.name(ListForm::PLAIN)), Some(format!("d{head_dim}")));
        }
    }

    /// As kernels/attention/sm90/block.cuh lays it out.
    #[test]
    fn a_block_of_sm90_has_its_query_tiles_and_its_stages() {
        let bytes = |head_dim| ListTile::of(Kernel::CudaSm90, head_dim).map(|tile| tile.shared_bytes);
        assert_eq!(bytes(64), Some((2 * 192 + 2 * 4 * 128) * 128 + 2048));
        assert_eq!(bytes(96), Some((2 * 192 + 2 * 3 * 112) * 192 + 2048));
        let tile = ListTile::of(Kernel::CudaSm90, 128);
        let found = tile.map(|tile| (tile.rows, tile.keys, tile.threads, tile.panel(), tile.shared_bytes));
        assert_eq!(found, Some((128, 160, 384, 64, (2 * 128 + 2 * 2 * 160) * 256 + 2048)));
        let names = ListForm::ALL.map(|form| tile.map(|tile| tile.name(form)).unwrap_or_default());
        assert_eq!(names, ["d128_w2", "d128_w2_ranged", "d128_w2_segments", "d128_w2_ranged_segments"]);
        assert_eq!(tile.map(ListTile::part_bytes), Some(256 * 17 * 16));
        assert_eq!(tile.map(ListTile::part_count_bytes), Some(8));
    }

    #[test]
    fn short_tiles_of_sm90_have_fewer_keys_and_a_name_of_their_own() {
        let machine = h100();
        for entry in ListTile::SM90 {
            let tile = ListTile::sm90(entry);
            // The cost model knows all of them, the longest first.
            let known = machine.tilings(Kernel::CudaSm90, tile.width as usize).map(|(tiling, _)| tiling.keys as u32);
            assert!(known.eq(std::iter::once(tile).chain(tile.short()).map(|tile| tile.keys)), "{tile:?}");
            assert!(tile.short().count() > 0, "{tile:?}");
            for short in tile.short().chain(tile.short_ranged()) {
                assert!(short.keys < tile.keys && short.is_short, "{short:?}");
                // Query tiles are the same, so that what is counted in them stays.
                assert_eq!((tile.rows, tile.threads), (short.rows, short.threads));
            }
        }
        let tile = ListTile::of(Kernel::CudaSm90, 104);
        let ranged = ListForm { has_ranges: true, ..ListForm::PLAIN };
        let name = |short: Option<ListTile>, form| short.map(|short| short.name(form)).unwrap_or_default();
        assert_eq!(name(tile.and_then(|tile| tile.short_of(64)), ListForm::PLAIN), "d128_w2_k64");
        assert_eq!(name(tile.and_then(ListTile::short_ranged), ranged), "d128_w2_k128_ranged");
        assert_eq!(tile.and_then(|tile| tile.short_of(160)), None);
        let wide = ListTile::of(Kernel::CudaSm100, 128);
        assert_eq!((wide.and_then(|tile| tile.short_of(64)), wide.and_then(ListTile::short_ranged)), (None, None));
    }

    #[test]
    fn narrow_tiles_of_sm90_share_a_multiprocessor_and_have_a_name_of_their_own() {
        let ranged = ListForm { has_ranges: true, ..ListForm::PLAIN };
        let narrow = |head_dim| ListTile::of(Kernel::CudaSm90, head_dim).and_then(|tile| tile.narrow(head_dim));
        let found = narrow(64).map(|tile| (tile.rows, tile.keys, tile.threads, tile.blocks, tile.shared_bytes));
        assert_eq!(found, Some((64, 64, 256, 3, (2 * 64 + 2 * 3 * 64) * 128 + 2048)));
        assert_eq!(narrow(64).map(|tile| tile.name(ranged)).as_deref(), Some("d64_w1_narrow_ranged"));
        assert_eq!(narrow(64).map(ListTile::part_count_bytes), Some(4));
        assert_eq!(narrow(96).map(|tile| (tile.rows, tile.keys, tile.blocks)), Some((64, 64, 3)));
        // Rows that are less wide, widths without such tiles, another kernel.
        assert_eq!((narrow(48), narrow(80), narrow(128)), (None, None, None));
        assert_eq!(ListTile::of(Kernel::CudaSm100, 64).and_then(|tile| tile.narrow(64)), None);
    }

    #[test]
    fn small_tiles_of_sm90_have_the_keys_of_the_longest() {
        let longest = |head_dim| ListTile::of(Kernel::CudaSm90, head_dim);
        let small = longest(64).and_then(|tile| tile.small(64));
        let found = small.map(|tile| (tile.rows, tile.keys, tile.threads, tile.blocks, tile.shared_bytes));
        assert_eq!(found, Some((64, 128, 256, 2, (2 * 64 + 2 * 2 * 128) * 128 + 2048)));
        assert_eq!(small.map(|tile| tile.name(ListForm::PLAIN)).as_deref(), Some("d64_w1_small"));
        // Shorter tiles, rows that are less wide, another kernel.
        assert_eq!(longest(64).and_then(|tile| tile.short_of(64)).and_then(|tile| tile.small(64)), None);
        assert_eq!(
            (longest(48).and_then(|tile| tile.small(48)), longest(96).and_then(|tile| tile.small(96))),
            (None, None)
        );
        assert_eq!(ListTile::of(Kernel::CudaSm100, 64).and_then(|tile| tile.small(64)), None);
    }

    #[test]
    fn pairs_of_blocks_have_the_tiles_of_blocks_alone_and_a_name_of_their_own() {
        let longest = |head_dim| ListTile::of(Kernel::CudaSm90, head_dim);
        let short = |head_dim, keys| longest(head_dim).and_then(|tile| tile.short_of(keys));
        let pair = |tile: Option<ListTile>| tile.and_then(ListTile::paired);
        let found = [(longest(128), "d128_w2_pair"), (short(128, 128), "d128_w2_k128_pair")];
        for (tile, name) in found {
            assert_eq!(pair(tile).map(|tile| ListTile { is_paired: false, ..tile }), tile);
            assert_eq!(pair(tile).map(|tile| tile.name(ListForm::PLAIN)).as_deref(), Some(name));
            assert_eq!(pair(pair(tile)), None);
        }
        // Each entry of the tables is a tile that blocks have alone.
        assert_eq!(ListTile::SM90_PAIR.len() + ListTile::SM90_SHORT_PAIR.len(), found.len());
        // Other lengths, other widths, another kernel.
        assert_eq!((pair(short(128, 64)), pair(short(256, 48))), (None, None));
        assert_eq!([64, 96, 192, 256].map(|head_dim| pair(longest(head_dim))), [None; 4]);
        assert_eq!(pair(ListTile::of(Kernel::CudaSm100, 128)), None);
    }

    #[test]
    fn wide_tiles_have_the_forms_that_do_everything() {
        let compiled = |head_dim| FormSm80::ALL.map(|form| Tile::of(head_dim).map(|tile| tile.compiled_form(form)));
        assert_eq!(compiled(256), FormSm80::ALL.map(Some));
        for (form, compiled) in FormSm80::ALL.into_iter().zip(compiled(257)) {
            let is_fused = form.suffix().contains("fused");
            assert_eq!(compiled, Some(if is_fused { FormSm80::FusedModified } else { FormSm80::Modified }), "{form:?}");
        }
    }

    #[test]
    fn shared_memory_is_the_kernels_sum() {
        let tile = Tile { width: 128, rows: 128, keys: 64, keys_masked: 32, warps: 4 };
        let tile_bytes = |rows: u32| rows * 128 * 2;
        let plain = tile_bytes(128) + 2 * (tile_bytes(64) + tile_bytes(64));
        assert_eq!(tile.shared_bytes(FormSm80::Plain), plain);
        assert_eq!(tile.shared_bytes(FormSm80::Fused), plain + 4 * (128 + 64 + 64));
        assert_eq!(tile.shared_bytes(FormSm80::Masked), tile_bytes(128) + 2 * (tile_bytes(32) + tile_bytes(32)));
        // As two warps of a pair add up the scores of their rows: after the lists, if there are any.
        let wide = Tile { width: 512, rows: 32, keys: 16, keys_masked: 16, warps: 4 };
        let tiles = (32 + 4 * 16) * 512 * 2;
        let pairs = 2 * 2 * 32 * 16;
        assert_eq!(wide.shared_bytes(FormSm80::Modified), tiles + pairs);
        assert_eq!(wide.shared_bytes(FormSm80::FusedModified), tiles + 4 * (32 + 2 * 16) + pairs);
    }
}
