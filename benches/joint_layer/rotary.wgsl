// Rotation of pairs, one invocation each.
@group(0) @binding(1) var<storage, read> cosines: array<f32>;
@group(0) @binding(2) var<storage, read> sines: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.x + group.y * 65535u) * 64u + lane;
    if i >= COUNT {
        return;
    }
    let at = i / (PAIRS * HEADS) % SEQ * PAIRS + i % PAIRS;
    let pair = load(i);
    let turn = vec2<f32>(cosines[at], sines[at]);
    store(i, vec2<f32>(pair.x * turn.x - pair.y * turn.y, pair.y * turn.x + pair.x * turn.y));
}
