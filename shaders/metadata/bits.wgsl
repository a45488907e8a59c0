// The first step: a word of bits for each 32 tokens of a row, and the kept tokens of each block.

// Elements lie at multiples of their size, so that those of up to 4 bytes lie in one u32.
fn keeps(element: u32) -> bool {
    let at = element * params.mask_bytes;
    var value = (mask[at >> 2u] >> ((at & 3u) * 8u)) & params.mask_low;
    if params.mask_bytes == 8u {
        value |= mask[(at >> 2u) + 1u];
    }
    return value != 0u;
}

@compute @workgroup_size(INVOCATIONS)
fn metadata_bits(
    @builtin(local_invocation_index) invocation: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    for (var block = group.x; block < params.blocks; block += groups.x) {
        let word = block * INVOCATIONS + invocation;
        var kept = 0u;
        if word < params.words {
            let first = word % params.row_words * 32u;
            let count = min(params.seq - first, 32u);
            let start = params.mask_offset + word / params.row_words * params.mask_stride_b + first * params.mask_stride_s;
            for (var bit = 0u; bit < count; bit++) {
                kept |= u32(keeps(start + bit * params.mask_stride_s)) << bit;
            }
            bits[word] = kept;
        }
        let sum = sum_up_to(invocation, countOneBits(kept));
        if invocation == INVOCATIONS - 1u {
            block_sums[block] = sum;
        }
    }
}
