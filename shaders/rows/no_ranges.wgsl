// No ranges of keys: ranges.wgsl where every query sees every key.

fn find_keys(tile: ptr<function, Tile>, count: u32) {
    (*tile).keys = KeyRange(0u, count);
}

fn seen_by_all(tile: Tile, first_key: u32) -> bool {
    return true;
}

fn seen_by(tile: Tile, row: u32) -> KeyRange {
    return tile.keys;
}
