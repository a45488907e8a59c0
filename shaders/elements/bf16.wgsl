// Tensors of bf16.

fn widen(word: vec4<u32>, part: u32) -> vec4<f32> {
    let pair = select(word.xy, word.zw, part == 1u);
    let even = pair << vec2<u32>(16u);
    let odd = pair & vec2<u32>(0xffff0000u);
    return bitcast<vec4<f32>>(vec4<u32>(even.x, odd.x, even.y, odd.y));
}

// Rounds to nearest, ties to even. NaN is one NaN.
fn narrow_one(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return select(rounded, 0x7fc0u, (bits & 0x7fffffffu) > 0x7f800000u);
}
