// Tensors of bf16 as operands of cooperative matrices, which take f16. bf16 has f32's range, so
// elements are multiplied by a power of two that brings the largest of them into f16's range. Only
// elements 2^29 times smaller than that lose bits.

// Whether an element can lie outside f16's range.
const HAS_RANGE: bool = true;
const ATTEMPTS: u32 = 2u;

fn halves(word: vec4<u32>, part: u32, factor: f32) -> vec4<f16> {
    return vec4<f16>(widen(word, part) * factor);
}

fn largest_of(word: vec4<u32>) -> f32 {
    let both = max(abs(widen(word, 0u)), abs(widen(word, 1u)));
    let pair = max(both.xy, both.zw);
    let largest = max(pair.x, pair.y);
    // No factor brings an infinity into range.
    return select(0.0, largest, largest <= 3.3895314e38);
}

// Not 0 where a pair has an infinity or NaN: one more than the largest exponent reaches the sign's bit.
fn exponent_overflows(word: vec4<u32>) -> vec4<u32> {
    return ((word & vec4<u32>(0x7f807f80u)) + vec4<u32>(0x00800080u)) & vec4<u32>(0x80008000u);
}

// A word of output.
fn rounded(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
    return narrow(low, high);
}
