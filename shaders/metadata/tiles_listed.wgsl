// Tiles of a list: see tile_list.wgsl. Ranges of fused tiles are listed by batch rows, of packed ones
// by rows alone.

fn tile_of(i: u32) -> vec2<u32> {
    let entry = tiles[i];
    return vec2<u32>(entry.z * params.numbered_stride + entry.x, entry.y);
}
