// The queries of a fused tile, by the list of their batch row.

fn query_row(tile: Tile, row: u32) -> u32 {
    let list = params.query_tokens_offset + tile.batch * (params.seq_q + 1u);
    return query_tokens[list + 1u + tile.first_row + row];
}
