// What is read is what is written, a half of a u32 at a time.

fn source_word(at: u32) -> u32 {
    return atomicLoad(&dst[at]);
}
