// 32-bit elements: one fills a u32.

const ELEMENTS_PER_U32: u32 = 1u;

fn store_elements(element: u32, value: u32, count: u32) {
    atomicStore(&dst[element], value);
}
