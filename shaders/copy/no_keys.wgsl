// Writes the log-sum-exp of rows without keys, -inf, to a padded [B, H, S] view.

@compute @workgroup_size(INVOCATIONS)
fn no_keys(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.rows * params.heads; i += groups.x * INVOCATIONS) {
        let row = i % params.rows;
        dst[params.dst_offset + row / params.seq * params.dst_stride_b + i / params.rows * params.dst_stride_h
            + row % params.seq * params.dst_stride_s] = 0xff800000u;
    }
}
