// RMSNorm and rotary embedding of the heads of q or k, [B, S, H, D]:
//
//   y = x * weight / sqrt(mean(x^2) + eps)
//   (y[a], y[b]) -> (y[a] cos - y[b] sin, y[b] cos + y[a] sin)    for each pair (a, b) of the first
//                                                                 2 * params.half elements
//
// `params.lanes` invocations share a head, so many that none takes more than ELEMENTS_OF_LANE of its
// elements, and a workgroup takes INVOCATIONS / lanes heads at once. Heads are read before they are
// written, so both may be the same. Rows of dropped tokens are left alone. Offsets and strides count
// elements; elements_32bit.wgsl and its like say how those lie in u32s.

// The heads that the workgroup has read, one after another.
var<workgroup> heads: array<f32, ELEMENTS>;
var<workgroup> squares: array<f32, INVOCATIONS>;

const ELEMENTS_OF_LANE: u32 = 8u;
const ELEMENTS: u32 = ELEMENTS_OF_LANE * INVOCATIONS;

struct Head {
    exists: bool,
    read_at: u32,
    write_at: u32,
    joint_at: u32,
    // Of the token's row of the tables.
    cos: u32,
    sin: u32,
}

fn is_kept(batch: u32, token: u32) -> bool {
    if params.has_mask == 0u {
        return true;
    }
    let at = params.first_token + token;
    let word = kept_bits[(params.batch_base + batch) * params.mask_words + (at >> 5u)];
    return ((word >> (at & 31u)) & 1u) == 1u;
}

fn head_at(at: u32) -> Head {
    let row = at / params.heads;
    let head = at % params.heads;
    let batch = row / params.seq;
    let token = row % params.seq;
    var found: Head;
    found.exists = at < params.rows * params.heads && is_kept(batch, token);
    found.read_at = params.src_offset + batch * params.src_stride_b + token * params.src_stride_s + head * params.src_stride_h;
    found.write_at = params.dst_offset + batch * params.dst_stride_b + token * params.dst_stride_s + head * params.dst_stride_h;
    found.joint_at = params.joint_offset + batch * params.joint_stride_b + token * params.joint_stride_s + head * params.joint_stride_h;
    found.cos = params.cos_offset + batch * params.cos_stride_b + token * params.cos_stride_s;
    found.sin = params.sin_offset + batch * params.sin_stride_b + token * params.sin_stride_s;
    return found;
}

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
    return x * c + select(-s, s, is_second) * normalised(first, other, factor);
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
        if head.exists {
            for (var element = 2u * lane; element < params.head_dim; element += 2u * params.lanes) {
                let pair = load_pair(head.read_at + element, min(params.head_dim - element, 2u));
                heads[first + element] = pair.x;
                heads[first + element + 1u] = pair.y;
                sum += pair.x * pair.x + pair.y * pair.y;
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
            for (var element = 2u * lane; element < params.head_dim; element += 2u * params.lanes) {
                let count = min(params.head_dim - element, 2u);
                // Past the end of an odd head there is no element to compute.
                let second = element + count - 1u;
                let pair = vec2<f32>(prepared(head, first, element, factor), prepared(head, first, second, factor));
                store_pair(head.write_at + element, pair, count);
                store_joint(head.joint_at + element, pair);
            }
        }
        workgroupBarrier();
    }
}
