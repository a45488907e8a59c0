// Heads of f32 are written a second time, among those of all segments. There all heads are of whole
// words.

fn store_joint(element: u32, pair: Part) {
    joint[element] = bitcast<u32>(pair.x);
    joint[element + 1u] = bitcast<u32>(pair.y);
}
