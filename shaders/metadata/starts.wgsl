// The third step: the kept tokens before each word, which before the first word of a row are the
// start of its sequence.

@compute @workgroup_size(INVOCATIONS)
fn metadata_starts(
    @builtin(local_invocation_index) invocation: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    for (var block = group.x; block < params.blocks; block += groups.x) {
        let word = block * INVOCATIONS + invocation;
        var count = 0u;
        if word < params.words {
            count = countOneBits(bits[word]);
        }
        let start = block_sums[block] + sum_up_to(invocation, count) - count;
        if word < params.words {
            word_starts[word] = start;
            if word % params.row_words == 0u {
                cu_seqlens[word / params.row_words] = start;
            }
        }
    }
}
