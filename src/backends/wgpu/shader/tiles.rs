//! Tiles of the attention kernels: how many rows and keys a workgroup takes, how it splits them,
//! and the bounds of the loops that are written out for that.

use crate::dtype::DType;

/// How attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// `attention/portable.wgsl`.
    Portable,
    /// `attention/coop.wgsl`.
    Coop(CoopTile),
}

impl Algorithm {
    /// Query rows of a workgroup.
    pub fn tile_rows(self, head_dim: usize) -> usize {
        match self {
            Self::Portable => PortableTile::of(head_dim).tile_rows() as usize,
            Self::Coop(tile) => tile.rows(),
        }
    }

    /// Keys of a step.
    pub fn step_keys(self) -> usize {
        match self {
            Self::Portable => PortableTile::KEYS as usize,
            Self::Coop(tile) => tile.keys as usize,
        }
    }

    /// Constants of the kernel's shader. `is_plain` if elements are f16 and scores are only scaled, which
    /// leaves registers to spare.
    pub(super) fn constants(self, head_dim: usize, is_plain: bool) -> Vec<(&'static str, String)> {
        match self {
            Self::Portable => {
                let tile = PortableTile::of(head_dim);
                vec![
                    ("ROWS", format!("{}u", tile.rows)),
                    ("VECS", format!("{}u", tile.vecs)),
                    ("BLOCKS", format!("{}u", tile.blocks)),
                    ("AHEAD", tile.fetches_ahead.to_string()),
                    ("TILE_ROWS", format!("{}u", tile.tile_rows())),
                    ("TILE_KEYS", format!("{}u", PortableTile::KEYS)),
                ]
            }
            Self::Coop(tile) => {
                let (blocks, ahead) = (tile.blocks(head_dim, is_plain), tile.ahead(head_dim, is_plain));
                vec![
                    ("SUBGROUP_SIZE", format!("{}u", tile.subgroup_size)),
                    ("SUBGROUPS", format!("{}u", tile.subgroups)),
                    ("TILE_ROWS", format!("{}u", tile.rows())),
                    ("TILE_KEYS", format!("{}u", tile.keys)),
                    ("BLOCKS", format!("{blocks}u")),
                    ("STEPS_AFTER", format!("{}u", ahead.steps)),
                    ("FETCHES_EARLY", ahead.fetches.to_string()),
                ]
            }
        }
    }

    /// Bounds of the loops that are written out, by their names in the kernel's shader.
    pub(super) fn unrolled_loops(self, dtype: DType, head_dim: usize, is_plain: bool) -> Vec<(&'static str, u32)> {
        match self {
            Self::Portable => PortableTile::of(head_dim).unrolled_loops(dtype, head_dim),
            Self::Coop(tile) => tile.unrolled_loops(head_dim, is_plain),
        }
    }
}

/// The cooperative-matrix kernel's shape and tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CoopTile {
    /// Rows and columns of a matrix: 8 or 16.
    pub shape: u32,
    /// Invocations of a subgroup. Every subgroup has the same number.
    pub subgroup_size: u32,
    /// Subgroups of a workgroup.
    pub subgroups: u32,
    /// Keys of a step.
    pub keys: u32,
}

/// What the cooperative-matrix kernel looks up early.
#[derive(Debug, Clone, Copy)]
struct Ahead {
    /// Steps after the one at hand whose rows are known.
    steps: u32,
    /// Whether keys and values are fetched a step before they are staged.
    fetches: bool,
}

impl CoopTile {
    /// Query rows of a workgroup.
    pub fn rows(self) -> usize {
        (self.subgroups * self.shape) as usize
    }

    /// Bytes of workgroup memory: what `attention/coop.wgsl` declares.
    pub fn workgroup_bytes(self, head_dim: usize) -> u32 {
        let dim = (head_dim as u32).next_multiple_of(self.shape);
        let lanes = self.subgroup_size / self.shape;
        let staged = 2 * self.keys * (dim / 8 + 1) * 16;
        let (probs, scores) = ((self.keys / 4 + 2) * 8, (self.keys / 4 + lanes) * 16);
        staged + self.rows() as u32 * (probs + scores) + 20
    }

