// An output in one tensor.

// Where a row of the tile begins.
fn out_row(tile: Tile, row: u32) -> u32 {
    return tile.out + query_row(tile, row) * params.out_stride_s;
}

fn store_out(row_at: u32, word: u32, value: vec4<u32>) {
    out[row_at + word] = value;
}
