// RMSNorm and rotary embedding of the heads of q or k, [B, S, H, D]:
//
//   y = x * weight / sqrt(mean(x^2) + eps)
//   (y[a], y[b]) -> (y[a] cos - y[b] sin, y[b] cos + y[a] sin)    for each pair (a, b) of the first
//                                                                 2 * params.half elements
//
// `params.lanes` invocations share a head, so many that none takes more than ELEMENTS_OF_LANE of its
// elements, and a workgroup takes INVOCATIONS / lanes heads at once. Heads are read before they are
// written, so both may be the same. Rows of dropped tokens are left alone. elements_32bit.wgsl and its
// like say how elements lie in u32s.
//
// This is for tensors that start or end anywhere; octets.wgsl does the same, to the bit, with whole words
// of 16 bytes.

alias Word = u32;
// What is stored at once.
alias Part = vec2<f32>;

// The heads that the workgroup has read, one after another.
var<workgroup> heads: array<f32, ELEMENTS>;
var<workgroup> squares: array<f32, INVOCATIONS>;

const ELEMENTS_OF_LANE: u32 = 8u;
const ELEMENTS: u32 = ELEMENTS_OF_LANE * INVOCATIONS;

// An element of a head in workgroup memory, normalised.
fn normalised(first: u32, element: u32, factor: f32) -> f32 {
    let x = heads[first + element];
    if params.has_norm == 0u {
        return x;
    }
    return x * factor * number_of(weight[(params.weight_offset + element) >> params.weight_shift],
        params.weight_offset + element, params.weight_shift);
}

fn prepared(head: Head, first: u32, element: u32, factor: f32) -> f32 {
    let x = normalised(first, element, factor);
    if element >= 2u * params.half {
        return x;
    }
    var pair: u32;
    var other: u32;
    var is_second: bool;
    if params.is_interleaved == 1u {
        pair = element >> 1u;
        other = element ^ 1u;
        is_second = (element & 1u) == 1u;
    } else {
        is_second = element >= params.half;
        pair = select(element, element - params.half, is_second);
        other = select(element + params.half, pair, is_second);
    }
    let cos_at = head.cos + pair;
    let sin_at = head.sin + pair;
    let c = number_of(cos_table[cos_at >> params.table_shift], cos_at, params.table_shift);
    let s = number_of(sin_table[sin_at >> params.table_shift], sin_at, params.table_shift);
    return fma(x, c, select(-s, s, is_second) * normalised(first, other, factor));
}

// An element of a tensor of f32, of which a u32 holds 1 << shift, or of the call's element type.
fn number_of(bits: u32, position: u32, shift: u32) -> f32 {
    if shift == 0u {
        return bitcast<f32>(bits);
    }
    return widened_pair(bits)[position & 1u];
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
    let first = place * params.lanes * ELEMENTS_OF_LANE;
    for (var start = group.x * heads_at_once; start < params.rows * params.heads; start += groups.x * heads_at_once) {
        let head = head_at(start + place);
        var sum = 0.0;
        let end = min(params.head_dim, (lane + 1u) * ELEMENTS_OF_LANE);
        if head.exists {
            for (var element = lane * ELEMENTS_OF_LANE; element < end; element += 2u) {
                let pair = load_pair(head.read_at + element, min(params.head_dim - element, 2u));
                heads[first + element] = pair.x;
                heads[first + element + 1u] = pair.y;
                sum = fma(pair.y, pair.y, fma(pair.x, pair.x, sum));
            }
        }
        squares[local] = sum;
        workgroupBarrier();
        if head.exists {
            var total = 0.0;
            for (var other = 0u; other < params.lanes; other += 1u) {
                total += squares[place * params.lanes + other];
            }
            let factor = 1.0 / sqrt(total / f32(params.head_dim) + params.eps);
            for (var element = lane * ELEMENTS_OF_LANE; element < end; element += 2u) {
                let count = min(params.head_dim - element, 2u);
                // Past the end of an odd head there is no element to compute.
                let second = element + count - 1u;
                let both = vec2<f32>(prepared(head, first, element, factor), prepared(head, first, second, factor));
                let pair = with_one_nan(both.xyxy).xy;
                store_pair(head.write_at + element, pair, count);
                store_joint(head.joint_at + element, pair);
            }
        }
        workgroupBarrier();
    }
}
