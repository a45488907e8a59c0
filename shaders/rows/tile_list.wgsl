// Tiles of a list. The workgroup at (x, y, z) of the grid takes tile x + y · grid_width of the launch
// and query head z. With ranges it counts from the last tile.

struct Listed {
    // Whether the list is as long as that, and its tile has rows: devices build lists with empty
    // places (metadata/tiles.wgsl). The last tile stands in for those past the end.
    exists: bool,
    // The tile's place in the list.
    at: u32,
    // What it means is up to the file that lists tiles.
    entry: vec4<u32>,
}

fn listed(group: vec3<u32>) -> Listed {
    let at = params.first_tile + group.x + group.y * params.grid_width;
    let place = min(at, params.end_tile - 1u); // without ranges
    let place = params.end_tile - 1u - min(at, params.end_tile - 1u) + params.first_tile; // with ranges
    let entry = tiles[place];
    return Listed(at < params.end_tile && entry.y > 0u, place, entry);
}
