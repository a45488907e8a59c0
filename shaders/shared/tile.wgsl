// One tile of attention: TILE_ROWS query rows of one head against all keys of their batch row or sequence, TILE_KEYS at a time;
// both are the kernel's. Positions are counted in words of 16 bytes from the start of each binding.
//
// A rows_*.wgsl says where tiles lie: `locate` finds the one of a workgroup; row `query_row(tile, i)` from `tile.q` (and
// `tile.out`) is its i-th query, i < rows, and row `key_row(tile, j)` from `tile.k` (and `tile.v`) its j-th key, j < keys.

const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;

struct Tile {
    // Whether there is a tile for this workgroup at all.
    exists: bool,
    batch: u32,
    head: u32,
    // Position of the first row among the queries, for masks, bias, lse and lists.
    first_row: u32,
    rows: u32,
    keys: u32,
    q: u32,
    k: u32,
    v: u32,
    out: u32,
}

// The workgroup's place in the whole grid, of which a dispatch may be a part: long work is split.
fn in_grid(group: vec3<u32>) -> vec3<u32> {
    return group + vec3<u32>(params.first_group_x, params.first_group_y, params.first_group_z);
}

struct Biased {
    score: f32,
    kept: bool,
}
