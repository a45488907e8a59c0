// Tensors of f32. A word is the 16 bytes that one load moves: one vec4 of elements.

const VECS_PER_WORD: u32 = 1u;

fn widen(word: vec4<u32>, part: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(word);
}

fn narrow(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
    return bitcast<vec4<u32>>(low);
}
