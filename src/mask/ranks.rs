//! How many kept tokens lie before a position: what turns positions of padded keys to numbers of kept keys.

use crate::error::Result;
use crate::host_vec::reserve;
use crate::mask::key_mask::KeyMask;

/// The number of kept tokens before each word of a mask, so that a lookup counts the bits of one word.
#[derive(Debug)]
pub(crate) struct Ranks<'a> {
    words: &'a [u64],
    words_per_row: usize,
    seq: usize,
    /// Kept tokens of the row before each word.
    before: Vec<u32>,
    /// Kept tokens of each row.
    lengths: Vec<u32>,
}

impl<'a> Ranks<'a> {
    pub(crate) fn new(mask: &'a KeyMask) -> Result<Self> {
        let (words, words_per_row) = (mask.words(), mask.words_per_row());
        let mut before = reserve(words.len())?;
        let mut lengths = reserve(mask.batch())?;
        for row in 0..mask.batch() {
            let mut count = 0;
            for word in &words[row * words_per_row..][..words_per_row] {
                before.push(count);
                count += word.count_ones();
            }
            lengths.push(count);
        }
        Ok(Self { words, words_per_row, seq: mask.seq(), before, lengths })
    }

    /// Kept tokens of row `b` before `position`, which is at most the length of the row.
    #[inline]
    pub(crate) fn of(&self, b: usize, position: u32) -> u32 {
        if position as usize >= self.seq {
            return self.lengths[b];
        }
        let at = b * self.words_per_row + position as usize / 64;
        self.before[at] + (self.words[at] & ((1 << (position % 64)) - 1)).count_ones()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_count_the_kept_tokens_before() -> Result<()> {
        for seq in [1, 63, 64, 65, 130] {
            let keep: Vec<bool> = (0..2 * seq).map(|at| at % 3 != 1 && at % 7 != 0).collect();
            let mask = KeyMask::from_bool(2, seq, &keep)?;
            let ranks = Ranks::new(&mask)?;
            for b in 0..2 {
                for position in 0..=seq {
                    let want = keep[b * seq..][..position].iter().filter(|&&kept| kept).count();
                    assert_eq!(ranks.of(b, position as u32) as usize, want, "{seq} {b} {position}");
                }
            }
        }
        Ok(())
    }
}
