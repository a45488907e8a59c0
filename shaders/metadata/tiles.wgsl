// The last step: query tiles of `tile_rows` rows. The host does not know how many there are, so each
// row has places for as many as it may need, and tiles without rows are in those that it does not:
//
//   S = 10, 3 rows a tile     packed: 4 places            fused: 5 places
//   4 kept tokens             [ 3 1 0 0 ]                 [ 3 1 | 3 3 0 ]
//                                                          kept   dropped
//
// See rows/packed.wgsl and rows/fused.wgsl for what a tile says.

// The rows of a tile that starts at `first`, of rows that end before `end`.
fn rows_from(first: u32, end: u32) -> u32 {
    return min(max(end, first) - first, params.tile_rows);
}

@compute @workgroup_size(INVOCATIONS)
fn metadata_tiles(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let packed_places = (params.seq + params.tile_rows - 1u) / params.tile_rows;
    let places = packed_places + 1u;
    for (var i = id.x; i < params.batch * places; i += groups.x * INVOCATIONS) {
        let row = i / places;
        let place = i % places;
        let sequence_start = cu_seqlens[row];
        let kept = cu_seqlens[row + 1u] - sequence_start;
        let kept_tiles = (kept + params.tile_rows - 1u) / params.tile_rows;
        let first = place * params.tile_rows;
        if place < kept_tiles {
            fused_tiles[i] = vec4<u32>(first, rows_from(first, kept), row, 0u);
        } else {
            let first_dropped = kept + (place - kept_tiles) * params.tile_rows;
            fused_tiles[i] = vec4<u32>(first_dropped, rows_from(first_dropped, params.seq), row, 1u);
        }
        if place < packed_places {
            packed_tiles[row * packed_places + place] = vec4<u32>(sequence_start + first, rows_from(first, kept), row, 0u);
        }
    }
}
