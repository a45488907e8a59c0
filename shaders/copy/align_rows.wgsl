// Copies a [B, S, H, D] view whose rows do not start at 16-byte words, or do not end there, to a
// tensor of contiguous rows, or to a part along S of one, bit for bit. Positions in the source count elements, those in the target u32s:
// `head_words` is the u32s of a head, which zeros fill up to whole words.

@compute @workgroup_size(INVOCATIONS)
fn align_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < word_count(); i += groups.x * INVOCATIONS) {
        let at = word_at(i);
        let first = at.word * ELEMENTS_PER_U32;
        let element = params.src_offset + (at.row / params.seq) * params.src_stride_b
            + (at.row % params.seq) * params.src_stride_s + at.head * params.src_stride_h + first;
        var value = 0u;
        if first < params.head_dim {
            value = load_u32(element, min(params.head_dim - first, ELEMENTS_PER_U32));
        }
        dst[params.dst_offset + (at.row / params.seq) * params.dst_stride_b + (at.row % params.seq) * params.dst_stride_s
            + at.head * params.head_words + at.word] = value;
    }
}
