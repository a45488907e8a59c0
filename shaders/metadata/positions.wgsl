// Ranges of keys that the caller gave in positions of padded tensors, with metadata of the device:
// what src/backends/wgpu/ranges.rs puts together on the host where the metadata is the host's. Two
// steps, the ranges of queries and then those of tiles, write one buffer:
//
//   numbered   [ q0 q1 q2 q3 q4 ... | some all  some all ... | queries ]      see rows/ranges.wgsl
//                                     └ tile 0   tile 1

// Kept keys of a batch row before a position.
fn kept_before(row: u32, position: u32) -> u32 {
    let start = cu_seqlens_k[row];
    if position >= params.seq_k {
        return cu_seqlens_k[row + 1u] - start;
    }
    let word = row * params.key_words + (position >> 5u);
    return word_starts_k[word] + countOneBits(key_bits[word] & ((1u << (position & 31u)) - 1u)) - start;
}

// A range as the number of kept keys before its ends.
fn as_numbers(row: u32, range: vec2<u32>) -> vec2<u32> {
    return vec2<u32>(kept_before(row, range.x), kept_before(row, range.y));
}
