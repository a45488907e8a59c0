// LayerNorm of rows [B, SEQ, WIDTH], scaled by 1 + scale and shifted by two of a batch row's six parts
// of the modulation, [B, 6, WIDTH]. A workgroup takes a row.
@group(0) @binding(0) var<storage, read> hidden: array<f32>;
@group(0) @binding(1) var<storage, read> modulation: array<f32>;
@group(0) @binding(2) var<storage, read_write> rows: array<f32>;

var<workgroup> parts: array<f32, 64>;

// Of what all invocations have.
fn sum_of(lane: u32, value: f32) -> f32 {
    workgroupBarrier();
    parts[lane] = value;
    for (var distance = 32u; distance > 0u; distance /= 2u) {
        workgroupBarrier();
        if lane < distance {
            parts[lane] += parts[lane + distance];
        }
    }
    workgroupBarrier();
    return parts[0];
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x + group.y * 65535u;
    if row >= ROWS {
        return;
    }
    var sum = 0.0;
    for (var i = lane; i < WIDTH; i += 64u) {
        sum += hidden[row * WIDTH + i];
    }
    let mean = sum_of(lane, sum) / f32(WIDTH);
    var squares = 0.0;
    for (var i = lane; i < WIDTH; i += 64u) {
        let distance = hidden[row * WIDTH + i] - mean;
        squares += distance * distance;
    }
    let root = inverseSqrt(sum_of(lane, squares) / f32(WIDTH) + EPS);
    let shift = (row / SEQ * 6u + SHIFT) * WIDTH;
    for (var i = lane; i < WIDTH; i += 64u) {
        let value = (hidden[row * WIDTH + i] - mean) * root;
        rows[row * WIDTH + i] = value * (1.0 + modulation[shift + WIDTH + i]) + modulation[shift + i];
    }
}
