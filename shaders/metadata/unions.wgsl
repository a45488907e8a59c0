// What some query of a tile sees, and what all see; empty ranges for none. `tile_of` says where the
// ranges of its queries lie, and how many they are.

@compute @workgroup_size(INVOCATIONS)
fn metadata_unions(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.tiles; i += groups.x * INVOCATIONS) {
        let tile = tile_of(i);
        var some = vec2<u32>(0xffffffffu, 0u);
        var all = vec2<u32>(0u, 0xffffffffu);
        for (var at = tile.x; at < tile.x + tile.y; at++) {
            let seen = numbered[at];
            if seen.x < seen.y {
                some = vec2<u32>(min(some.x, seen.x), max(some.y, seen.y));
            }
            all = vec2<u32>(max(all.x, seen.x), min(all.y, seen.y));
        }
        let place = params.unions_offset + 2u * i;
        numbered[place] = select(vec2<u32>(0u), some, some.x < some.y);
        numbered[place + 1u] = select(vec2<u32>(0u), all, tile.y > 0u);
    }
}
