// Splits of the keys of tiles, which several workgroups compute and coop_merge.wgsl merges. Each leaves its
// output, not divided by the sum of the weights, and of each row the base of its weights and their sum:
//
//   splits   [ tile 0 [ row 0 [ HEAD_DIM f32 | base sum - - ] row 1 ... ] tile 1 ... ]   of split 0 of all
//            [ the same of split 1 ] ...                                                  tiles of a head

// Quads of a row.
const SPLIT_QUADS: u32 = HEAD_DIM / 4u + 1u;

// The workgroup's place in the whole grid, in which the splits of a head lie along z.
fn split_place(group: vec3<u32>) -> vec3<u32> {
    return group + vec3<u32>(params.first_group_x, params.first_group_y, params.first_group_z);
}

// Which split of its tile a workgroup has.
fn split_number(group: vec3<u32>) -> u32 {
    return split_place(group).z % params.splits;
}

// Where a split of the workgroup's tile lies among all.
fn split_slot(group: vec3<u32>, number: u32) -> u32 {
    let place = split_place(group);
    let plane = (place.z / params.splits - params.first_split_head) * params.splits + number;
    return (plane * params.split_height + place.y) * params.split_width + place.x;
}

// Where a row of it begins.
fn split_row(slot: u32, row: u32) -> u32 {
    return (slot * TILE_ROWS + row) * SPLIT_QUADS;
}

// The tile with the keys of one split alone: whole steps, about as many in each. Of few some have none.
fn split_of(tile: Tile, number: u32) -> Tile {
    var part = tile;
    let steps = (tile.keys.end - tile.keys.first + TILE_KEYS - 1u) / TILE_KEYS;
    let first = tile.keys.first + steps * number / params.splits * TILE_KEYS;
    let end = tile.keys.first + steps * (number + 1u) / params.splits * TILE_KEYS;
    part.keys = KeyRange(min(first, tile.keys.end), min(end, tile.keys.end));
    return part;
}
