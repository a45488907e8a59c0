// Tensors of bf16 as operands of cooperative matrices, which take f16. bf16 has f32's range, so elements are multiplied by a
// power of two that brings the largest of them inside of f16's; no bit is lost but of those 2^29 times smaller.

// Whether an element can lie outside of what f16 holds.
const HAS_RANGE: bool = true;
const ATTEMPTS: u32 = 2u;

fn halves(word: vec4<u32>, part: u32, factor: f32) -> vec4<f16> {
    return vec4<f16>(widen(word, part) * factor);
}

fn largest_of(word: vec4<u32>) -> f32 {
    let both = max(abs(widen(word, 0u)), abs(widen(word, 1u)));
    let pair = max(both.xy, both.zw);
    let largest = max(pair.x, pair.y);
    // An infinity stays one whatever it is multiplied by.
    return select(0.0, largest, largest <= 3.3895314e38);
}

// A word of output.
fn rounded(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
    return narrow(low, high);
}
