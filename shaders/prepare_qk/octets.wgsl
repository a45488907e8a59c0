// prepare_qk.wgsl where all tensors are read and written in whole words of 16 bytes: an invocation takes
// an octet, eight neighbours of a head. Where pairs are neighbours it has both of each; else the others
// are the octet of another invocation.
//
//   head    [ octet of lane 0 | octet of lane 1 | ... ]       OCTET_WORDS words each
//
// Results have the bits of prepare_qk.wgsl: sums are in the same order, and drivers are left no choice of
// which product is fused with a sum.
//
// It takes HEADS_OF_LANE heads at once, so that two words are on their way to it, as a copy would have.

const OCTET: u32 = 8u;
const OCTET_WORDS: u32 = 2u / VECS_PER_WORD;
const HEADS_OF_LANE: u32 = VECS_PER_WORD;
const PLACES: u32 = HEADS_OF_LANE * INVOCATIONS;

alias Word = vec4<u32>;
alias Raw = array<Word, OCTET_WORDS>;
// What is stored at once.
alias Part = Raw;

struct Octet {
    low: vec4<f32>,
    high: vec4<f32>,
}

// Sums of squares of octets.
var<workgroup> squares: array<f32, PLACES>;
// What the workgroup has read, for lanes that need octets of others.
var<workgroup> octets: array<Raw, PLACES>;

fn octet_of(raw: Raw) -> Octet {
    return Octet(widen(raw[0], 0u), widen(raw[OCTET_WORDS - 1u], VECS_PER_WORD - 1u));
}

// The place of a word of a tensor, from that of an element.
fn word_of(element: u32) -> u32 {
    return element / (OCTET / OCTET_WORDS);
}

fn load_raw(element: u32) -> Raw {
    var raw: Raw;
    for (var i = 0u; i < OCTET_WORDS; i++) { // unroll
        raw[i] = source_word(word_of(element) + i);
    }
    return raw;
}

// `narrow` makes a word of f32 of its first argument alone.
fn raw_of(octet: Octet) -> Raw {
    var raw: Raw;
    raw[0] = narrow(octet.low, octet.high);
    if OCTET_WORDS == 2u {
        raw[OCTET_WORDS - 1u] = narrow(octet.high, octet.high);
    }
    return raw;
}

fn store_octet(element: u32, raw: Raw) {
    for (var i = 0u; i < OCTET_WORDS; i++) { // unroll
        dst[word_of(element) + i] = raw[i];
    }
}

// Eight numbers of a tensor of f32, of which a u32 holds 1 << shift, or of the call's element type. Their
// words lie at `words_at(first number, shift)`.
fn words_at(number: u32, shift: u32) -> vec2<u32> {
    let first = number >> (2u + shift);
    return vec2<u32>(first, first + 1u - shift);
}

fn eight_of(first: Word, second: Word, shift: u32) -> Octet {
    if shift == 0u {
        return Octet(bitcast<vec4<f32>>(first), bitcast<vec4<f32>>(second));
    }
    return Octet(widen(first, 0u), widen(first, VECS_PER_WORD - 1u));
}

// Four of them.
fn four_of(word: Word, number: u32, shift: u32) -> vec4<f32> {
    if shift == 0u {
        return bitcast<vec4<f32>>(word);
    }
    return widen(word, (number >> 2u) & 1u);
}

fn sum_of_squares(sum: f32, x: vec4<f32>) -> f32 {
    return fma(x.w, x.w, fma(x.z, x.z, fma(x.y, x.y, fma(x.x, x.x, sum))));
}

fn times(octet: Octet, factor: f32, weights: Octet) -> Octet {
    return Octet(octet.low * factor * weights.low, octet.high * factor * weights.high);
}

fn weights_of(element: u32) -> Octet {
    let at = words_at(params.weight_offset + element, params.weight_shift);
    return eight_of(weight[at.x], weight[at.y], params.weight_shift);
}

// Pairs of neighbours, with the cosines and sines of two pairs.
fn turned(x: vec4<f32>, c: vec2<f32>, s: vec2<f32>) -> vec4<f32> {
    return fma(x, c.xxyy, vec4<f32>(-s.x, s.x, -s.y, s.y) * x.yxwz);
}

@compute @workgroup_size(INVOCATIONS)
fn prepare_qk(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let lane = local % params.lanes;
    let place = local / params.lanes;
    let heads_at_once = INVOCATIONS / params.lanes;
    let element = lane * OCTET;
    let is_turned = element < 2u * params.half;
    // The other octet of pairs that are not neighbours.
    let is_second = element >= params.half;
    let other = select(element + params.half, element - params.half, is_second);
    let count = params.rows * params.heads;
    let step = heads_at_once * HEADS_OF_LANE;
    for (var start = group.x * step; start < count; start += groups.x * step) {
        var heads: array<Head, HEADS_OF_LANE>;
        var raws: array<Raw, HEADS_OF_LANE>;
        for (var h = 0u; h < HEADS_OF_LANE; h++) { // unroll
            heads[h] = head_at(start + h * heads_at_once + place);
            if heads[h].exists && element < params.head_dim {
                raws[h] = load_raw(heads[h].read_at + element);
            }
        }
        for (var h = 0u; h < HEADS_OF_LANE; h++) { // unroll
            let x = octet_of(raws[h]);
            let at = h * INVOCATIONS + local;
            squares[at] = sum_of_squares(sum_of_squares(0.0, x.low), x.high);
            if params.is_interleaved == 0u {
                octets[at] = raws[h];
            }
        }
        workgroupBarrier();
        for (var h = 0u; h < HEADS_OF_LANE; h++) { // unroll
            let head = heads[h];
            if head.exists && element < params.head_dim {
                let first = h * INVOCATIONS + place * params.lanes;
                var y = octet_of(raws[h]);
                var factor = 1.0;
                if params.has_norm == 1u {
                    var total = 0.0;
                    for (var i = 0u; i < params.lanes; i++) {
                        total += squares[first + i];
                    }
                    factor = 1.0 / sqrt(total / f32(params.head_dim) + params.eps);
                    y = times(y, factor, weights_of(element));
                }
                if is_turned && params.is_interleaved == 1u {
                    let cos_at = head.cos + element / 2u;
                    let sin_at = head.sin + element / 2u;
                    let c = four_of(cos_table[words_at(cos_at, params.table_shift).x], cos_at, params.table_shift);
                    let s = four_of(sin_table[words_at(sin_at, params.table_shift).x], sin_at, params.table_shift);
                    y = Octet(turned(y.low, c.xy, s.xy), turned(y.high, c.zw, s.zw));
                } else if is_turned {
                    var z = octet_of(octets[first + other / OCTET]);
                    if params.has_norm == 1u {
                        z = times(z, factor, weights_of(other));
                    }
                    let pair = min(element, other);
                    let cos_at = words_at(head.cos + pair, params.table_shift);
                    let sin_at = words_at(head.sin + pair, params.table_shift);
                    let c = eight_of(cos_table[cos_at.x], cos_table[cos_at.y], params.table_shift);
                    let s = eight_of(sin_table[sin_at.x], sin_table[sin_at.y], params.table_shift);
                    let sign = select(-1.0, 1.0, is_second);
                    y = Octet(fma(y.low, c.low, sign * s.low * z.low), fma(y.high, c.high, sign * s.high * z.high));
                }
                y = Octet(with_one_nan(y.low), with_one_nan(y.high));
                let raw = raw_of(y);
                store_octet(head.write_at + element, raw);
                store_joint(head.joint_at + element, raw);
            }
        }
        workgroupBarrier();
    }
}
