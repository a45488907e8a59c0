// The second step, of one workgroup: the kept tokens before each block in the place of those in it,
// and those of all behind the starts of the sequences.

@compute @workgroup_size(INVOCATIONS)
fn metadata_blocks(@builtin(local_invocation_index) invocation: u32) {
    var before = 0u;
    for (var first = 0u; first < params.blocks; first += INVOCATIONS) {
        let block = first + invocation;
        var sum = 0u;
        if block < params.blocks {
            sum = block_sums[block];
        }
        let up_to = sum_up_to(invocation, sum);
        if block < params.blocks {
            block_sums[block] = before + up_to - sum;
        }
        before += sum_of_all();
    }
    if invocation == 0u {
        cu_seqlens[params.batch] = before;
    }
}
