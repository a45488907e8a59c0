// Which keys of a step of TILE_KEYS keys, 64 at most, are kept: bits of two u32s.

// The bits when all keys are.
const ALL_LOW: u32 = 0xffffffffu >> (32u - min(TILE_KEYS, 32u));
const ALL_HIGH: u32 = select(0u, 0xffffffffu, TILE_KEYS > 32u);

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

// The first step from `first_key` on that has a kept key, or the tile's end.
fn next_step(tile: Tile, first_key: u32) -> u32 {
    var at = first_key;
    // Elsewhere every step has.
    while HAS_HOLES && at < tile.keys && all(kept_in(tile, at) == vec2<u32>(0u)) {
        at += TILE_KEYS;
    }
    return at;
}
