//! What a rank knows of a masked sequence that is divided among ranks: [`ShardedMeta`].

use std::ops::Range;

use super::digest::Digest;
use super::shards::Shards;
use crate::error::{Error, Result};
use crate::host_vec;
use crate::mask::key_mask::KeyMask;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;

/// Metadata of a masked sequence that is divided among ranks, as one of them sees it. Every rank makes it once per request from the
/// mask of the *whole* sequence, which is one bit a token; nothing is sent.
///
/// ```
/// use varlen_fa::KeyMask;
/// use varlen_fa::dist::{ShardedMeta, Shards};
///
/// // Two texts of 3 and 1 tokens, padded to 3, before an image of 5 tokens on two ranks.
/// let mask = KeyMask::from_runs(8, &[vec![0..8], vec![0..1, 3..8]])?;
/// let shards = Shards::equal(5, 2)?.with_prefix(3)?;
/// let meta = ShardedMeta::new(&mask, &shards, 1)?;
/// assert_eq!(meta.query().seq(), 3 + 2); // the local tensor: the text and the second shard
/// assert_eq!(meta.keys().total_valid(), 8 + 6); // all keys
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ShardedMeta {
    shards: Shards,
    rank: usize,
    keys: VarlenMeta,
    query: VarlenMeta,
    ranges: Option<KeyRanges>,
}

/// Global positions of a tensor's tokens, in order: prefix, some shards, suffix, of which any may be missing.
pub(super) type Pieces = [Range<usize>; 3];

impl ShardedMeta {
    /// `mask`: `[B, S]` of the whole sequence, the same on every rank, where S is [`Shards::seq`]. `rank`: this rank.
    ///
    /// # Errors
    /// [`Error::MaskSize`] for a mask of another S, [`Error::Sharding`] for a rank that the shards have not,
    /// [`Error::OutOfMemory`].
    pub fn new(mask: &KeyMask, shards: &Shards, rank: usize) -> Result<Self> {
        let expected = [mask.batch(), shards.seq()];
        if mask.seq() != shards.seq() {
            return Err(Error::MaskSize { argument: "mask", expected, got: [mask.batch(), mask.seq()] });
        }
        if rank >= shards.ranks() {
            let expected = format!("a rank below {}, the number of shards", shards.ranks());
            return Err(Error::Sharding { argument: "rank", expected, got: rank.to_string() });
        }
        let query = cut_mask(mask, &local_pieces(shards, &(rank..rank + 1)))?;
        Ok(Self { shards: shards.clone(), rank, keys: VarlenMeta::from_key_mask(mask)?, query, ranges: None })
    }

    /// With ranges of keys, of the whole sequence: `[B, S, S]`, the same on every rank. Causal masks, windows and documents.
    ///
    /// # Errors
    /// [`Error::RangesSize`].
    pub fn with_ranges(self, ranges: &KeyRanges) -> Result<Self> {
        ranges.expect_padded(self.batch(), self.shards.seq(), self.shards.seq())?;
        Ok(Self { ranges: Some(ranges.clone()), ..self })
    }

