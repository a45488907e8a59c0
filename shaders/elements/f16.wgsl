// Tensors of f16.

fn widen(word: vec4<u32>, part: u32) -> vec4<f32> {
    let pair = select(word.xy, word.zw, part == 1u);
    return vec4<f32>(unpack2x16float(pair.x), unpack2x16float(pair.y));
}

// Rounds to nearest, ties to even. Beyond the largest f16 is infinity; NaN stays NaN. Of
// `pack2x16float` WGSL specifies none of this.
fn narrow_one(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    // Normal results: rebias the exponent from 127 to 15 and round at bit 13.
    let normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13u) & 1u)) >> 13u;
    // Results under 2^-14 count steps of 2^-24.
    let shift = min(126u - (magnitude >> 23u), 31u);
    let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    let floor_steps = mantissa >> shift;
    let rest = mantissa - (floor_steps << shift);
    let half_step = (1u << shift) >> 1u;
    let up = rest > half_step || (rest == half_step && (floor_steps & 1u) == 1u);
    let subnormal = floor_steps + select(0u, 1u, up);
    let finite = select(normal, select(subnormal, 0u, magnitude < 0x33000000u), magnitude < 0x38800000u);
    let bounded = select(finite, 0x7c00u, magnitude >= 0x477ff000u);
    return sign | select(bounded, 0x7e00u, magnitude > 0x7f800000u);
}
