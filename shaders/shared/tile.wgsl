// One tile of attention: TILE_ROWS query rows of one head against all keys of their batch row or sequence, TILE_KEYS at a time;
// both are the kernel's. Positions are counted in words of 16 bytes from the start of each binding.

const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;

struct Tile {
    // Whether there is a tile for this workgroup at all.
    exists: bool,
    batch: u32,
    head: u32,
    // Position of the first row among the queries, for masks, bias and lse.
    first_row: u32,
    rows: u32,
    keys: u32,
    q: u32,
    k: u32,
    v: u32,
    out: u32,
}

struct Biased {
    score: f32,
    kept: bool,
}
