//! Ranges of the documents that lie side by side in a row, from the number of each token.
//!
//! ```text
//!    numbers                       7  7  7  2  5  5  0  9      0 is in no document
//!    starts, and one past the end  x  .  .  x  x  .  x  x  x   one bit a token
//!    ranges                        0..3     3  4..6  -  7..8
//! ```
//!
//! Nothing here branches on the length of one document, which no processor foresees: starts become
//! bits, and a table has the ranges of [`STEP`] tokens for each of their patterns.

use crate::error::{Error, Result};
use crate::host_vec::{reserve, zeroed};
use crate::mask::key_mask::{WORD_BITS, bits};

/// Tokens that are written together.
const STEP: usize = 8;
/// Places after the last range of a row that [`Documents::write`] writes too.
pub(super) const SPARE: usize = STEP;

/// Ranges of [`STEP`] tokens from the start of a document on, by the bits of the starts after it. Those
/// of the last document, which ends later, are not used.
static RANGES: [[[u32; 2]; STEP]; 1 << STEP] = ranges_by_starts();

const fn ranges_by_starts() -> [[[u32; 2]; STEP]; 1 << STEP] {
    let mut table = [[[0; 2]; STEP]; 1 << STEP];
    let mut later = 0;
    while later < table.len() {
        let starts = (later << 1 | 1) as u32;
        let mut token = 0;
        while token < STEP {
            let (up_to, after) = (starts & ((2 << token) - 1), starts >> (token + 1));
            let end = if after == 0 { 0 } else { token as u32 + 1 + after.trailing_zeros() };
            table[later][token] = [up_to.ilog2(), end];
            token += 1;
        }
        later += 1;
    }
    table
}

/// Finds the documents of one row after another.
pub(super) struct Documents {
    /// A bit for each token that has another number than the one before it, and one past the row's end;
    /// two words more.
    starts: Vec<u64>,
}

impl Documents {
    /// For rows of as many tokens.
    pub fn new(seq: usize) -> Result<Self> {
        Ok(Self { starts: zeroed(seq / WORD_BITS + 3)? })
    }

    /// Writes the range of each token of a row. Tokens numbered 0 may lie anywhere, and get none.
    ///
    /// `ranges` has [`SPARE`] places more than the row has tokens.
    ///
    /// # Errors
    /// [`Error::MaskRow`] for a document in two pieces, [`Error::OutOfMemory`].
    pub fn write(&mut self, row: usize, ids: &[u32], ranges: &mut [[u32; 2]]) -> Result<()> {
        let Seen { any_zero, any_fall } = self.find_starts(ids);
        self.write_ranges(ids.len(), ranges);
        if any_zero {
            for (range, &id) in ranges.iter_mut().zip(ids) {
                let kept = u32::from(id == 0).wrapping_sub(1);
                *range = range.map(
                    #[inline(always)]
                    |position| position & kept,
                );
            }
        }
        // Numbers that only ascend come once each.
        if any_fall && !self.ascend(ids) { expect_documents_together(row, ids) } else { Ok(()) }
    }

    fn find_starts(&mut self, ids: &[u32]) -> Seen {
        let Some(&first) = ids.first() else { return Seen::default() };
        let (mut seen, mut before) = (Seen::default(), first);
        let mut starts_of = |ids: &[u32; WORD_BITS]| {
            let mut previous = [before; WORD_BITS];
            previous[1..].copy_from_slice(&ids[..WORD_BITS - 1]);
            before = ids[WORD_BITS - 1];
            let mut starts = [false; WORD_BITS];
            // Without a way out of the loop, which the compiler makes SIMD code of.
            let (mut any_zero, mut any_fall) = (false, false);
            for ((start, &id), previous) in starts.iter_mut().zip(ids).zip(previous) {
                *start = id != previous;
                any_zero |= id == 0;
                any_fall |= id < previous;
            }
            seen.any_zero |= any_zero;
            seen.any_fall |= any_fall;
            bits(&starts)
        };
        let (words, rest) = ids.as_chunks::<WORD_BITS>();
        for (to, ids) in self.starts.iter_mut().zip(words) {
            *to = starts_of(ids);
        }
        self.starts[words.len()..].fill(0);
        if let Some(&last) = rest.last() {
            let mut padded = [last; WORD_BITS];
            padded[..rest.len()].copy_from_slice(rest);
            self.starts[words.len()] = starts_of(&padded);
        }
        self.starts[0] |= 1;
        self.starts[ids.len() / WORD_BITS] |= 1 << (ids.len() % WORD_BITS);
        seen
    }

    /// The bits of 64 tokens, the first of which is `token`.
    #[inline(always)]
    fn starts_from(&self, token: usize) -> u64 {
        let (word, bit) = (token / WORD_BITS, token % WORD_BITS);
        self.starts[word] >> bit | self.starts[word + 1] << 1 << (WORD_BITS - 1 - bit)
    }

