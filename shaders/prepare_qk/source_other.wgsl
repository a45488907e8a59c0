// What is read lies in a buffer of its own.

fn source_word(at: u32) -> Word {
    return src[at];
}
