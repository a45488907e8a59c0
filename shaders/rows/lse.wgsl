// The log-sum-exp of every row.

// The natural logarithm of the sum of exp(score); -inf where there is no key.
fn write_lse(tile: Tile, row: u32, row_max: f32, row_sum: f32) {
    let value = bitcast<u32>((row_max + log2(row_sum)) * LN_2);
    let position = params.lse_offset + tile.head * params.lse_stride_h + (tile.first_row + row) * params.lse_stride_s;
    lse[position] = select(value, 0xff800000u, row_sum == 0.0);
}
