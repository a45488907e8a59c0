// Heads of 16-bit elements that start or end inside a u32, whose other half may belong to another
// head, or to nobody here.

fn widened_pair(bits: u32) -> vec2<f32> {
    return widen(vec4<u32>(bits, 0u, 0u, 0u), 0u).xy;
}

fn load_one(element: u32) -> f32 {
    return widened_pair(source_word(element >> 1u))[element & 1u];
}

fn load_pair(element: u32, count: u32) -> vec2<f32> {
    let first = load_one(element);
    if count == 1u {
        return vec2<f32>(first, 0.0);
    }
    return vec2<f32>(first, load_one(element + 1u));
}

fn store_one(element: u32, value: f32) {
    let shift = (element & 1u) * 16u;
    atomicAnd(&dst[element >> 1u], ~(0xffffu << shift));
    atomicOr(&dst[element >> 1u], narrow_one(value) << shift);
}

fn store_pair(element: u32, pair: vec2<f32>, count: u32) {
    store_one(element, pair.x);
    if count == 2u {
        store_one(element + 1u, pair.y);
    }
}
