// Tiles of all queries, batch row after batch row.

fn tile_of(i: u32) -> vec2<u32> {
    let tiles_of_row = (params.seq_q + params.tile_rows - 1u) / params.tile_rows;
    let first = i % tiles_of_row * params.tile_rows;
    return vec2<u32>(i / tiles_of_row * params.seq_q + first, min(params.tile_rows, params.seq_q - first));
}
