// What is read is what is written.

fn source_word(at: u32) -> Word {
    return dst[at];
}
