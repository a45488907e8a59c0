// Padded tensors, every query row computed. A workgroup takes tile x of batch row y of the window and
// query head z, where (x, y, z) is its place in the grid; with ranges x counts from the last tile.
//
//            q, out                     k, v
//   batch y  [ . . . . . . . . ]        [ k k k k k k ]   all Sk keys
//                 └ tile x ┘

fn locate(workgroup: vec3<u32>) -> Tile {
    let group = in_grid(workgroup);
    let number = group.x; // without ranges
    let number = (params.seq_q + TILE_ROWS - 1u) / TILE_ROWS - 1u - group.x; // with ranges
    let first = number * TILE_ROWS;
    var tile: Tile;
    tile.exists = true;
    tile.batch = group.y;
    tile.first_row = first;
    tile.rows = min(TILE_ROWS, params.seq_q - first);
    tile.ranges_at = (params.batch_base + group.y) * params.ranges_stride + first;
    tile.union_at = (params.batch_base + group.y) * params.unions_stride + number;
    find_keys(&tile, params.seq_k);
    tile.level = i32(params.seq_k) - i32(params.seq_q) + i32(first); // with modifiers
    tile.head = group.z;
    let kv_head = group.z / params.group_size;
    tile.q = params.q_offset + group.y * params.q_stride_b + first * params.q_stride_s + group.z * params.q_stride_h;
    tile.k = params.k_offset + group.y * params.k_stride_b + kv_head * params.k_stride_h;
    tile.v = params.v_offset + group.y * params.v_stride_b + kv_head * params.v_stride_h;
    tile.out = params.out_offset + group.y * params.out_stride_b + first * params.out_stride_s + group.z * params.out_stride_h;
    return tile;
}

fn query_row(tile: Tile, row: u32) -> u32 {
    return row;
}

fn key_row(tile: Tile, key: u32) -> u32 {
    return key;
}

fn lse_row(tile: Tile, row: u32) -> u32 {
    return tile.first_row + row;
}
