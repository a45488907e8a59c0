// The queries of a fused tile, in the order of their lists, behind the ranges: beside the
// log-sum-exp there is no binding left for the lists.

fn query_row(tile: Tile, row: u32) -> u32 {
    return ranges[params.query_tokens_offset + tile.ranges_at + row].x;
}
