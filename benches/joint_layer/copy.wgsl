// A copy of words of 16 bytes, one invocation each, between a part and the concatenated whole.
@group(0) @binding(0) var<storage, read_write> to: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> source: array<vec4<u32>>;

fn whole_at(i: u32) -> u32 {
    return i / PART_WORDS * WHOLE_WORDS + FIRST_WORD + i % PART_WORDS;
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.x + group.y * 65535u) * 64u + lane;
    if i < COUNT {
        to[TO_AT] = source[FROM_AT];
    }
}
