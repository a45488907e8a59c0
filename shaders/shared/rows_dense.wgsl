// Padded tensors, every query row computed. Workgroup (x, y, z) takes tile x of batch row y of the window and query head z.
//
//            q, out                     k, v
//   batch y  [ . . . . . . . . ]        [ k k k k k k ]   all Sk keys; `key_bits` says which are kept
//                 └ tile x ┘

// Whether a key between others may be dropped.
const HAS_HOLES: bool = KEY_MASK;

fn locate(workgroup: vec3<u32>) -> Tile {
    let group = in_grid(workgroup);
    let first = group.x * TILE_ROWS;
    var tile: Tile;
    tile.exists = true;
    tile.batch = group.y;
    tile.first_row = first;
    tile.rows = min(TILE_ROWS, params.seq_q - first);
    tile.keys = params.seq_k;
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

// Which of 32 keys are kept, the first in the lowest bit. `first_key` is a multiple of 32.
fn kept_keys(tile: Tile, first_key: u32) -> u32 {
    if first_key >= tile.keys {
        return 0u;
    }
    var kept = 0xffffffffu >> (32u - min(tile.keys - first_key, 32u));
    if KEY_MASK {
        kept &= key_bits[(params.batch_base + tile.batch) * params.key_words + (first_key >> 5u)];
    }
    return kept;
}

fn row_is_kept(tile: Tile, row: u32) -> bool {
    if ZERO_ROWS {
        let at = tile.first_row + row;
        let word = row_bits[(params.batch_base + tile.batch) * params.row_words + (at >> 5u)];
        return ((word >> (at & 31u)) & 1u) == 1u;
    }
    return true;
}

// The score in log2 units with the bias added. A bias of -inf drops the key.
fn biased(tile: Tile, row: u32, key: u32, score: f32) -> Biased {
    if BIAS {
        let at = min(tile.first_row + row, params.seq_q - 1u);
        let position = params.bias_offset + tile.batch * params.bias_stride_b + tile.head * params.bias_stride_h
            + at * params.bias_stride_q + min(key, params.seq_k - 1u) * params.bias_stride_k;
        let value = bias_value(position);
        // By its bits: a shader compiler may assume that no infinity is ever compared.
        let dropped = bitcast<u32>(value) == 0xff800000u;
        // The smallest floats are a common stand-in for -inf; the factor log2(e) must not push them past the range.
        return Biased(score + max(value, -2.3e38) * LOG2_E, !dropped);
    }
    return Biased(score, true);
}

fn write_lse(tile: Tile, row: u32, row_max: f32, row_sum: f32) {}
