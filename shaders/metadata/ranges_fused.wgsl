// The ranges of queries in the order of their lists, of dropped ones an empty one, and perhaps the
// queries behind them.

@compute @workgroup_size(INVOCATIONS)
fn metadata_ranges(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.batch * params.seq_q; i += groups.x * INVOCATIONS) {
        let row = i / params.seq_q;
        let place = i % params.seq_q;
        let list = row * (params.seq_q + 1u);
        let token = query_tokens[list + 1u + place];
        var numbers = vec2<u32>(0u);
        if place < query_tokens[list] {
            numbers = as_numbers(row, given[row * params.given_stride + token]);
        }
        numbered[i] = numbers;
        if params.lists_queries == 1u {
            numbered[params.queries_offset + i] = vec2<u32>(token, 0u);
        }
    }
}
