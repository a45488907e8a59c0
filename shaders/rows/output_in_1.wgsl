// Segments of the output that lie in one buffer.

fn store_out(row_at: u32, word: u32, value: vec4<u32>) {
    out[(row_at & POSITION) + word] = value;
}
