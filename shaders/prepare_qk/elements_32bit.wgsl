// Heads of f32: an element fills a u32.

fn widened_pair(bits: u32) -> vec2<f32> {
    return vec2<f32>(bitcast<f32>(bits), 0.0);
}

fn load_pair(element: u32, count: u32) -> vec2<f32> {
    let first = bitcast<f32>(source_word(element));
    if count == 1u {
        return vec2<f32>(first, 0.0);
    }
    return vec2<f32>(first, bitcast<f32>(source_word(element + 1u)));
}

fn store_pair(element: u32, pair: vec2<f32>, count: u32) {
    dst[element] = bitcast<u32>(pair.x);
    if count == 2u {
        dst[element + 1u] = bitcast<u32>(pair.y);
    }
}
