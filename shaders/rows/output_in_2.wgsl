// Segments of the output that lie in two buffers.

fn store_out(row_at: u32, word: u32, value: vec4<u32>) {
    let at = (row_at & POSITION) + word;
    switch row_at >> 28u {
        case 1u: {
            out1[at] = value;
        }
        default: {
            out[at] = value;
        }
    }
}
