// Writes zeros to every row of a padded [B, S, H, D] view, and to nothing between the rows.

@compute @workgroup_size(256)
fn zero_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let words_per_row = params.heads * params.head_words;
    let step = groups.x * 256u;
    for (var i = id.x; i < params.rows * words_per_row; i += step) {
        let row = i / words_per_row;
        let head = (i % words_per_row) / params.head_words;
        let word = i % params.head_words;
        let to = params.dst_offset + (row / params.seq) * params.dst_stride_b + (row % params.seq) * params.dst_stride_s;
        dst[to + head * params.dst_stride_h + word] = vec4<u32>(0u);
    }
}
