// The ranges of packed queries.

const NO_ROW: u32 = 0xffffffffu;

@compute @workgroup_size(INVOCATIONS)
fn metadata_ranges(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.batch * params.seq_q; i += groups.x * INVOCATIONS) {
        let flat = indices[i];
        var numbers = vec2<u32>(0u);
        if flat != NO_ROW {
            let row = flat / params.seq_q;
            numbers = as_numbers(row, given[row * params.given_stride + flat % params.seq_q]);
        }
        numbered[i] = numbers;
    }
}
