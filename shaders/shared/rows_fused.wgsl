// Padded tensors in place: only kept queries meet only kept keys. For each batch row `query_tokens` and `key_tokens` hold the
// number of kept tokens, then those tokens, then the dropped ones, each ascending:
//
//   mask    [ 1 0 0 1 1 0 ]  ->  [ 3 | 0 3 4 | 1 2 5 ]
//                                      kept    dropped
//
// Tile t of the list [first, rows, batch row, is dropped] is a range of the queries in this order. It meets the kept keys of its
// batch row, in theirs; a tile of dropped queries meets none, so that zeros come out. Workgroup (x, y, z) takes tile
// x + y · gridwidth and query head z.
//
//   queries  [ 0 3 4 7 9 12 13 | 1 2 5 6 8 10 11 ]
//              └ tile ┘ └ tile ┘└  dropped tile  ┘

// Whether a key between others may be dropped.
const HAS_HOLES: bool = false;

fn locate(workgroup: vec3<u32>) -> Tile {
    let group = in_grid(workgroup);
    let at = params.first_tile + group.x + group.y * params.grid_width;
    var tile: Tile;
    tile.exists = at < params.end_tile;
    let entry = tiles[min(at, params.end_tile - 1u)];
    tile.batch = entry.z - params.batch_base;
    tile.first_row = entry.x;
    tile.rows = entry.y;
    tile.keys = select(key_tokens[key_list(tile)], 0u, entry.w == 1u);
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

fn query_row(tile: Tile, row: u32) -> u32 {
    let list = params.query_tokens_offset + tile.batch * (params.seq_q + 1u);
    return query_tokens[list + 1u + tile.first_row + row];
}

fn key_row(tile: Tile, key: u32) -> u32 {
    return key_tokens[key_list(tile) + 1u + key];
}

// Which of 32 keys are kept, the first in the lowest bit. `first_key` is a multiple of 32.
fn kept_keys(tile: Tile, first_key: u32) -> u32 {
    if first_key >= tile.keys {
        return 0u;
    }
    return 0xffffffffu >> (32u - min(tile.keys - first_key, 32u));
}

// Dropped queries lie in tiles without keys.
fn row_is_kept(tile: Tile, row: u32) -> bool {
    return tile.keys > 0u;
}

fn biased(tile: Tile, row: u32, key: u32, score: f32) -> Biased {
    return Biased(score, true);
}

fn write_lse(tile: Tile, row: u32, row_max: f32, row_sum: f32) {}
