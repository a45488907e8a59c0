// Packed rows. Tile t of the list [first row, rows, sequence, unused] belongs to one sequence; its keys are rows
// cu_seqlens_k[sequence]..cu_seqlens_k[sequence + 1]. Workgroup (x, y, z) takes tile x + y · gridwidth and query head z.
//
//   q, out   [ s0 s0 s0 s0 s0 | s1 s1 | s2 s2 s2 s2 s2 s2 s2 ]
//              └ tile ┘ └ tile ┘└ t ┘   └ tile ┘ └ tile ┘

// Whether a key between others may be dropped.
const HAS_HOLES: bool = false;

fn locate(workgroup: vec3<u32>) -> Tile {
    let group = in_grid(workgroup);
    let at = params.first_tile + group.x + group.y * params.grid_width;
    var tile: Tile;
    tile.exists = at < params.end_tile;
    let entry = tiles[min(at, params.end_tile - 1u)];
    let first_key = cu_seqlens_k[entry.z];
    tile.first_row = entry.x;
    tile.rows = entry.y;
    tile.keys = cu_seqlens_k[entry.z + 1u] - first_key;
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

// Which of 32 keys are kept, the first in the lowest bit. `first_key` is a multiple of 32.
fn kept_keys(tile: Tile, first_key: u32) -> u32 {
    if first_key >= tile.keys {
        return 0u;
    }
    return 0xffffffffu >> (32u - min(tile.keys - first_key, 32u));
}

fn row_is_kept(tile: Tile, row: u32) -> bool {
    return true;
}

fn biased(tile: Tile, row: u32, key: u32, score: f32) -> Biased {
    return Biased(score, true);
}

// The natural logarithm of the sum of exp(score), -inf where there is no key.
fn write_lse(tile: Tile, row: u32, row_max: f32, row_sum: f32) {
    if WRITE_LSE {
        let value = bitcast<u32>((row_max + log2(row_sum)) * LN_2);
        let position = params.lse_offset + tile.head * params.lse_stride_h + (tile.first_row + row) * params.lse_stride_s;
        lse[position] = select(value, 0xff800000u, row_sum == 0.0);
    }
}
