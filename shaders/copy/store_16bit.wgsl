// 16-bit elements: two fill a u32, of which each may belong to another row, or to nobody here.

const ELEMENTS_PER_U32: u32 = 2u;

fn store_half(element: u32, value: u32) {
    let shift = (element & 1u) * 16u;
    atomicAnd(&dst[element >> 1u], ~(0xffffu << shift));
    atomicOr(&dst[element >> 1u], (value & 0xffffu) << shift);
}

// The first `count` elements of a u32.
fn store_elements(element: u32, value: u32, count: u32) {
    if count == 2u && (element & 1u) == 0u {
        atomicStore(&dst[element >> 1u], value);
        return;
    }
    store_half(element, value);
    if count == 2u {
        store_half(element + 1u, value >> 16u);
    }
}
