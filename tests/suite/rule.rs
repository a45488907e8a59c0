//! Rules of which keys a query sees, and the key ranges of the library that say the same.

use anyhow::Result;
use varlen_fa::{KeyRanges, RangesOf};

/// Which keys a query sees, in the tests' own words: a boolean for each pair.
#[derive(Debug, Clone)]
pub enum Rule {
    /// Up to the query's own place, counted from the end.
    Causal,
    /// As many keys before and after the query's own place, counted from the end.
    Window(Option<usize>, Option<usize>),
    /// The first keys, and the others as in `Causal`.
    Prefix(usize),
    /// `[B, S]` numbers: keys of the same document; 0 is none.
    Documents(Vec<u32>),
    /// `[first, end)` of each query, `[B, Sq]`.
    Own(Vec<[usize; 2]>),
    /// What both allow.
    Both(Box<Self>, Box<Self>),
}

impl Rule {
    /// Whether query i of batch row b sees key j.
    pub fn sees(&self, b: usize, i: usize, j: usize, [seq_q, seq_k]: [usize; 2]) -> bool {
        let distance = j as i64 - (i as i64 + seq_k as i64 - seq_q as i64);
        match self {
            Self::Causal => distance <= 0,
            Self::Window(left, right) => {
                left.is_none_or(|left| -distance <= left as i64) && right.is_none_or(|right| distance <= right as i64)
            }
            Self::Prefix(count) => j < *count || distance <= 0,
            Self::Documents(ids) => ids[b * seq_k + i] != 0 && ids[b * seq_k + i] == ids[b * seq_k + j],
            Self::Own(ranges) => (ranges[b * seq_q + i][0]..ranges[b * seq_q + i][1]).contains(&j),
            Self::Both(one, other) => [one, other].iter().all(|rule| rule.sees(b, i, j, [seq_q, seq_k])),
        }
    }

    /// The library's form of it.
    pub fn ranges(&self, of: &RangesOf) -> Result<KeyRanges> {
        Ok(match self {
            Self::Causal => KeyRanges::causal(of.clone())?,
            &Self::Window(left, right) => KeyRanges::window(of.clone(), left, right)?,
            &Self::Prefix(count) => KeyRanges::prefix(of.clone(), count)?,
            Self::Documents(ids) => match of {
                &RangesOf::Padded { batch, seq_k, .. } => KeyRanges::from_document_ids(batch, seq_k, ids)?,
                _ => anyhow::bail!("documents are of padded tensors"),
            },
            Self::Own(ranges) => KeyRanges::from_ranges(of.clone(), ranges)?,
            Self::Both(one, other) => one.ranges(of)?.intersect(&other.ranges(of)?)?,
        })
    }

    /// What both allow.
    pub fn and(self, other: Self) -> Self {
        Self::Both(Box::new(self), Box::new(other))
    }
}
