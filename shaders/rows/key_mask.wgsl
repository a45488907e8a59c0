// A key mask of the batch row: `key_bits` says which keys are kept.

// Which of 32 keys the mask keeps, the first in the lowest bit. `first_key` is a multiple of 32.
fn mask_bits(tile: Tile, first_key: u32) -> u32 {
    return key_bits[(params.batch_base + tile.batch) * params.key_words + (first_key >> 5u)];
}
