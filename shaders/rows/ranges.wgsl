// A range of keys for each query. `ranges` holds first and end for each query, then, from
// `params.unions_offset` on, two ranges for each tile: what some of its queries see, and what all
// of them see. Keys count as in `key_row`.

// The keys that some query of the tile sees, from a whole step on, of `count` keys.
fn find_keys(tile: ptr<function, Tile>, count: u32) {
    let at = params.unions_offset + 2u * (*tile).union_at;
    let some = ranges[at];
    let all = ranges[at + 1u];
    let end = min(some.y, count);
    (*tile).keys = KeyRange(min(some.x / TILE_KEYS * TILE_KEYS, end), end);
    (*tile).shared_keys = KeyRange(all.x, all.y);
}

// Whether every query of the tile sees every key of a step. `&`, since `&&` is a branch.
fn seen_by_all(tile: Tile, first_key: u32) -> bool {
    return (tile.shared_keys.first <= first_key)
        & (min(first_key + TILE_KEYS, tile.keys.end) <= tile.shared_keys.end);
}

// The keys that one query of the tile sees.
fn seen_by(tile: Tile, row: u32) -> KeyRange {
    let seen = ranges[tile.ranges_at + min(row, tile.rows - 1u)];
    return KeyRange(seen.x, seen.y);
}
