// The output of tiles whose keys were split, from what coop_splits.wgsl says that splits leave. The
// workgroups of a tile's splits take its words in turn.
//
//   m = max(base)    w = exp2(base - m)    out = sum(w output) / sum(w sum)

const HEAD_WORDS: u32 = HEAD_DIM / 8u;
const INVOCATIONS: u32 = SUBGROUPS * SUBGROUP_SIZE;

@compute @workgroup_size(INVOCATIONS)
fn merge_splits(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) invocation: u32) {
    let tile = locate(group);
    if !tile.exists {
        return;
    }
    let has_keys = tile.keys.end > tile.keys.first;
    let first = invocation + split_number(group) * INVOCATIONS;
    for (var i = first; i < tile.rows * HEAD_WORDS; i += INVOCATIONS * params.splits) {
        let row = i / HEAD_WORDS;
        let word = i % HEAD_WORDS;
        var largest = LOWEST;
        var row_sum = 0.0;
        var low = vec4<f32>(0.0);
        var high = vec4<f32>(0.0);
        for (var number = 0u; number < params.splits; number++) {
            let keys = split_keys(tile, number);
            if keys.end > keys.first {
                let at = split_row(split_slot(group, number), row);
                let of_row = splits[at + HEAD_DIM / 4u];
                let base = max(largest, of_row.x);
                // Bounded, as in coop.wgsl.
                let before = exp2(max(largest - base, -1000.0));
                let weight = exp2(max(of_row.x - base, -1000.0));
                row_sum = row_sum * before + of_row.y * weight;
                low = low * before + splits[at + word * 2u] * weight;
                high = high * before + splits[at + word * 2u + 1u] * weight;
                largest = base;
            }
        }
        row_sum = spread_overflow(has_keys, largest, row_sum);
        let is_zero = row_sum == 0.0 || !row_is_kept(tile, row);
        low = select(low / row_sum, vec4<f32>(0.0), is_zero);
        high = select(high / row_sum, vec4<f32>(0.0), is_zero);
        store_out(out_row(tile, row), word, rounded(low, high));
    }
}
