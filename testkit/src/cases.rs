//! The named cases that every device must pass, in f16 and bf16.

/// A joint text and image sequence: `[valid text | text padding | image, all valid]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// The name used in messages.
    pub name: &'static str,
    /// Batch rows.
    pub batch: usize,
    /// Text tokens, valid or not.
    pub text: usize,
    /// Image tokens, all valid.
    pub image: usize,
    /// Query heads, and key and value heads.
    pub heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Valid text tokens of each batch row.
    pub valid: &'static [usize],
}

/// Every case.
pub const CASES: [Case; 7] = [
    Case { name: "small_c2", batch: 2, text: 64, image: 128, heads: 4, head_dim: 64, valid: &[32, 48] },
    Case { name: "prod_c2", batch: 2, text: 256, image: 1024, heads: 24, head_dim: 128, valid: &[128, 200] },
    Case { name: "all_valid_b1", batch: 1, text: 64, image: 128, heads: 4, head_dim: 64, valid: &[64] },
    Case { name: "all_valid_b4", batch: 4, text: 64, image: 128, heads: 4, head_dim: 64, valid: &[64, 64, 64, 64] },
    Case {
        name: "c8_prod",
        batch: 8,
        text: 256,
        image: 4096,
        heads: 24,
        head_dim: 128,
        valid: &[128, 200, 256, 100, 50, 256, 256, 50],
    },
    Case { name: "zero_txt_one_batch", batch: 2, text: 64, image: 128, heads: 4, head_dim: 64, valid: &[0, 32] },
    Case { name: "bs1_zero_txt", batch: 1, text: 64, image: 128, heads: 4, head_dim: 64, valid: &[0] },
];

impl Case {
    /// The case of that name.
    pub fn named(name: &str) -> Option<&'static Self> {
        CASES.iter().find(|case| case.name == name)
    }

    /// Tokens of one batch row.
    pub fn seq(&self) -> usize {
        self.text + self.image
    }

    /// `[batch, seq, heads, head_dim]`.
    pub fn shape(&self) -> [usize; 4] {
        [self.batch, self.seq(), self.heads, self.head_dim]
    }

    /// Elements of each of q, k and v.
    pub fn elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// The key mask, `[batch, seq]`.
    pub fn mask(&self) -> Vec<bool> {
        let row = |&valid: &usize| (0..self.seq()).map(move |token| token < valid || token >= self.text);
        self.valid.iter().flat_map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_case_is_consistent_and_found_by_its_name() {
        for case in &CASES {
            assert_eq!(case.valid.len(), case.batch, "{}", case.name);
            assert!(case.valid.iter().all(|&valid| valid <= case.text), "{}", case.name);
            assert_eq!(Case::named(case.name), Some(case));
            let kept = case.mask().iter().filter(|&&keep| keep).count();
            assert_eq!(kept, case.valid.iter().sum::<usize>() + case.batch * case.image, "{}", case.name);
        }
        assert_eq!(Case::named("none"), None);
    }

    #[test]
    fn the_gap_lies_between_valid_text_and_image() {
        let case = Case { name: "tiny", batch: 2, text: 3, image: 2, heads: 1, head_dim: 1, valid: &[1, 3] };
        let (keep, drop) = (true, false);
        assert_eq!(case.mask(), [keep, drop, drop, keep, keep, keep, keep, keep, keep, keep]);
        assert_eq!(case.shape(), [2, 5, 1, 1]);
        assert_eq!(case.elements(), 10);
    }
}
