// Copies a [B, S, H, D] view whose rows do not start at 16-byte words to a contiguous tensor, bit for bit. Positions in the
// source are counted in elements, in the target in u32s (`head_words` of them a head). D is a multiple of 8, so a target row
// is whole u32s.

@compute @workgroup_size(256)
fn align_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let words_per_row = params.heads * params.head_words;
    let step = groups.x * 256u;
    for (var i = id.x; i < params.rows * words_per_row; i += step) {
        let row = i / words_per_row;
        let head = (i % words_per_row) / params.head_words;
        let word = i % params.head_words;
        let element = params.src_offset + (row / params.seq) * params.src_stride_b
            + (row % params.seq) * params.src_stride_s + head * params.src_stride_h + word * ELEMENTS_PER_U32;
        dst[i] = load_u32(element);
    }
}
