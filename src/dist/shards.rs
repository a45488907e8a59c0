//! How the tokens of a sequence are divided among ranks.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::host_vec;

/// How S is divided among ranks: a prefix and a suffix that every rank has, and between them one shard for each rank.
///
/// ```text
///    global tokens     prefix │ shard 0 │ shard 1 │ … │ shard P−1 │ suffix        S
///    tokens of rank r  prefix │ shard r │ suffix                                  its local tensor
/// ```
///
/// The order of tokens is always this one. Shards may have any lengths, 0 among them: nothing need divide. Clones share the
/// lengths.
///
/// ```
/// use varlen_fa::dist::Shards;
///
/// let shards = Shards::equal(7, 2)?.with_prefix(3)?;
/// assert_eq!(shards.seq(), 10);
/// assert_eq!([shards.shard(0), shards.shard(1)], [3..7, 7..10]);
/// assert_eq!(shards.local_len(1), 6);
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shards {
    prefix: usize,
    suffix: usize,
    /// Shard r is `cuts[r]..cuts[r + 1]`, counted from the end of the prefix.
    cuts: Arc<Vec<usize>>,
}

impl Shards {
    /// `tokens` tokens in as many shards as there are ranks; where they do not divide, the first shards have one token more.
    ///
    /// # Errors
    /// [`Error::Sharding`] without a rank, [`Error::TooLarge`] if a position does not fit an `i32`, [`Error::OutOfMemory`].
    pub fn equal(tokens: usize, ranks: usize) -> Result<Self> {
        if ranks == 0 {
            return Err(no_ranks("ranks"));
        }
        let (len, longer) = (tokens / ranks, tokens % ranks);
        Self::of((0..ranks).map(|rank| len + usize::from(rank < longer)))
    }

    /// Shards of these lengths, one for each rank.
    ///
    /// # Errors
    /// As [`equal`](Self::equal).
    pub fn from_lengths(lengths: &[usize]) -> Result<Self> {
        if lengths.is_empty() {
            return Err(no_ranks("lengths"));
        }
        Self::of(lengths.iter().copied())
    }

    fn of(lengths: impl ExactSizeIterator<Item = usize>) -> Result<Self> {
        let mut cuts = host_vec::reserve(lengths.len() + 1)?;
        let mut end = 0_usize;
        cuts.push(0);
        for length in lengths {
            end = end.saturating_add(length);
            cuts.push(end);
        }
        Self { prefix: 0, suffix: 0, cuts: Arc::new(cuts) }.checked()
    }

    /// With a prefix of so many tokens, which every rank has: the text of a joint layer.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn with_prefix(self, prefix: usize) -> Result<Self> {
        Self { prefix, ..self }.checked()
    }

    /// With a suffix of so many tokens, which every rank has.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn with_suffix(self, suffix: usize) -> Result<Self> {
        Self { suffix, ..self }.checked()
    }

    /// Positions fit an `i32`, as those of masks do.
    fn checked(self) -> Result<Self> {
        let limit = i32::MAX as u64;
        let got = self.prefix.saturating_add(self.sharded()).saturating_add(self.suffix) as u64;
        if got > limit {
            return Err(Error::TooLarge { argument: "shards", limit_name: "an i32 of the sequence", limit, got });
        }
        Ok(self)
    }

    /// Number of ranks, P.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.cuts.len() - 1
    }

    /// Tokens of the whole sequence, S.
    #[must_use]
    pub fn seq(&self) -> usize {
        self.prefix + self.sharded() + self.suffix
    }

    /// Tokens of the prefix.
    #[must_use]
    pub fn prefix(&self) -> usize {
        self.prefix
    }

    /// Tokens of the suffix.
    #[must_use]
    pub fn suffix(&self) -> usize {
        self.suffix
    }

    /// Global positions of a rank's shard; empty if there is no such rank.
    #[must_use]
    pub fn shard(&self, rank: usize) -> Range<usize> {
        self.shards_of(&(rank..rank.saturating_add(1)))
    }

    /// Tokens of a rank's local tensors: prefix, shard and suffix.
    #[must_use]
    pub fn local_len(&self, rank: usize) -> usize {
        self.prefix + self.shard(rank).len() + self.suffix
    }

    /// Global positions of the shards of consecutive ranks.
    pub(super) fn shards_of(&self, ranks: &Range<usize>) -> Range<usize> {
        let at = |rank: usize| self.prefix + self.cuts.get(rank).copied().unwrap_or(self.sharded());
        at(ranks.start)..at(ranks.end)
    }

    /// The lengths of the shards.
    pub(super) fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.cuts.windows(2).map(|cut| cut[1] - cut[0])
    }

    fn sharded(&self) -> usize {
        self.cuts.last().copied().unwrap_or(0)
    }
}

fn no_ranks(argument: &'static str) -> Error {
    Error::Sharding { argument, expected: "at least one rank".to_owned(), got: "none".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_need_divide() -> Result<()> {
        let shards = Shards::equal(7, 4)?.with_prefix(2)?.with_suffix(1)?;
        assert_eq!(shards.lengths().collect::<Vec<_>>(), [2, 2, 2, 1]);
        assert_eq!((0..4).map(|rank| shards.shard(rank)).collect::<Vec<_>>(), [2..4, 4..6, 6..8, 8..9]);
        assert_eq!((shards.seq(), shards.local_len(3), shards.ranks()), (10, 4, 4));
        assert_eq!(shards.shards_of(&(1..3)), 4..8);
        // Fewer tokens than ranks.
        let few = Shards::equal(2, 3)?;
        assert_eq!((0..3).map(|rank| few.shard(rank).len()).collect::<Vec<_>>(), [1, 1, 0]);
        assert!(few.shard(3).is_empty() && few.shard(usize::MAX).is_empty());
        Ok(())
    }

    #[test]
    fn bad_cuts_are_errors() {
        assert!(matches!(Shards::equal(7, 0), Err(Error::Sharding { argument: "ranks", .. })));
        assert!(matches!(Shards::from_lengths(&[]), Err(Error::Sharding { argument: "lengths", .. })));
        assert!(matches!(Shards::from_lengths(&[usize::MAX, usize::MAX]), Err(Error::TooLarge { .. })));
        let prefix = Shards::equal(1, 1).and_then(|shards| shards.with_prefix(usize::MAX));
        assert!(matches!(prefix, Err(Error::TooLarge { argument: "shards", .. })));
        let suffix = Shards::equal(1, 1).and_then(|shards| shards.with_suffix(i32::MAX as usize));
        assert!(matches!(suffix, Err(Error::TooLarge { .. })));
    }
}