    /// Blocks of rows whose scores and output a subgroup computes: 1 or 2. Of 2 it computes one half
    /// of the columns, so that each matrix of keys or values that it loads serves two products.
    fn blocks(self, head_dim: usize, is_plain: bool) -> u32 {
        let dims = (head_dim as u32).div_ceil(self.shape);
        let are_even = [self.subgroups, self.keys / self.shape, dims].iter().all(|count| count.is_multiple_of(2));
        if are_even && (is_plain || head_dim <= 64) { 2 } else { 1 }
    }

    /// As early as registers allow (docs/log/wgsl-coop.md).
    fn ahead(self, head_dim: usize, is_plain: bool) -> Ahead {
        let looks_up = self.blocks(head_dim, is_plain) == 2;
        let fetches = looks_up && is_plain && head_dim <= 64;
        Ahead { steps: 1 + u32::from(looks_up) + u32::from(fetches), fetches }
    }

    fn unrolled_loops(self, head_dim: usize, is_plain: bool) -> Vec<(&'static str, u32)> {
        // Devices with matrices of 8 are processors, which take seconds to compile unrolled loops.
        if self.shape == 8 {
            return Vec::new();
        }
        let dim = (head_dim as u32).next_multiple_of(self.shape);
        let (dim_fragments, key_fragments) = (dim / self.shape, self.keys / self.shape);
        let (lanes, blocks) = (self.subgroup_size / self.shape, self.blocks(head_dim, is_plain));
        vec![
            ("DIM_FRAGMENTS", dim_fragments),
            ("KEY_FRAGMENTS", key_fragments),
            ("SLICES", dim_fragments.div_ceil(key_fragments)),
            ("BLOCKS", blocks),
            ("OWN_KEY_FRAGMENTS", key_fragments / blocks),
            ("OWN_DIM_FRAGMENTS", dim_fragments / blocks),
            ("STEPS_AFTER", self.ahead(head_dim, is_plain).steps),
            ("LANE_WORDS", (self.keys / 8).div_ceil(lanes)),
            ("QUADS", self.keys / 4 / lanes),
            ("FETCHES", (self.keys * dim / 8).div_ceil(self.subgroups * self.subgroup_size)),
        ]
    }
}

/// How the portable kernel splits a tile over its invocations: 8 row groups of 16 lanes.
#[derive(Debug, Clone, Copy)]
struct PortableTile {
    /// Rows of an invocation.
    rows: u32,
    /// Its vectors of four columns in a block of the output's columns.
    vecs: u32,
    /// Blocks of columns.
    blocks: u32,
    /// Whether chunks are fetched into registers a step ahead.
    fetches_ahead: bool,
}

impl PortableTile {
    /// Keys of a step.
    const KEYS: u32 = 64;

    /// Scores and output of an invocation take 48 to 96 registers, and 160 past 256 columns. Chunks
    /// are fetched ahead where that was measured to be faster (docs/log/wgsl.md).
    const fn of(head_dim: usize) -> Self {
        let vecs = if head_dim <= 64 { 1 } else { 2 };
        Self {
            rows: if head_dim <= 128 { 8 } else { 4 },
            vecs,
            // A power of two, so that a chunk of values has whole rows.
            blocks: (head_dim as u32).div_ceil(64 * vecs).next_power_of_two(),
            fetches_ahead: head_dim > 64,
        }
    }

    const fn tile_rows(self) -> u32 {
        8 * self.rows
    }

    fn unrolled_loops(self, dtype: DType, head_dim: usize) -> Vec<(&'static str, u32)> {
        let vecs_per_word = 4 / dtype.size() as u32;
        // Rows whose part of a chunk all 128 invocations fetch at once: 8 vectors of each.
        let fetched_rows = 16 * vecs_per_word;
        let mut loops = vec![
            ("ROWS", self.rows),
            ("ROW_QUADS", self.rows / 4),
            ("QUAD", 4),
            ("VECS", self.vecs),
            ("BLOCKS", self.blocks),
            ("VECS_PER_WORD", vecs_per_word),
            ("Q_FETCHES", self.tile_rows() / fetched_rows),
            ("K_FETCHES", Self::KEYS / fetched_rows),
            ("V_FETCHES", 4 / vecs_per_word),
        ];
        // Every chunk has all its columns.
        if head_dim > 64 && head_dim.is_multiple_of(32) {
            loops.push(("columns", 8));
        }
        loops
    }
}
