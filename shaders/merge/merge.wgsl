// Attention over all keys from attention over two parts of them, each part's output [B, S, H, D] and
// its log-sum-exp [B, H, S]:
//
//   m = max(lse1, lse2)    w1 = exp(lse1 - m)    w2 = exp(lse2 - m)
//   out = (w1 out1 + w2 out2) / (w1 + w2)        lse = m + ln(w1 + w2)
//
// Offsets and strides of outputs count words of 16 bytes, those of the log-sum-exps elements. An
// invocation takes a word.

const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
const NEGATIVE_INFINITY: u32 = 0xff800000u;
const NAN: u32 = 0x7fc00000u;

// How much the rows of both parts count, and the log-sum-exp of both. NaN and infinities are told by
// bits: not every device's maximum, exponential or logarithm of NaN is NaN.
struct Weights {
    first: f32,
    second: f32,
    // Parts without keys do not count, whatever they hold.
    has_first: bool,
    has_second: bool,
    is_nan: bool,
    lse: u32,
}

// A log-sum-exp of +inf is that of a row that is NaN.
fn is_nan_or_infinity(bits: u32) -> bool {
    return (bits & 0x7fffffffu) >= 0x7f800000u && bits != NEGATIVE_INFINITY;
}

fn weights_of(bits1: u32, bits2: u32) -> Weights {
    var weights: Weights;
    weights.has_first = bits1 != NEGATIVE_INFINITY;
    weights.has_second = bits2 != NEGATIVE_INFINITY;
    weights.is_nan = is_nan_or_infinity(bits1) || is_nan_or_infinity(bits2);
    if weights.is_nan {
        weights.lse = NAN;
    } else if weights.has_first && weights.has_second {
        let lse1 = bitcast<f32>(bits1);
        let lse2 = bitcast<f32>(bits2);
        let largest = max(lse1, lse2);
        let weight1 = exp2((lse1 - largest) * LOG2_E);
        let weight2 = exp2((lse2 - largest) * LOG2_E);
        let sum = weight1 + weight2;
        weights.first = weight1 / sum;
        weights.second = weight2 / sum;
        weights.lse = bitcast<u32>(largest + log2(sum) * LN_2);
    } else {
        weights.first = 1.0;
        weights.second = 1.0;
        weights.lse = select(bits2, bits1, weights.has_first);
    }
    return weights;
}

fn merged(weights: Weights, values1: vec4<f32>, values2: vec4<f32>) -> vec4<f32> {
    let first = select(vec4<f32>(0.0), weights.first * values1, weights.has_first);
    let second = select(vec4<f32>(0.0), weights.second * values2, weights.has_second);
    let bits = select(bitcast<vec4<u32>>(first + second), vec4<u32>(NAN), weights.is_nan);
    return bitcast<vec4<f32>>(bits);
}

@compute @workgroup_size(INVOCATIONS)
fn merge(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let words_per_row = params.heads * params.head_words;
    for (var i = id.x; i < params.rows * words_per_row; i += groups.x * INVOCATIONS) {
        let row = i / words_per_row;
        let batch = row / params.seq;
        let token = row % params.seq;
        let head = (i % words_per_row) / params.head_words;
        let word = i % params.head_words;
        let weights = weights_of(
            lse1[params.lse1_offset + batch * params.lse1_stride_b + head * params.lse1_stride_h + token * params.lse1_stride_s],
            lse2[params.lse2_offset + batch * params.lse2_stride_b + head * params.lse2_stride_h + token * params.lse2_stride_s],
        );
        let at1 = params.out1_offset + batch * params.out1_stride_b + token * params.out1_stride_s + head * params.out1_stride_h;
        let at2 = params.out2_offset + batch * params.out2_stride_b + token * params.out2_stride_s + head * params.out2_stride_h;
        let word1 = out1[at1 + word];
        let word2 = out2[at2 + word];
        let low = merged(weights, widen(word1, 0u), widen(word2, 0u));
        let high = merged(weights, widen(word1, 1u), widen(word2, 1u));
        let at = params.out_offset + batch * params.out_stride_b + token * params.out_stride_s + head * params.out_stride_h;
        out[at + word] = narrow(low, high);
        if params.has_lse == 1u && word == 0u {
            lse[params.lse_offset + batch * params.lse_stride_b + head * params.lse_stride_h + token * params.lse_stride_s] = weights.lse;
        }
    }
}
