// Copies a [B, S, H, D] view whose heads are whole words to another of the same shape, bit for bit.

@compute @workgroup_size(INVOCATIONS)
fn move_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < word_count(); i += groups.x * INVOCATIONS) {
        let at = word_at(i);
        let batch = at.row / params.seq;
        let token = at.row % params.seq;
        let source = params.src_offset + batch * params.src_stride_b + token * params.src_stride_s + at.head * params.src_stride_h;
        let to = params.dst_offset + batch * params.dst_stride_b + token * params.dst_stride_s + at.head * params.dst_stride_h;
        dst[to + at.word] = src[source + at.word];
    }
}
