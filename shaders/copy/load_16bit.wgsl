// 16-bit elements: two fill a u32, and a pair that starts at an odd position lies across two.

const ELEMENTS_PER_U32: u32 = 2u;

fn load_half(element: u32) -> u32 {
    return (src[element >> 1u] >> ((element & 1u) * 16u)) & 0xffffu;
}

// The elements of a u32, of which the head has `count`; what it has not is 0.
fn load_u32(element: u32, count: u32) -> u32 {
    let low = load_half(element);
    if count == 1u {
        return low;
    }
    return low | (load_half(element + 1u) << 16u);
}