    /// How the sequence is divided.
    #[must_use]
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// This rank.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of batch rows, B.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.keys.batch()
    }

    /// Of this rank's tokens: `[B, prefix + shard + suffix]`.
    #[must_use]
    pub fn query(&self) -> &VarlenMeta {
        &self.query
    }

    /// Of all tokens: `[B, S]`.
    #[must_use]
    pub fn keys(&self) -> &VarlenMeta {
        &self.keys
    }

    /// The ranges of the whole sequence, if there are any.
    #[must_use]
    pub fn ranges(&self) -> Option<&KeyRanges> {
        self.ranges.as_ref()
    }

    /// Of the tokens of a rank's shard, without prefix and suffix: `[B, length of the shard]`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn keys_of(&self, rank: usize) -> Result<VarlenMeta> {
        self.cut(&[0..0, self.shards.shard(rank), 0..0])
    }

    /// Of the tokens of some pieces, one after another.
    pub(super) fn cut(&self, pieces: &Pieces) -> Result<VarlenMeta> {
        cut_mask(self.keys.key_mask(), pieces)
    }

    /// The tokens of the local tensors of consecutive ranks, together.
    pub(super) fn local(&self, ranks: &Range<usize>) -> Pieces {
        local_pieces(&self.shards, ranks)
    }

    /// The tokens of the shards of consecutive ranks.
    pub(super) fn sharded(&self, ranks: &Range<usize>) -> Pieces {
        [0..0, self.shards.shards_of(ranks), 0..0]
    }

    /// The ranges for queries of some pieces and keys of others, in positions of those.
    pub(super) fn cut_ranges(&self, queries: &Pieces, keys: &Pieces) -> Result<Option<KeyRanges>> {
        let Some(ranges) = &self.ranges else { return Ok(None) };
        let len = |pieces: &Pieces| pieces.iter().map(Range::len).sum::<usize>();
        let place = |position: u32| -> usize {
            let before = |piece: &Range<usize>| (position as usize).clamp(piece.start, piece.end) - piece.start;
            keys.iter().map(before).sum()
        };
        let mut cut = host_vec::reserve(self.batch() * len(queries))?;
        for row in 0..self.batch() {
            let row = ranges.row(row);
            for piece in queries {
                cut.extend(row[piece.clone()].iter().map(|range| range.map(place)));
            }
        }
        KeyRanges::from_ranges([self.batch(), len(queries), len(keys)], &cut).map(Some)
    }

    /// Adds up all that must be the same on every rank.
    pub(super) fn digest(&self, digest: Digest) -> Digest {
        let Self { shards, keys, ranges, .. } = self;
        let digest = digest
            .sizes([self.batch(), shards.prefix(), shards.suffix()])
            .sizes(shards.lengths())
            .bytes(&little_endian(keys.key_mask().words()));
        let Some(ranges) = ranges else { return digest.sizes([]) };
        (0..ranges.distinct_rows()).fold(digest, |digest, row| {
            digest.sizes(ranges.row(row).iter().flat_map(|range| range.map(|position| position as usize)))
        })
    }
}

