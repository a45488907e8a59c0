// No bias: bias.wgsl where nothing is added and every key is kept.

fn biased(tile: Tile, row: u32, key: u32, score: f32) -> Biased {
    return Biased(score, true);
}

// The sum of a row's weights, NaN if the scores of all its kept keys are below every f32. The
// largest score would have a weight otherwise.
fn spread_overflow(has_keys: bool, row_max: f32, row_sum: f32) -> f32 {
    return select(row_sum, nan_of(row_sum), has_keys && row_sum == 0.0);
}
