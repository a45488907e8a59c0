// Adds rows [B, SEQ, WIDTH], times one of a batch row's six parts of the modulation, to hidden states.
@group(0) @binding(0) var<storage, read_write> hidden: array<f32>;
@group(0) @binding(1) var<storage, read> rows: array<f32>;
@group(0) @binding(2) var<storage, read> modulation: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.x + group.y * 65535u) * 64u + lane;
    if i < ROWS * WIDTH {
        let batch = i / WIDTH / SEQ;
        hidden[i] += modulation[(batch * 6u + GATE) * WIDTH + i % WIDTH] * rows[i];
    }
}
