// Tensors of f16 as operands of cooperative matrices: they are taken as what they are.

// Whether an element can lie outside of what f16 holds.
const HAS_RANGE: bool = false;
const ATTEMPTS: u32 = 1u;

fn halves(word: vec4<u32>, part: u32, factor: f32) -> vec4<f16> {
    return vec4<f16>(widen(word, part));
}

fn largest_of(word: vec4<u32>) -> f32 {
    return 0.0;
}

// A word of output. The conversions round as the device does, not as `narrow` in a dozen instructions an element, and the packing
// of what they give is exact.
fn rounded(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
    let a = vec4<f32>(vec4<f16>(low));
    let b = vec4<f32>(vec4<f16>(high));
    return vec4<u32>(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
}
