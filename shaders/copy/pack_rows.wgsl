// Copies the valid rows of one padded [B, S, H, D] tensor to a packed [n, H, D] one, bit for bit.
//
//   indices  [ 0 2 5 ]     packed row i = padded row indices[i]: token indices[i] % S of batch row
//                          indices[i] / S
//
// Where the device built the list, places behind the valid rows hold no row.

const NO_ROW: u32 = 0xffffffffu;

@compute @workgroup_size(INVOCATIONS)
fn pack_rows(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < word_count(); i += groups.x * INVOCATIONS) {
        let at = word_at(i);
        let flat = indices[params.first_row + at.row];
        if flat == NO_ROW {
            continue;
        }
        let source = params.src_offset + (flat / params.seq - params.batch_base) * params.src_stride_b
            + (flat % params.seq) * params.src_stride_s + at.head * params.src_stride_h;
        dst[params.dst_offset + at.row * params.dst_stride_s + at.head * params.dst_stride_h + at.word] = src[source + at.word];
    }
}
