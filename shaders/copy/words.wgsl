// The words of `params.rows` rows. `params.head_words` of them make up a head, 16 bytes each unless
// the shader counts otherwise. Every invocation of the grid takes one word in turn.

struct Word {
    row: u32,
    head: u32,
    // In the head.
    word: u32,
}

fn word_count() -> u32 {
    return params.rows * (params.heads * params.head_words);
}

fn word_at(i: u32) -> Word {
    let words_per_row = params.heads * params.head_words;
    return Word(i / words_per_row, (i % words_per_row) / params.head_words, i % params.head_words);
}
