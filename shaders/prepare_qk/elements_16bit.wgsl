// Heads of 16-bit elements, all of which start at a u32 and have an even number of elements.

fn widened_pair(bits: u32) -> vec2<f32> {
    return widen(vec4<u32>(bits, 0u, 0u, 0u), 0u).xy;
}

fn load_pair(element: u32, count: u32) -> vec2<f32> {
    return widened_pair(source_word(element >> 1u));
}

fn store_pair(element: u32, pair: vec2<f32>, count: u32) {
    dst[element >> 1u] = narrow_pair(pair);
}
