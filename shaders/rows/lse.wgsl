// The log-sum-exp of every row.

// The natural logarithm of the sum of exp(score); -inf where there is no key or the row is masked.
fn write_lse(tile: Tile, row: u32, row_max: f32, row_sum: f32) {
    // By bits: not every device's logarithm or exponential of NaN is NaN. A largest score of infinity
    // makes NaN of its row.
    let is_nan = ((bitcast<u32>(row_sum) & 0x7fffffffu) > 0x7f800000u) | (bitcast<u32>(row_max) == 0x7f800000u);
    let value = select(bitcast<u32>((row_max + log2(row_sum)) * LN_2), 0x7fc00000u, is_nan);
    let position = params.lse_offset + tile.batch * params.lse_stride_b + tile.head * params.lse_stride_h
        + lse_row(tile, row) * params.lse_stride_s;
    lse[position] = select(value, 0xff800000u, (row_sum == 0.0) | !row_is_kept(tile, row));
}
