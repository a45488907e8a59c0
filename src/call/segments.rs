//! Tensors that come in segments: parts along S, each in memory of its own. One tensor is one
//! segment; nothing is allocated for it.

use crate::error::{Error, Result};

/// Segments of one tensor or one call, at most.
pub(crate) const MAX_SEGMENTS: usize = 8;

/// One tensor `[B, S, H, D]`, or several `[B, S_i, H, D]` that stand for it, one after another
/// along S.
#[derive(Debug, Clone)]
pub(crate) enum Segmented<T> {
    One(T),
    /// Never one; none at all until the call is checked.
    Several(Vec<T>),
}

impl<T> Segmented<T> {
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(segment) => std::slice::from_ref(segment),
            Self::Several(segments) => segments,
        }
    }

    pub fn len(&self) -> usize {
        self.as_slice().len()
    }

    pub fn iter(&self) -> std::slice::Iter<'_, T> {
        self.as_slice().iter()
    }

    /// The tensor, where a call takes no segments.
    ///
    /// # Errors
    /// [`Error::SegmentCount`] if there are several.
    pub fn whole(&self, argument: &'static str) -> Result<&T> {
        match self {
            Self::One(segment) => Ok(segment),
            Self::Several(segments) => Err(Error::SegmentCount { argument, limit: 1, got: segments.len() }),
        }
    }

    pub fn map<U>(self, mut map: impl FnMut(T) -> U) -> Segmented<U> {
        match self {
            Self::One(segment) => Segmented::One(map(segment)),
            Self::Several(segments) => Segmented::Several(segments.into_iter().map(map).collect()),
        }
    }

    pub fn try_map<U>(self, mut map: impl FnMut(T) -> Result<U>) -> Result<Segmented<U>> {
        Ok(match self {
            Self::One(segment) => Segmented::One(map(segment)?),
            Self::Several(segments) => Segmented::Several(segments.into_iter().map(map).collect::<Result<_>>()?),
        })
    }

    pub fn each_ref(&self) -> Segmented<&T> {
        match self {
            Self::One(segment) => Segmented::One(segment),
            Self::Several(segments) => Segmented::Several(segments.iter().collect()),
        }
    }

    pub fn try_for_each(self, mut run: impl FnMut(T) -> Result<()>) -> Result<()> {
        match self {
            Self::One(segment) => run(segment),
            Self::Several(segments) => segments.into_iter().try_for_each(run),
        }
    }
}

impl<T> FromIterator<T> for Segmented<T> {
    /// A list of one is one tensor, so that it is the same call.
    fn from_iter<I: IntoIterator<Item = T>>(segments: I) -> Self {
        let mut segments = segments.into_iter();
        match (segments.next(), segments.next()) {
            (Some(first), None) => Self::One(first),
            (first, second) => Self::Several(first.into_iter().chain(second).chain(segments).collect()),
        }
    }
}

/// How the tensors of a call are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cuts {
    /// Each is one segment.
    None,
    /// q and the output together into at most [`MAX_SEGMENTS`] pieces, and k and v.
    Few,
    /// Into more, since they are cut at different places.
    Many,
}

impl Cuts {
    /// By the lengths of segments: pairs of tensors that have the same tokens.
    pub fn of(pairs: [[&[usize]; 2]; 2]) -> Self {
        if pairs.iter().flatten().all(|lengths| lengths.len() == 1) {
            return Self::None;
        }
        let is_few = |pair: &[&[usize]; 2]| common_ends(*pair).len() <= MAX_SEGMENTS;
        if pairs.iter().all(is_few) { Self::Few } else { Self::Many }
    }
}

/// The ends of the pieces, counted over all, into which two tensors of the same tokens are cut
/// together. No piece is empty.
pub(crate) fn common_ends(pair: [&[usize]; 2]) -> Vec<usize> {
    let ends_of = |lengths: &[usize]| {
        let mut end = 0;
        lengths
            .iter()
            .map(|length| {
                end += length;
                end
            })
            .collect::<Vec<_>>()
    };
    let mut ends: Vec<usize> = pair.into_iter().flat_map(ends_of).filter(|&end| end > 0).collect();
    ends.sort_unstable();
    ends.dedup();
    ends
}

/// A tensor of an attention call that may come in segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Q,
    K,
    V,
    Out,
}

impl Role {
    /// What errors call the whole.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
            Self::Out => "out",
        }
    }

    /// What errors call segment `index` of `count`: the whole, if it is the only one.
    pub fn segment_name(self, index: usize, count: usize) -> &'static str {
        let Some(names) = SEGMENT_NAMES.get(index).filter(|_| count != 1) else { return self.name() };
        match self {
            Self::Q => names.q,
            Self::K => names.k,
            Self::V => names.v,
            Self::Out => names.out,
        }
    }
}

/// What errors call the arguments of a segment.
#[derive(Debug)]
pub(crate) struct SegmentNames {
    pub q: &'static str,
    pub k: &'static str,
    pub v: &'static str,
    pub out: &'static str,
    pub q_out: &'static str,
    pub k_out: &'static str,
    pub q_weight: &'static str,
    pub k_weight: &'static str,
    pub eps: &'static str,
    pub cos: &'static str,
    pub sin: &'static str,
}

macro_rules! segment_names {
    ($($index:literal)*) => {
        /// Of each segment.
        pub(crate) static SEGMENT_NAMES: [SegmentNames; MAX_SEGMENTS] = [$(SegmentNames {
            q: concat!("segments[", $index, "].q"),
            k: concat!("segments[", $index, "].k"),
            v: concat!("segments[", $index, "].v"),
            out: concat!("segments[", $index, "].out"),
            q_out: concat!("segments[", $index, "].q_out"),
            k_out: concat!("segments[", $index, "].k_out"),
            q_weight: concat!("segments[", $index, "].q_weight"),
            k_weight: concat!("segments[", $index, "].k_weight"),
            eps: concat!("segments[", $index, "].eps"),
            cos: concat!("segments[", $index, "].cos"),
            sin: concat!("segments[", $index, "].sin"),
        }),*];
    };
}
segment_names!(0 1 2 3 4 5 6 7);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_that_are_cut_at_different_places_are_cut_at_all_of_them() {
        assert_eq!(common_ends([&[3, 5], &[8]]), [3, 8]);
        assert_eq!(common_ends([&[0, 3, 0, 5], &[4, 4, 0]]), [3, 4, 8]);
        assert_eq!(common_ends([&[0], &[0, 0]]), [0; 0]);
        let ones = [1; MAX_SEGMENTS];
        assert_eq!(Cuts::of([[&[8], &[8]], [&[9], &[9]]]), Cuts::None);
        assert_eq!(Cuts::of([[&[8], &ones], [&[9], &[9]]]), Cuts::Few);
        assert_eq!(Cuts::of([[&ones, &ones], [&[4, 5], &[4, 5]]]), Cuts::Few);
        assert_eq!(Cuts::of([[&[8], &[8]], [&[3, 2, 2, 2], &[1, 3, 2, 2, 1]]]), Cuts::Few);
        assert_eq!(Cuts::of([[&[8], &[8]], [&[3, 2, 2, 2, 2], &[1, 3, 2, 2, 2, 1]]]), Cuts::Many);
    }
}
