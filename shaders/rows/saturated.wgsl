// No bias, but ranges of keys: no_bias.wgsl where a row may see no key of the steps that its tile
// takes, so that a sum of weights of 0 does not tell overflow from nothing seen. coop.wgsl has
// no_bias.wgsl here too, and looks for a key that the row sees.

fn biased(tile: Tile, row: u32, key: u32, score: f32) -> Biased {
    return Biased(saturated(score), true);
}

// The sum of a row's weights, NaN if the scores of all keys that it sees are below every f32.
fn spread_overflow(has_keys: bool, row_max: f32, row_sum: f32) -> f32 {
    return select(row_sum, nan_of(row_sum), row_max == OVERFLOWED);
}
