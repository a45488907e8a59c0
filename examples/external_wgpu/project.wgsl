// One element of qkv = hidden · weight: [tokens, WIDTH] · [WIDTH, 3 · WIDTH].
@group(0) @binding(0) var<storage, read> hidden: array<f32>;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read_write> qkv: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let item = id.y * groups.x * 64u + id.x;
    if item >= arrayLength(&qkv) {
        return;
    }
    let token = item / (3u * WIDTH);
    let column = item % (3u * WIDTH);
    var sum = 0.0;
    for (var i = 0u; i < WIDTH; i++) {
        sum += hidden[token * WIDTH + i] * weight[i * 3u * WIDTH + column];
    }
    qkv[item] = sum;
}
