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
