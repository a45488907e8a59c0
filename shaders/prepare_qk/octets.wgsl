// prepare_qk.wgsl where all tensors are read and written in whole words of 16 bytes: an invocation takes
// an octet, eight neighbours of a head. Where pairs are neighbours it has both of each; else the others
// are the octet of another invocation.
//
//   head    [ octet of lane 0 | octet of lane 1 | ... ]       OCTET_WORDS words each
//
// Results have the bits of prepare_qk.wgsl: sums are in the same order, and drivers are left no choice of
// which product is fused with a sum.
//
// The invocations of a token take its heads in turn, params.heads_beside at a time: where the token lies, its
// cosines and sines and the weights are looked up once for all of them.

const OCTET: u32 = 8u;
const OCTET_WORDS: u32 = 2u / VECS_PER_WORD;

alias Word = vec4<u32>;
alias Raw = array<Word, OCTET_WORDS>;
// What is stored at once.
alias Part = Raw;

struct Octet {
    low: vec4<f32>,
    high: vec4<f32>,
}

// Sums of squares of octets.
var<workgroup> squares: array<f32, INVOCATIONS>;
// What the workgroup has read, for lanes that need octets of others.
var<workgroup> octets: array<Raw, INVOCATIONS>;

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
    let first_lane = place * params.lanes;
    let own_head = place % params.heads_beside;
    let tokens = INVOCATIONS / params.lanes / params.heads_beside;
    let element = lane * OCTET;
    let is_inside = element < params.head_dim;
    let is_turned = element < 2u * params.half;
    // The other octet of pairs that are not neighbours.
    let is_second = element >= params.half;
    let other = select(element + params.half, element - params.half, is_second);
    let pair = min(element, other);
    let sign = select(-1.0, 1.0, is_second);
    var weights: Octet;
    var other_weights: Octet;
    if params.has_norm == 1u && is_inside {
        weights = weights_of(element);
        if params.is_interleaved == 0u && is_turned {
            other_weights = weights_of(other);
        }
    }
    for (var start = group.x * tokens; start < params.rows; start += groups.x * tokens) {
        let row = row_at(start + place / params.heads_beside);
        let is_prepared = is_inside && row.exists;
        // Of four pairs of neighbours, or of eight others.
        var c: Octet;
        var s: Octet;
        if is_prepared && is_turned && params.is_interleaved == 1u {
            let cos_at = row.cos + element / 2u;
            let sin_at = row.sin + element / 2u;
            c.low = four_of(cos_table[words_at(cos_at, params.table_shift).x], cos_at, params.table_shift);
            s.low = four_of(sin_table[words_at(sin_at, params.table_shift).x], sin_at, params.table_shift);
        } else if is_prepared && is_turned {
            let cos_at = words_at(row.cos + pair, params.table_shift);
            let sin_at = words_at(row.sin + pair, params.table_shift);
            c = eight_of(cos_table[cos_at.x], cos_table[cos_at.y], params.table_shift);
            s = eight_of(sin_table[sin_at.x], sin_table[sin_at.y], params.table_shift);
        }
        for (var first = 0u; first < params.heads; first += params.heads_beside) {
            let head = first + own_head;
            let exists = is_prepared && head < params.heads;
            var raw: Raw;
            if exists {
                raw = load_raw(row.read_at + head * params.src_stride_h + element);
            }
            var y = octet_of(raw);
            squares[local] = sum_of_squares(sum_of_squares(0.0, y.low), y.high);
            if params.is_interleaved == 0u {
                octets[local] = raw;
            }
            workgroupBarrier();
            if exists {
                var factor = 1.0;
                if params.has_norm == 1u {
                    var total = 0.0;
                    for (var i = 0u; i < params.lanes; i++) {
                        total += squares[first_lane + i];
                    }
                    factor = 1.0 / sqrt(total / f32(params.head_dim) + params.eps);
                    y = times(y, factor, weights);
                }
                if is_turned && params.is_interleaved == 1u {
                    y = Octet(turned(y.low, c.low.xy, s.low.xy), turned(y.high, c.low.zw, s.low.zw));
                } else if is_turned {
                    var z = octet_of(octets[first_lane + other / OCTET]);
                    if params.has_norm == 1u {
                        z = times(z, factor, other_weights);
                    }
                    y = Octet(fma(y.low, c.low, sign * s.low * z.low), fma(y.high, c.high, sign * s.high * z.high));
                }
                y = Octet(with_one_nan(y.low), with_one_nan(y.high));
                let prepared = raw_of(y);
                store_octet(row.write_at + head * params.dst_stride_h + element, prepared);
                store_joint(row.joint_at + head * params.joint_stride_h + element, prepared);
            }
            workgroupBarrier();
        }
    }
}
