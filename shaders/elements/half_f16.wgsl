// Tensors of f16 as operands of cooperative matrices, which take them unchanged.

// Whether an element can lie outside f16's range.
const HAS_RANGE: bool = false;
const ATTEMPTS: u32 = 1u;

fn halves(word: vec4<u32>, part: u32, factor: f32) -> vec4<f16> {
    return vec4<f16>(widen(word, part));
}

fn largest_of(word: vec4<u32>) -> f32 {
    return 0.0;
}

// Not 0 where a pair has an infinity or NaN: one more than the largest exponent reaches the sign's bit.
fn exponent_overflows(word: vec4<u32>) -> vec4<u32> {
    return ((word & vec4<u32>(0x7c007c00u)) + vec4<u32>(0x04000400u)) & vec4<u32>(0x80008000u);
}

// A word of output. The conversions round as the device does, which takes one instruction per
// element where `narrow` takes a dozen. Packing their results is exact.
fn rounded(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
    let a = vec4<f32>(vec4<f16>(low));
    let b = vec4<f32>(vec4<f16>(high));
    return vec4<u32>(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
}
