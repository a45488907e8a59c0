// Splits of the keys of the last heads' tiles, which several workgroups compute and coop_merge.wgsl merges.
// In the grid they follow the whole tiles of the other heads, so that they start last:
//
//   z        [ 0 1 ... | h h h h | h+1 h+1 h+1 h+1 ]      h = params.first_split_head, four splits a tile
//
// Each leaves its output, not divided by the sum of the weights, and of each row the base of its weights
// and their sum:
//
//   splits   [ tile 0 [ row 0 [ HEAD_DIM f32 | base sum - - ] row 1 ... ] tile 1 ... ]   of split 0 of all
//            [ the same of split 1 ] ...                                                  tiles of a head

// Quads of a row.
const SPLIT_QUADS: u32 = HEAD_DIM / 4u + 1u;

// The head of a plane of the grid.
fn head_at(z: u32) -> u32 {
    let first = params.first_split_head;
    return select(z, first + (z - first) / params.splits, z >= first);
}

// Whether a workgroup has a split of a tile, not all of it.
fn has_split(group: vec3<u32>) -> bool {
    return group.z + params.first_group_z >= params.first_split_head;
}

// Of the planes of splits, that of a workgroup.
fn split_plane(group: vec3<u32>) -> u32 {
    return group.z + params.first_group_z - params.first_split_head;
}

// Which split of its tile a workgroup has, if it has one.
fn split_number(group: vec3<u32>) -> u32 {
    return split_plane(group) % params.splits;
}

// Where a split of the workgroup's tile lies among all.
fn split_slot(group: vec3<u32>, number: u32) -> u32 {
    let plane = split_plane(group) / params.splits * params.splits + number;
    let x = group.x + params.first_group_x;
    let y = group.y + params.first_group_y;
    return (plane * params.split_height + y) * params.split_width + x;
}

// Where a row of it begins.
fn split_row(slot: u32, row: u32) -> u32 {
    return (slot * TILE_ROWS + row) * SPLIT_QUADS;
}

// The keys of one split of a tile: whole steps, about as many in each. Of few some have none.
fn split_keys(tile: Tile, number: u32) -> KeyRange {
    let steps = (tile.keys.end - tile.keys.first + TILE_KEYS - 1u) / TILE_KEYS;
    let first = tile.keys.first + steps * number / params.splits * TILE_KEYS;
    let end = tile.keys.first + steps * (number + 1u) / params.splits * TILE_KEYS;
    return KeyRange(min(first, tile.keys.end), min(end, tile.keys.end));
}

// The workgroup's tile, with the keys that are the workgroup's.
fn share_of_tile(group: vec3<u32>) -> Tile {
    var tile = locate(group);
    if has_split(group) {
        tile.keys = split_keys(tile, split_number(group));
    }
    return tile;
}
