// Metadata of a [B, S] mask: what src/mask/meta.rs builds on the host. Every count comes from one
// prefix sum over the words of the mask's bits, in three steps: sums of blocks, a scan of those
// sums, and the words of each block from its start on (reduce, then scan: G. E. Blelloch, "Prefix
// Sums and Their Applications", 1990).
//
//   bits.wgsl     mask [B, S] ─▶ bits [B, row_words], kept tokens of each block of 256 words
//   blocks.wgsl   those sums ─▶ kept tokens before each block, and of all
//   starts.wgsl   bits ─▶ kept tokens before each word, cu_seqlens
//   lists.wgsl    bits ─▶ indices, inv_indices, token lists
//   tiles.wgsl    cu_seqlens ─▶ query tiles, for one number of rows at a time
//
// A block is what a workgroup sums at once, a word for each invocation.

var<workgroup> sums: array<u32, INVOCATIONS>;

// The sum of the values of the invocations up to this one, included, in log2(INVOCATIONS) steps
// (W. D. Hillis and G. L. Steele, "Data Parallel Algorithms", 1986). All invocations call it.
fn sum_up_to(invocation: u32, value: u32) -> u32 {
    // Others may still read the last sums.
    workgroupBarrier();
    sums[invocation] = value;
    workgroupBarrier();
    for (var distance = 1u; distance < INVOCATIONS; distance *= 2u) {
        var before = 0u;
        if invocation >= distance {
            before = sums[invocation - distance];
        }
        workgroupBarrier();
        sums[invocation] += before;
        workgroupBarrier();
    }
    return sums[invocation];
}

// The sum of all values, after `sum_up_to`.
fn sum_of_all() -> u32 {
    return sums[INVOCATIONS - 1u];
}
