// Copies packed [n, H, D] rows to the valid rows of a padded [B, S, H, D] tensor, bit for bit, and
// writes zeros to the others.
//
//   inv_indices  [ 0 -1 1 | -1 -1 2 ]     padded row r = packed row inv_indices[r], or zeros where
//                                         that is negative

@compute @workgroup_size(INVOCATIONS)
fn scatter_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < word_count(); i += groups.x * INVOCATIONS) {
        let at = word_at(i);
        let flat = params.first_row + at.row;
        let packed = inv_indices[flat];
        var value = vec4<u32>(0u);
        if packed >= 0 {
            value = src[params.src_offset + (u32(packed) - params.row_base) * params.src_stride_s
                + at.head * params.src_stride_h + at.word];
        }
        let to = params.dst_offset + (flat / params.seq - params.batch_base) * params.dst_stride_b
            + (flat % params.seq) * params.dst_stride_s + at.head * params.dst_stride_h;
        dst[to + at.word] = value;
    }
}
