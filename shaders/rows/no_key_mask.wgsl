// No key mask: key_mask.wgsl where every key is kept.

fn mask_bits(tile: Tile, first_key: u32) -> u32 {
    return 0xffffffffu;
}
