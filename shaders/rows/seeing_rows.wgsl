// Query rows of padded tensors that a mask keeps are computed, others are written as zeros. The
// ranges of the others end before they start: beside the log-sum-exp there is no binding left for
// the mask.

fn row_is_kept(tile: Tile, row: u32) -> bool {
    let seen = seen_by(tile, row);
    return seen.first <= seen.end;
}
