// 16-bit elements: two fill a u32, and a pair that starts at an odd position lies across two.

const ELEMENTS_PER_U32: u32 = 2u;

fn load_half(element: u32) -> u32 {
    return (src[element >> 1u] >> ((element & 1u) * 16u)) & 0xffffu;
}

fn load_u32(element: u32) -> u32 {
    return load_half(element) | (load_half(element + 1u) << 16u);
}
