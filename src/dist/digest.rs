//! Sixteen bytes that tell what ranks were given apart.

/// Adds up what a rank was given, by FNV-1a in 128 bits: the same on every machine, build and rank. It finds mistakes; it does not
/// keep out an attacker.
#[derive(Debug, Clone)]
pub(super) struct Digest(u128);

/// The result of a [`Digest`].
pub(super) type Tag = [u8; 16];

impl Digest {
    pub(super) fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        const PRIME: u128 = (1 << 88) + 0x13b;
        for &byte in bytes {
            self.0 = (self.0 ^ u128::from(byte)).wrapping_mul(PRIME);
        }
        self
    }

    /// Sizes, with their number before them.
    pub(super) fn sizes(self, sizes: impl IntoIterator<Item = usize>) -> Self {
        let (mut digest, mut count) = (self, 0_u64);
        for size in sizes {
            digest = digest.bytes(&(size as u64).to_le_bytes());
            count += 1;
        }
        digest.bytes(&count.to_le_bytes())
    }

    pub(super) fn tag(self) -> Tag {
        self.0.to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_published_one() {
        // Of the empty text and of "a", from the draft of FNV's authors.
        assert_eq!(Digest::new().0, 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(Digest::new().bytes(b"a").0, 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }

    #[test]
    fn lists_of_sizes_do_not_run_into_one_another() {
        let tag = |lists: [&[usize]; 2]| {
            lists.iter().fold(Digest::new(), |digest, list| digest.sizes(list.iter().copied())).tag()
        };
        assert_ne!(tag([&[1], &[2, 3]]), tag([&[1, 2], &[3]]));
    }
}
