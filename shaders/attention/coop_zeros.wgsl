// The output of a tile without keys, beside coop.wgsl.

fn write_zeros(tile: Tile, invocation: u32) {
    for (var i = invocation; i < tile.rows * HEAD_WORDS; i += INVOCATIONS) {
        store_out(out_row(tile, i / HEAD_WORDS), i % HEAD_WORDS, vec4<u32>(0u));
    }
    for (var row = invocation; row < tile.rows; row += INVOCATIONS) {
        write_lse(tile, row, LOWEST, 0.0); // without modifiers
        let sunk = with_sink(tile, LOWEST, 0.0); // with modifiers
        write_lse(tile, row, sunk.row_max, sunk.row_sum); // with modifiers
    }
}
