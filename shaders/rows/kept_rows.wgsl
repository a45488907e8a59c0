// Query rows of padded tensors that a mask keeps are computed, others are written as zeros.

fn row_is_kept(tile: Tile, row: u32) -> bool {
    let at = tile.first_row + row;
    let word = row_bits[(params.batch_base + tile.batch) * params.row_words + (at >> 5u)];
    return ((word >> (at & 31u)) & 1u) == 1u;
}