    /// Those of tokens numbered 0 too. Tokens are bounded by `i32::MAX`, so each fits a `u32`.
    fn write_ranges(&self, seq: usize, ranges: &mut [[u32; 2]]) {
        /// Documents of one token that make it worth to write them by themselves.
        const SINGLE: usize = 32;
        let mut at = 0;
        while at < seq {
            let later = self.starts_from(at) >> 1;
            if later as u32 == u32::MAX {
                for (range, first) in ranges[at..at + SINGLE].iter_mut().zip(at as u32..) {
                    *range = [first, first + 1];
                }
                at += SINGLE;
                continue;
            }
            let near = later as u8;
            if near != 0 {
                for (range, &[first, end]) in ranges[at..at + STEP].iter_mut().zip(&RANGES[usize::from(near)]) {
                    *range = [first + at as u32, end + at as u32];
                }
                at += near.ilog2() as usize + 1;
                continue;
            }
            let mut end = at + 1 + STEP;
            // There is one: the row's end is a start.
            let mut starts = self.starts_from(end);
            while starts == 0 {
                end += WORD_BITS;
                starts = self.starts_from(end);
            }
            end += starts.trailing_zeros() as usize;
            ranges[at..end].fill([at as u32, end as u32]);
            at = end;
        }
    }

    /// Whether each document has a larger number than those before it.
    fn ascend(&self, ids: &[u32]) -> bool {
        let (mut highest, mut ascend) = (0, true);
        for (ids, starts) in ids.chunks(WORD_BITS).zip(&self.starts) {
            let mut documents = [false; WORD_BITS];
            for (document, &id) in documents.iter_mut().zip(ids) {
                *document = id != 0;
            }
            let mut left = starts & bits(&documents);
            while left != 0 {
                let id = ids[left.trailing_zeros() as usize];
                ascend &= id > highest;
                highest = id;
                left &= left - 1;
            }
        }
        ascend
    }
}

/// What the numbers of a row have.
#[derive(Default)]
struct Seen {
    any_zero: bool,
    /// A number smaller than the one before it.
    any_fall: bool,
}

/// Checks that the tokens of each document of a row lie together.
fn expect_documents_together(row: usize, ids: &[u32]) -> Result<()> {
    let mut documents: Vec<u32> = reserve(ids.len())?;
    documents.extend(ids.chunk_by(|a, b| a == b).filter_map(|document| document.first()).filter(|&&id| id != 0));
    documents.sort_unstable();
    match documents.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(twice) => Err(Error::MaskRow {
            argument: "document_ids",
            row,
            expected: "the tokens of a document together".to_owned(),
            got: format!("document {} in two places", twice[0]),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Documents of any length up to `longest`, of which one in four may be numbered 0.
    fn row(seq: usize, longest: u32, has_zeros: bool, seed: &mut u32) -> Vec<u32> {
        let mut random = || {
            *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *seed >> 8
        };
        let (mut ids, mut id) = (Vec::new(), 0);
        while ids.len() < seq {
            id += 1;
            let number = if has_zeros && random() % 4 == 0 { 0 } else { id };
            ids.extend(std::iter::repeat_n(number, 1 + (random() % longest) as usize));
        }
        ids.truncate(seq);
        ids
    }

    fn naive(ids: &[u32]) -> Vec<[u32; 2]> {
        let of = |i: usize| {
            let first = (0..=i).rev().take_while(|&j| ids[j] == ids[i]).last().unwrap_or(i);
            let end = (i..ids.len()).take_while(|&j| ids[j] == ids[i]).last().unwrap_or(i) + 1;
            if ids[i] == 0 { [0, 0] } else { [first as u32, end as u32] }
        };
        (0..ids.len()).map(of).collect()
    }

    /// Lengths of rows around words and steps, and of documents from one token to some words of them; the
    /// memory of starts goes from row to row.
    #[test]
    fn ranges_are_what_a_walk_over_the_row_says() -> Result<()> {
        let mut seed = 1;
        for seq in [1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 700] {
            let mut documents = Documents::new(seq)?;
            for longest in [1, 2, 3, 9, 70, 400] {
                for has_zeros in [false, true] {
                    let mut ids = row(seq, longest, has_zeros, &mut seed);
                    for reversed in [false, true] {
                        let mut ranges = vec![[u32::MAX; 2]; seq + SPARE];
                        documents.write(0, &ids, &mut ranges)?;
                        assert_eq!(ranges[..seq], naive(&ids), "{ids:?}, {reversed}");
                        ids.reverse();
                    }
                    // The last token's number once more, at another place.
                    let last = ids[seq - 1];
                    if let Some(place) = ids.iter().position(|&id| id != last).filter(|_| last != 0) {
                        ids[place] = last;
                        let together = ids[place..].iter().all(|&id| id == last);
                        let mut ranges = vec![[0; 2]; seq + SPARE];
                        assert_eq!(documents.write(3, &ids, &mut ranges).is_ok(), together, "{ids:?}");
                    }
                }
            }
        }
        Ok(())
    }
}
