// No bias: bias.wgsl where nothing is added and every key is kept.

fn biased(tile: Tile, row: u32, key: u32, score: f32) -> Biased {
    return Biased(score, true);
}
