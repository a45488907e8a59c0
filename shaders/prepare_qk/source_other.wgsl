// What is read lies in a buffer of its own.

fn source_word(at: u32) -> u32 {
    return src[at];
}
