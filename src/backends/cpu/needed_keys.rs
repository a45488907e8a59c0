//! Which tokens of each batch row take part in a call, and which keys a tile of queries needs.
//!
//! ```text
//!    tokens of a batch row      0  1  2  3  4  5  6  7  8  9
//!    key mask                   x  .  x  x  .  .  x  .  .  x
//!    keys that take part        0     1  2        3        4    numbered in order
//!
//!    query i needs the keys     first(i) <= j < end(i)           of those that take part
//! ```
//!
//! Keys that do not take part are never read. A tile of queries reads the keys from the smallest
//! `first` to the largest `end` of its queries.

use std::ops::Range;

use crate::error::Result;
use crate::host_vec;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_mask::KeyMask;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;
use crate::mask::ranks::Ranks;

/// Which tokens of each batch row take part.
pub(super) enum Sequences<'a> {
    /// All of as many.
    Whole(usize),
    Valid {
        meta: &'a VarlenMeta,
        /// The metadata's.
        indices: &'a [u32],
    },
    Packed(&'a CuSeqlens),
    Kept(KeptTokens),
}

impl<'a> Sequences<'a> {
    /// The valid tokens.
    pub fn valid(meta: &'a VarlenMeta) -> Result<Self> {
        Ok(Self::Valid { meta, indices: meta.indices()? })
    }

    /// The tokens that a mask keeps.
    pub fn kept(mask: &KeyMask) -> Result<Self> {
        KeptTokens::of(mask).map(Self::Kept)
    }

    pub fn of(&self, b: usize) -> Tokens<'_> {
        match self {
            Self::Whole(len) => Tokens::Range(0..*len),
            Self::Valid { meta, indices } => {
                Tokens::Listed { indices: &indices[meta.cu_seqlens().rows(b)], before: b * meta.seq() }
            }
            Self::Packed(cu_seqlens) => Tokens::Range(cu_seqlens.rows(b)),
            Self::Kept(kept) => Tokens::Listed { indices: kept.row(b), before: 0 },
        }
    }
}

/// The kept tokens of a mask.
pub(super) struct KeptTokens {
    tokens: Vec<u32>,
    /// Tokens of row `b` are `tokens[rows[b]..rows[b + 1]]`.
    rows: Vec<usize>,
}

impl KeptTokens {
    fn of(mask: &KeyMask) -> Result<Self> {
        let mut tokens = host_vec::reserve(mask.total_kept())?;
        let mut rows = host_vec::reserve(mask.batch() + 1)?;
        rows.push(0);
        for b in 0..mask.batch() {
            mask.runs(b).for_each(|run| tokens.extend(run.start..run.start + run.len));
            rows.push(tokens.len());
        }
        Ok(Self { tokens, rows })
    }

    fn row(&self, b: usize) -> &[u32] {
        &self.tokens[self.rows[b]..self.rows[b + 1]]
    }
}

/// The tokens of one batch row that take part, in order.
pub(super) enum Tokens<'a> {
    Range(Range<usize>),
    /// `indices[i] - before`
    Listed {
        indices: &'a [u32],
        before: usize,
    },
}

impl Tokens<'_> {
    pub fn len(&self) -> usize {
        match self {
            Self::Range(range) => range.len(),
            Self::Listed { indices, .. } => indices.len(),
        }
    }

    #[inline(always)]
    pub fn at(&self, i: usize) -> usize {
        match self {
            Self::Range(range) => range.start + i,
            Self::Listed { indices, before } => indices[i] as usize - before,
        }
    }

    /// Whether the tokens follow one another without a gap.
    pub fn is_range(&self) -> bool {
        matches!(self, Self::Range(_))
    }
}

/// Which keys of its batch row each query needs.
pub(super) struct NeededKeys<'a> {
    /// All of them where there are none.
    ranges: Option<&'a KeyRanges>,
    /// Turn positions of padded keys to numbers of those that take part; none where both are the
    /// same.
    ranks: Option<Ranks<'a>>,
}

impl<'a> NeededKeys<'a> {
    /// `key_mask` says which of the padded keys take part.
    pub fn new(ranges: Option<&'a KeyRanges>, key_mask: Option<&'a KeyMask>) -> Result<Self> {
        let ranks = match (ranges, key_mask) {
            (Some(_), Some(mask)) => Some(Ranks::new(mask)?),
            _ => None,
        };
        Ok(Self { ranges, ranks })
    }

    /// Whether queries may need different keys.
    pub fn differ(&self) -> bool {
        self.ranges.is_some()
    }

    /// The keys, numbered in order, that a query of batch row `b` needs, of the `count` that take
    /// part; the query is a token of the padded row or a packed row.
    #[inline]
    pub fn of_query(&self, b: usize, token: usize, count: usize) -> Range<usize> {
        let Some(ranges) = self.ranges else { return 0..count };
        let range = ranges.of_token(b, token);
        let [first, end] = match &self.ranks {
            Some(ranks) => range.map(|position| ranks.of(b, position)),
            None => range,
        };
        first as usize..end as usize
    }
}
