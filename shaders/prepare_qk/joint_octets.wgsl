// Octets are written a second time, among the heads of all segments.

fn store_joint(element: u32, raw: Part) {
    for (var i = 0u; i < OCTET_WORDS; i++) { // unroll
        joint[word_of(element) + i] = raw[i];
    }
}
