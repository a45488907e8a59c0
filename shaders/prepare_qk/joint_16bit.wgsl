// Heads of 16-bit elements are written a second time, among those of all segments. There all heads
// are of whole words.

fn store_joint(element: u32, pair: Part) {
    joint[element >> 1u] = narrow_pair(pair);
}
