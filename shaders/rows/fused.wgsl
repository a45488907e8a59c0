// Padded tensors, of which only kept queries meet only kept keys. For each batch row `query_tokens`
// and `key_tokens` hold the number of kept tokens, then those tokens, then the dropped ones, each
// ascending:
//
//   mask    [ 1 0 0 1 1 0 ]  ->  [ 3 | 0 3 4 | 1 2 5 ]
//                                      kept    dropped
//
// A tile of the list is [first, rows, batch row, is dropped], a range of the queries in this order.
// It meets the kept keys of its batch row, in theirs; a tile of dropped queries meets none, so that
// zeros come out.
//
//   queries  [ 0 3 4 7 9 12 13 | 1 2 5 6 8 10 11 ]
//              └ tile ┘ └ tile ┘└  dropped tile  ┘

fn locate(workgroup: vec3<u32>) -> Tile {
    let group = in_grid(workgroup);
    let of_list = listed(group);
    let entry = of_list.entry;
    var tile: Tile;
    tile.exists = of_list.exists;
    tile.batch = entry.z - params.batch_base;
    tile.first_row = entry.x;
    tile.rows = entry.y;
    tile.ranges_at = entry.z * params.ranges_stride + entry.x;
    tile.union_at = of_list.at;
    find_keys(&tile, select(key_tokens[key_list(tile)], 0u, entry.w == 1u));
    tile.is_dropped = entry.w == 1u; // with modifiers
    tile.level = i32(params.seq_k) - i32(params.seq_q); // with modifiers
    tile.head = group.z;
    let kv_head = group.z / params.group_size;
    tile.q = params.q_offset + tile.batch * params.q_stride_b + group.z * params.q_stride_h;
    tile.k = params.k_offset + tile.batch * params.k_stride_b + kv_head * params.k_stride_h;
    tile.v = params.v_offset + tile.batch * params.v_stride_b + kv_head * params.v_stride_h;
    tile.out = params.out_offset + tile.batch * params.out_stride_b + group.z * params.out_stride_h;
    return tile;
}

// Where the list of the tile's batch row begins.
fn key_list(tile: Tile) -> u32 {
    return params.key_tokens_offset + tile.batch * (params.seq_k + 1u);
}

fn lse_row(tile: Tile, row: u32) -> u32 {
    return query_row(tile, row);
}

fn key_row(tile: Tile, key: u32) -> u32 {
    return key_tokens[key_list(tile) + 1u + key];
}

// Dropped queries lie in tiles without keys, whose rows are as those of queries that see no key; a sink
// tells the two apart.
fn row_is_kept(tile: Tile, row: u32) -> bool {
    return tile.keys.end > tile.keys.first; // without modifiers
    return !tile.is_dropped; // with modifiers
}
