// Copies the valid rows of one padded [B, S, H, D] tensor to a packed [n, H, D] one, bit for bit, a 16-byte word a step.
//
//   indices  [ 0 2 5 ]            packed row i = padded row indices[i]: token indices[i] % S of batch row indices[i] / S

@compute @workgroup_size(256)
fn pack_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let words_per_row = params.heads * params.head_words;
    let step = groups.x * 256u;
    for (var i = id.x; i < params.rows * words_per_row; i += step) {
        let row = i / words_per_row;
        let head = (i % words_per_row) / params.head_words;
        let word = i % params.head_words;
        let flat = indices[params.first_row + row];
        let source = params.src_offset + (flat / params.seq - params.batch_base) * params.src_stride_b
            + (flat % params.seq) * params.src_stride_s + head * params.src_stride_h;
        dst[params.dst_offset + row * params.dst_stride_s + head * params.dst_stride_h + word] = src[source + word];
    }
}
