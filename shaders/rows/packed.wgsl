// Packed rows. A tile of the list is [first row, rows, sequence, rows from the
// first to the sequence's end] and belongs to one
// sequence. Its keys are rows cu_seqlens_k[sequence] .. cu_seqlens_k[sequence + 1] - 1.
//
//   q, out   [ s0 s0 s0 s0 s0 | s1 s1 | s2 s2 s2 s2 s2 s2 s2 ]
//              └ tile ┘ └ tile ┘└ t ┘   └ tile ┘ └ tile ┘

fn locate(workgroup: vec3<u32>) -> Tile {
    let group = in_grid(workgroup);
    let of_list = listed(group);
    let entry = of_list.entry;
    let first_key = cu_seqlens_k[entry.z];
    var tile: Tile;
    tile.exists = of_list.exists;
    tile.first_row = entry.x;
    tile.rows = entry.y;
    tile.ranges_at = entry.x;
    tile.union_at = of_list.at;
    find_keys(&tile, cu_seqlens_k[entry.z + 1u] - first_key);
    tile.level = i32(cu_seqlens_k[entry.z + 1u] - first_key) - i32(entry.w); // with modifiers
    tile.head = group.z;
    let kv_head = group.z / params.group_size;
    let row = entry.x - params.q_row_base;
    let key = first_key - params.k_row_base;
    tile.q = params.q_offset + row * params.q_stride_s + group.z * params.q_stride_h;
    tile.k = params.k_offset + key * params.k_stride_s + kv_head * params.k_stride_h;
    tile.v = params.v_offset + key * params.v_stride_s + kv_head * params.v_stride_h;
    tile.out = params.out_offset + row * params.out_stride_s + group.z * params.out_stride_h;
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

fn row_is_kept(tile: Tile, row: u32) -> bool {
    return true;
}
