// Copies a [B, S, H, D'] tensor of contiguous rows, or a part along S of one, to a [B, S, H, D] view of any strides, bit for bit: the
// first D elements of each of its heads, and nothing to what lies between them. Positions in the
// target count elements, those in the source u32s (`head_words` is the u32s of a head of D').

@compute @workgroup_size(INVOCATIONS)
fn narrow_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < word_count(); i += groups.x * INVOCATIONS) {
        let at = word_at(i);
        let first = at.word * ELEMENTS_PER_U32;
        if first < params.head_dim {
            let element = params.dst_offset + (at.row / params.seq) * params.dst_stride_b
                + (at.row % params.seq) * params.dst_stride_s + at.head * params.dst_stride_h + first;
            let place = params.src_offset + (at.row / params.seq) * params.src_stride_b
                + (at.row % params.seq) * params.src_stride_s + at.head * params.head_words + at.word;
            store_elements(element, src[place], min(params.head_dim - first, ELEMENTS_PER_U32));
        }
    }
}