fn little_endian(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn local_pieces(shards: &Shards, ranks: &Range<usize>) -> Pieces {
    let seq = shards.seq();
    [0..shards.prefix(), shards.shards_of(ranks), seq - shards.suffix()..seq]
}

impl VarlenMeta {
    /// Of as many tokens, but only those valid that lie in some pieces.
    pub(super) fn among(&self, pieces: &[Range<usize>]) -> Result<Self> {
        let rows = (0..self.batch()).flat_map(|row| self.runs(row).iter().map(move |run| (row, run.range())));
        let runs = rows.flat_map(|(row, run)| {
            pieces.iter().filter_map(move |piece| {
                let (start, end) = (run.start.max(piece.start), run.end.min(piece.end));
                (start < end).then_some((row, start..end))
            })
        });
        Self::from_key_mask(&KeyMask::from_row_runs(self.batch(), self.seq(), runs)?)
    }
}

fn cut_mask(mask: &KeyMask, pieces: &Pieces) -> Result<VarlenMeta> {
    let mut offset = 0;
    let placed = pieces.each_ref().map(|piece| {
        let at = offset;
        offset += piece.len();
        (piece.clone(), at)
    });
    let rows = (0..mask.batch()).flat_map(|row| mask.runs(row).map(move |run| (row, run.range())));
    let runs = rows.flat_map(|(row, run)| {
        placed.iter().filter_map(move |(piece, at)| {
            let (start, end) = (run.start.max(piece.start), run.end.min(piece.end));
            (start < end).then(|| (row, start - piece.start + at..end - piece.start + at))
        })
    });
    VarlenMeta::from_key_mask(&KeyMask::from_row_runs(mask.batch(), offset, runs)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every token of every rank, by a walk.
    #[test]
    fn each_rank_has_its_part_of_the_mask() -> Result<()> {
        let (batch, prefix, lengths, suffix) = (3, 5, [4_usize, 0, 70, 9], 2);
        let shards = Shards::from_lengths(&lengths)?.with_prefix(prefix)?.with_suffix(suffix)?;
        let seq = shards.seq();
        let keep: Vec<bool> = (0..batch * seq).map(|at| at % 3 != 0 && at % 7 != 2 && at / seq != 1).collect();
        let mask = KeyMask::from_bool(batch, seq, &keep)?;
        for rank in 0..4 {
            let meta = ShardedMeta::new(&mask, &shards, rank)?;
            let local: Vec<usize> = (0..prefix).chain(shards.shard(rank)).chain(seq - suffix..seq).collect();
            assert_eq!(meta.query().seq(), local.len());
            for row in 0..batch {
                for (at, &global) in local.iter().enumerate() {
                    assert_eq!(meta.query().key_mask().keeps(row, at), keep[row * seq + global], "{rank} {row} {at}");
                }
                for (at, global) in shards.shard(rank).enumerate() {
                    assert_eq!(meta.keys_of(rank)?.key_mask().keeps(row, at), keep[row * seq + global]);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn ranges_keep_what_each_query_sees() -> Result<()> {
        let shards = Shards::from_lengths(&[4, 3])?.with_prefix(2)?.with_suffix(3)?;
        let seq = shards.seq();
        let meta = ShardedMeta::new(&KeyMask::all(1, seq)?, &shards, 1)?;
        let window = KeyRanges::window([1, seq, seq], Some(4), Some(3))?;
        let meta = meta.with_ranges(&window)?;
        let (queries, keys) = (meta.local(&(1..2)), meta.local(&(0..1)));
        let tokens = |pieces: &Pieces| pieces.iter().cloned().flatten().collect::<Vec<_>>();
        let cut = meta.cut_ranges(&queries, &keys)?;
        let cut = cut.as_ref().map(|ranges| ranges.row(0)).unwrap_or_default();
        assert_eq!(cut.len(), 8);
        for (&[first, end], query) in cut.iter().zip(tokens(&queries)) {
            for (at, key) in tokens(&keys).into_iter().enumerate() {
                let sees = key + 4 >= query && key <= query + 3;
                assert_eq!((first as usize..end as usize).contains(&at), sees, "query {query}, key {key}");
            }
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() -> Result<()> {
        let shards = Shards::equal(6, 2)?;
        let mask = KeyMask::all(1, 7)?;
        assert!(matches!(ShardedMeta::new(&mask, &shards, 0), Err(Error::MaskSize { got: [1, 7], .. })));
        let mask = KeyMask::all(1, 6)?;
        assert!(matches!(ShardedMeta::new(&mask, &shards, 2), Err(Error::Sharding { argument: "rank", .. })));
        let meta = ShardedMeta::new(&mask, &shards, 1)?;
        assert!(matches!(meta.with_ranges(&KeyRanges::causal([1, 3, 6])?), Err(Error::RangesSize { .. })));
        Ok(())
    }

    #[test]
    fn the_digest_is_of_all_that_ranks_share() -> Result<()> {
        let shards = Shards::equal(6, 2)?;
        let tag = |mask: &KeyMask, shards: &Shards, rank| -> Result<_> {
            Ok(ShardedMeta::new(mask, shards, rank)?.digest(Digest::new()).tag())
        };
        let mask = KeyMask::from_lengths(6, &[5])?;
        let tag0 = tag(&mask, &shards, 0)?;
        assert_eq!(tag0, tag(&mask, &shards, 1)?);
        assert_ne!(tag0, tag(&KeyMask::from_lengths(6, &[4])?, &shards, 0)?);
        assert_ne!(tag0, tag(&mask, &Shards::from_lengths(&[2, 4])?, 0)?);
        assert_ne!(tag0, tag(&mask, &Shards::equal(5, 2)?.with_prefix(1)?, 0)?);
        let causal = ShardedMeta::new(&mask, &shards, 0)?.with_ranges(&KeyRanges::causal([1, 6, 6])?)?;
        assert_ne!(tag0, causal.digest(Digest::new()).tag());
        Ok(())
    }
}
