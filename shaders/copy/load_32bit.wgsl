// 32-bit elements: one fills a u32.

const ELEMENTS_PER_U32: u32 = 1u;

fn load_u32(element: u32, count: u32) -> u32 {
    return src[element];
}
