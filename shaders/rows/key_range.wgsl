// Which keys a tile of queries needs: the only place that says so.
//
// Kernels walk over `tile.keys` in steps of TILE_KEYS keys, 64 at most, and pass over steps
// without a kept key. Keys count as in `key_row`: positions in the tensor, or in a list of kept
// keys.
//
//           tile.keys.first                    tile.keys.end
//   keys   · · · [ k k k k | · · · · | k · k k | k k · ] · · ·
//                  step      passed    key mask  last step
//                            over
//
// A range that differs from query to query has two sides (ranges.wgsl). The tile needs the union
// of its queries' ranges: `find_keys`, which makes `tile.keys.first` a multiple of TILE_KEYS. A
// query drops the other keys of that union one by one: those outside of `seen_by`, as those with a
// bias of -inf. No query drops any in a step that is `seen_by_all`.

// The bits when all keys of a step are kept.
const ALL_LOW: u32 = 0xffffffffu >> (32u - min(TILE_KEYS, 32u));
const ALL_HIGH: u32 = select(0u, 0xffffffffu, TILE_KEYS > 32u);

// Which of 32 keys are needed, the first in the lowest bit. `first_key` is a multiple of 32.
fn kept_keys(tile: Tile, first_key: u32) -> u32 {
    if first_key >= tile.keys.end {
        return 0u;
    }
    let kept = 0xffffffffu >> (32u - min(tile.keys.end - first_key, 32u));
    return kept & mask_bits(tile, first_key);
}

// Which keys of a step are needed: bits of two u32s.
fn kept_in(tile: Tile, first_key: u32) -> vec2<u32> {
    var kept = vec2<u32>(kept_keys(tile, first_key & ~31u) >> (first_key & 31u), 0u);
    if TILE_KEYS > 32u {
        kept.y = kept_keys(tile, first_key + 32u);
    }
    return kept & vec2<u32>(ALL_LOW, ALL_HIGH);
}

fn is_kept(kept: vec2<u32>, key: u32) -> bool {
    let bits = select(kept.x, kept.y, TILE_KEYS > 32u && key >= 32u);
    return ((bits >> (key & 31u)) & 1u) == 1u;
}

// The first step from `first_key` on that has a needed key, or the end of the tile's keys.
fn next_step(tile: Tile, first_key: u32) -> u32 {
    var at = first_key;
    // Without a key mask every step has one.
    while KEY_MASK && at < tile.keys.end && all(kept_in(tile, at) == vec2<u32>(0u)) {
        at += TILE_KEYS;
    }
    return at;
}
