// Copies the packed log-sum-exp, [H, n], to the valid rows of a padded one, [B, H, S], and writes
// -inf to the others.

@compute @workgroup_size(INVOCATIONS)
fn scatter_lse(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.rows * params.heads; i += groups.x * INVOCATIONS) {
        let head = i / params.rows;
        let flat = params.first_row + i % params.rows;
        let packed = inv_indices[flat];
        var value = 0xff800000u;
        if packed >= 0 {
            value = src[params.src_offset + head * params.src_stride_h + u32(packed) - params.row_base];
        }
        dst[params.dst_offset + (flat / params.seq - params.batch_base) * params.dst_stride_b
            + head * params.dst_stride_h + (flat % params.seq) * params.dst_stride_s] = value;
    }
}
