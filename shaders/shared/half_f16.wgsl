// Tensors of f16 as operands of cooperative matrices: they are read as what they are.

// Whether an element can lie outside of what f16 holds.
const HAS_RANGE: bool = false;
const ATTEMPTS: u32 = 1u;

struct Word {
    low: vec4<f16>,
    high: vec4<f16>,
}

fn zero_word() -> Word {
    return Word(vec4<f16>(), vec4<f16>());
}

fn halves(word: Word, part: u32, factor: f32) -> vec4<f16> {
    if part == 0u {
        return word.low;
    }
    return word.high;
}

fn largest_of(word: Word) -> f32 {
    return 0.0;
}
