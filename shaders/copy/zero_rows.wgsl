// Writes zeros to every row of a padded [B, S, H, D] view, and to nothing between the rows.

@compute @workgroup_size(INVOCATIONS)
fn zero_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < word_count(); i += groups.x * INVOCATIONS) {
        let at = word_at(i);
        let to = params.dst_offset + (at.row / params.seq) * params.dst_stride_b + (at.row % params.seq) * params.dst_stride_s;
        dst[to + at.head * params.dst_stride_h + at.word] = vec4<u32>(0u);
    }
}
