// 16-bit elements, kept as pairs in u32s: f16 would be an optional feature, and WGSL has no bf16. A
// word is the 16 bytes that one load moves: two vec4s of elements.

const VECS_PER_WORD: u32 = 2u;

fn narrow_pair(pair: vec2<f32>) -> u32 {
    return narrow_one(pair.x) | (narrow_one(pair.y) << 16u);
}

fn narrow(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
    return vec4<u32>(narrow_pair(low.xy), narrow_pair(low.zw), narrow_pair(high.xy), narrow_pair(high.zw));
}
