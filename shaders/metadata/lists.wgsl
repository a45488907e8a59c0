// The fourth step, a token for each invocation: where it lies among the kept tokens of the batch and
// of its row, or among the dropped ones. Every element of every list is written:
//
//   mask         [ 1 0 1 | 0 0 1 ]
//   inv_indices  [ 0 -1 1 | -1 -1 2 ]
//   indices      [ 0 2 5 | none none none ]           see copy/pack_rows.wgsl
//   token_lists  [ 2 | 0 2 | 1 ] [ 1 | 2 | 0 1 ]      see rows/fused.wgsl

const NO_ROW: u32 = 0xffffffffu;

@compute @workgroup_size(INVOCATIONS)
fn metadata_lists(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let kept_of_all = cu_seqlens[params.batch];
    for (var flat = id.x; flat < params.batch * params.seq; flat += groups.x * INVOCATIONS) {
        let row = flat / params.seq;
        let token = flat % params.seq;
        let word = row * params.row_words + (token >> 5u);
        let bit = token & 31u;
        let kept_before = word_starts[word] + countOneBits(bits[word] & ((1u << bit) - 1u));
        let sequence_start = cu_seqlens[row];
        let kept = cu_seqlens[row + 1u] - sequence_start;
        let kept_before_in_row = kept_before - sequence_start;
        let list = row * (params.seq + 1u);
        if token == 0u {
            token_lists[list] = kept;
        }
        if ((bits[word] >> bit) & 1u) == 1u {
            inv_indices[flat] = i32(kept_before);
            indices[kept_before] = flat;
            token_lists[list + 1u + kept_before_in_row] = token;
        } else {
            inv_indices[flat] = -1;
            indices[kept_of_all + flat - kept_before] = NO_ROW;
            token_lists[list + 1u + kept + token - kept_before_in_row] = token;
        }
    }
}
