// Tensors of bf16, kept as u32 pairs: WGSL has no such type. A word is the 16 bytes that one load moves: two vec4s of elements.

const VECS_PER_WORD: u32 = 2u;

fn widen(word: vec4<u32>, part: u32) -> vec4<f32> {
    let pair = select(word.xy, word.zw, part == 1u);
    let even = pair << vec2<u32>(16u);
    let odd = pair & vec2<u32>(0xffff0000u);
    return bitcast<vec4<f32>>(vec4<u32>(even.x, odd.x, even.y, odd.y));
}

// To nearest, ties to even; NaN stays NaN.
fn narrow_one(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return select(rounded, 0x7fc0u, (bits & 0x7fffffffu) > 0x7f800000u);
}

fn narrow_pair(pair: vec2<f32>) -> u32 {
    return narrow_one(pair.x) | (narrow_one(pair.y) << 16u);
}

fn narrow(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
    return vec4<u32>(narrow_pair(low.xy), narrow_pair(low.zw), narrow_pair(high.xy), narrow_pair(high.zw));
}
