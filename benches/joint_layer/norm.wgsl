// RMS norm of rows of PAIRS pairs, one workgroup each.
@group(0) @binding(1) var<storage, read> weight: array<vec2<f32>>;

var<workgroup> sums: array<f32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x + group.y * 65535u;
    if row >= ROWS {
        return;
    }
    var sum = 0.0;
    for (var i = lane; i < PAIRS; i += 64u) {
        let pair = load(row * PAIRS + i);
        sum += dot(pair, pair);
    }
    sums[lane] = sum;
    for (var distance = 32u; distance > 0u; distance /= 2u) {
        workgroupBarrier();
        if lane < distance {
            sums[lane] += sums[lane + distance];
        }
    }
    workgroupBarrier();
    let root = inverseSqrt(sums[0] / f32(2u * PAIRS) + EPS);
    for (var i = lane; i < PAIRS; i += 64u) {
        store(row * PAIRS + i, load(row * PAIRS + i) * root * weight[i]);
    }
}
