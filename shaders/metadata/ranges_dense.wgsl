// The ranges of all queries as they were given; those of dropped ones end before they start (see
// rows/seeing_rows.wgsl).

@compute @workgroup_size(INVOCATIONS)
fn metadata_ranges(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.batch * params.seq_q; i += groups.x * INVOCATIONS) {
        let row = i / params.seq_q;
        let token = i % params.seq_q;
        let is_kept = ((query_bits[row * params.query_words + (token >> 5u)] >> (token & 31u)) & 1u) == 1u;
        numbered[i] = select(vec2<u32>(1u, 0u), given[row * params.given_stride + token], is_kept);
    }
}
