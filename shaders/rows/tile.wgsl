// One tile of attention: TILE_ROWS query rows of one head and the keys of their batch row or
// sequence, TILE_KEYS at a time. Both constants are the kernel's. Positions are counted in words of
// 16 bytes from the start of each binding.
//
// dense.wgsl, fused.wgsl and packed.wgsl say where tiles lie. `locate` finds the tile of a
// workgroup. Query i of a tile, i < rows, is row `query_row(tile, i)` from `tile.q`, and its output
// begins at `out_row(tile, i)` (output.wgsl); key j is row `key_row(tile, j)` from `tile.k` and `tile.v`. key_range.wgsl says
// which keys a tile needs.

const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
// Masked scores are this, below any score. The lowest biases come close to it.
const LOWEST: f32 = -3.4028234e38;
// With a bias or ranges, lower scores of kept keys are this.
const OVERFLOWED: f32 = -3.4028e38;

// Keys first .. end - 1. An empty range has end == first.
struct KeyRange {
    first: u32,
    end: u32,
}

struct Tile {
    // Whether there is a tile for this workgroup at all.
    exists: bool,
    batch: u32,
    head: u32,
    // Position of the first row among the queries, for masks, bias, lse and lists.
    first_row: u32,
    rows: u32,
    // Where the ranges of its queries lie, and which tile it is; see ranges.wgsl.
    ranges_at: u32,
    union_at: u32,
    // The keys that the tile needs.
    keys: KeyRange,
    // The keys that all of its queries see, where they see different ones.
    shared_keys: KeyRange,
    // Whether a list says that its queries are dropped. // with modifiers
    is_dropped: bool, // with modifiers
    // The position of a key minus that of the query level with it. // with modifiers
    level: i32, // with modifiers
    q: u32,
    k: u32,
    v: u32,
    out: u32,
}

// The workgroup's place in the whole grid: tile, batch row or row of a list, head. Long work is split
// into dispatches of parts of the grid.
//
// With ranges tiles have more or less work, and what starts last should be short, since nothing is left
// to do beside it. So heads lie along x there, which devices count first, and tiles count from the last
// one, which causal masks give the most keys: the longest tiles of all heads start first.
fn in_grid(group: vec3<u32>) -> vec3<u32> {
    let place = group + vec3<u32>(params.first_group_x, params.first_group_y, params.first_group_z);
    return vec3<u32>(place.xy, head_at(place.z)); // without ranges // with splits
    return place; // without ranges // without splits
    return place.yzx; // with ranges
}

// A score, and whether the query needs the key at all.
struct Biased {
    score: f32,
    kept: bool,
}

// OVERFLOWED for what is below it; NaN stays NaN. By bits, since compilers make a maximum of a
// comparison and a selection, which drops NaN. The bits of negative numbers grow as they fall.
// `&`, since `&&` is a branch for each score, which some compilers take minutes for.
fn saturated(score: f32) -> f32 {
    let bits = bitcast<u32>(score);
    return select(score, OVERFLOWED, (bits > bitcast<u32>(OVERFLOWED)) & (bits <= 0xff800000u));
}

// NaN for any number. Of a constant, WGSL forbids it.
fn nan_of(value: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(value) | 0x7fc00000u);
}
