// Octets are written a second time, among the heads of all segments.

fn store_joint(element: u32, octet: Octet) {
    let at = word_of(element);
    if OCTET_WORDS == 1u {
        joint[at] = narrow(octet.low, octet.high);
    } else {
        joint[at] = narrow(octet.low, octet.low);
        joint[at + 1u] = narrow(octet.high, octet.high);
    }
}
