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
//! Keys that do not take part are never read. Neither end of the range falls from one query to the
//! next, so a tile of queries needs the keys from the first query's `first` to the last query's
//! `end`.

use std::ops::Range;

use super::host;
use crate::error::Result;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::{CuSeqlens, VarlenMeta};

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
        let mut tokens = host::reserve(mask.total_kept())?;
        let mut rows = host::reserve(mask.batch() + 1)?;
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

/// Which keys of a batch row each of its queries needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct NeededKeys {
    /// Keys of the batch row that take part.
    count: usize,
}

impl NeededKeys {
    pub fn all_of(keys: &Tokens<'_>) -> Self {
        Self { count: keys.len() }
    }

    /// Number of the first key that query `_i` needs. Every query needs every key.
    fn first(self, _i: usize) -> usize {
        0
    }

    /// One past the number of the last key that query `_i` needs.
    fn end(self, _i: usize) -> usize {
        self.count
    }

    /// The keys that some query of a range needs; none for no query.
    pub fn of_tile(self, queries: Range<usize>) -> Range<usize> {
        match queries.end.checked_sub(1) {
            Some(last) if !queries.is_empty() => self.first(queries.start)..self.end(last),
            _ => 0..0,
        }
    }
}
