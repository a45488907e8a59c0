// Tensors of f16.

fn widen(word: vec4<u32>, part: u32) -> vec4<f32> {
    let pair = select(word.xy, word.zw, part == 1u);
    return vec4<f32>(unpack2x16float(pair.x), unpack2x16float(pair.y));
}

// Rounds to nearest, ties to even. Beyond the largest f16 is infinity; NaN is one NaN. Of
// `pack2x16float` WGSL specifies none of this.
fn narrow_one(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let magnitude = bits & 0x7fffffffu;
    // Normal results: rebias the exponent from 127 to 15 and round at bit 13.
    let normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13u) & 1u)) >> 13u;
    // Results under 2^-14 count steps of 2^-24. So do numbers from 0.5 to 1: the sum rounds.
    let subnormal = bitcast<u32>(abs(value) + 0.5) - 0x3f000000u;
    let finite = min(select(normal, subnormal, magnitude < 0x38800000u), 0x7c00u);
    return select(((bits >> 16u) & 0x8000u) | finite, 0x7e00u, magnitude > 0x7f800000u);
}
