// An additive bias. A bias of -inf drops the key.

// The score, in log2 units, with the bias added.
fn biased(tile: Tile, row: u32, key: u32, score: f32) -> Biased {
    // Positions in the padded tensors. Rows and keys past the end repeat the last one.
    let query_at = lse_row(tile, min(row, tile.rows - 1u));
    let key_at = key_row(tile, min(key, tile.keys.end - 1u));
    let position = params.bias_offset + tile.batch * params.bias_stride_b + tile.head * params.bias_stride_h
        + query_at * params.bias_stride_q + key_at * params.bias_stride_k;
    let value = bias_value(position);
    // By its bits: a shader compiler may assume that no infinity is ever compared.
    let dropped = bitcast<u32>(value) == 0xff800000u;
    // The smallest floats are a common stand-in for -inf. The factor log2(e) must not push them out
    // of f32's range.
    return Biased(saturated(score + max(value, -2.3e38) * LOG2_E), !dropped);
}

// The sum of a row's weights, NaN if the scores of all its kept keys are below every f32. Where the
// bias drops every key it stays 0.
fn spread_overflow(has_keys: bool, row_max: f32, row_sum: f32) -> f32 {
    return select(row_sum, nan_of(row_sum), row_max == OVERFLOWED);
}
