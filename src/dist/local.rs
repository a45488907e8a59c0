//! A rank's own tensors: prefix, shard and suffix, in one tensor or in segments.

use std::ops::Range;

use super::kept::{Lent, Room};
use super::transfer::copy_rows;
use crate::error::{Error, Result};
use crate::mask::meta::VarlenMeta;
use crate::tensor::{Segments, SegmentsMut, TensorView, TensorViewMut};

/// Tokens of prefix, shards and suffix.
pub(super) type Lengths = [usize; 3];

/// A tensor to read, `[B, prefix + shard + suffix, h, D]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Local<'a> {
    /// All of it, if it came so.
    whole: Option<TensorView<'a>>,
    parts: [TensorView<'a>; 3],
}

/// A tensor to write, of the same form.
#[derive(Debug)]
pub(super) struct LocalMut<'a> {
    segments: Vec<TensorViewMut<'a>>,
    /// For each of prefix, shard and suffix the segment, and where in it.
    parts: [(usize, Range<usize>); 3],
}

/// Where prefix, shards and suffix lie in a tensor.
pub(super) fn places([prefix, shards, suffix]: Lengths) -> [Range<usize>; 3] {
    let (first, second) = (prefix, prefix + shards);
    [0..first, first..second, second..second + suffix]
}

/// For each of prefix, shard and suffix the segment that it lies in, and where. `segments` are the lengths of those that follow one
/// another, as many tokens as there are.
fn cut(argument: &'static str, segments: &[usize], lengths: Lengths) -> Result<[(usize, Range<usize>); 3]> {
    let mut found = [const { (0, 0..0) }; 3];
    for (found, place) in found.iter_mut().zip(places(lengths)) {
        let mut start = 0;
        for (at, &length) in segments.iter().enumerate() {
            let end = start + length;
            if place.end <= end && (place.start < end || place.is_empty()) {
                *found = (at, place.start - start..place.end - start);
                break;
            }
            if place.start < end {
                let [prefix, shards, suffix] = lengths;
                return Err(Error::NotApplicable {
                    argument,
                    got: format!("segments of {segments:?} tokens"),
                    why: format!(
                        "segments of a rank's tensors meet where prefix, shard and suffix do, which have {prefix}, {shards} and \
                         {suffix} tokens"
                    ),
                });
            }
            start = end;
        }
    }
    Ok(found)
}

impl<'a> Local<'a> {
    /// `segments`, checked to be of as many tokens.
    pub(super) fn new(argument: &'static str, segments: &Segments<'a>, lengths: Lengths) -> Result<Self> {
        let views = segments.views();
        if let [view] = views {
            return Self::of_whole(*view, lengths);
        }
        let of_each: Vec<usize> = views.iter().map(|view| view.shape()[1]).collect();
        let [prefix, shard, suffix] = cut(argument, &of_each, lengths)?.map(|(at, place)| views[at].slice(1, place));
        Ok(Self { whole: None, parts: [prefix?, shard?, suffix?] })
    }

    pub(super) fn of_whole(view: TensorView<'a>, lengths: Lengths) -> Result<Self> {
        let [prefix, shard, suffix] = places(lengths).map(|place| view.slice(1, place));
        Ok(Self { whole: Some(view), parts: [prefix?, shard?, suffix?] })
    }

    /// Prefix, shard and suffix.
    pub(super) fn parts(&self) -> &[TensorView<'a>; 3] {
        &self.parts
    }

    /// Some of the heads.
    pub(super) fn heads(&self, heads: &Range<usize>) -> Result<Self> {
        let whole = self.whole.map(|whole| whole.slice(2, heads.clone())).transpose()?;
        let [prefix, shard, suffix] = self.parts.map(|part| part.slice(2, heads.clone()));
        Ok(Self { whole, parts: [prefix?, shard?, suffix?] })
    }

    /// As a call takes it.
    pub(super) fn segments(&self) -> Segments<'a> {
        match self.whole {
            Some(whole) => whole.into(),
            None => self.parts.iter().copied().collect(),
        }
    }

    /// One tensor: a copy if it came in segments. `metas` are of prefix, shard and suffix; what the copy's rows of masked tokens
    /// hold is not specified.
    pub(super) fn joined<'k>(&self, room: Room<'k>, metas: [&VarlenMeta; 3]) -> Result<Joined<'a, 'k>> {
        if let Some(whole) = self.whole {
            return Ok(Joined::View(whole));
        }
        let [batch, _, heads, dim] = self.parts[0].shape() else { return Ok(Joined::View(self.parts[0])) };
        let lengths = metas.map(VarlenMeta::seq);
        let shape = [*batch, lengths.iter().sum(), *heads, *dim];
        let mut joined = room.tensor(self.parts[0].dtype(), &shape)?;
        for ((part, meta), place) in self.parts.iter().zip(metas).zip(places(lengths)) {
            copy_rows(room, *part, meta, joined.view_mut().slice(1, place)?)?;
        }
        Ok(Joined::Copy(joined))
    }
}

/// A rank's tensor in one piece.
#[derive(Debug)]
pub(super) enum Joined<'a, 'k> {
    View(TensorView<'a>),
    Copy(Lent<'k>),
}

impl Joined<'_, '_> {
    pub(super) fn view(&self) -> TensorView<'_> {
        match self {
            Self::View(view) => *view,
            Self::Copy(tensor) => tensor.view(),
        }
    }
}

impl<'a> LocalMut<'a> {
    /// `segments`, checked to be of as many tokens.
    pub(super) fn new(argument: &'static str, segments: SegmentsMut<'a>, lengths: Lengths) -> Result<Self> {
        let segments: Vec<_> = segments.into_views();
        let of_each: Vec<usize> = segments.iter().map(|view| view.shape()[1]).collect();
        Ok(Self { parts: cut(argument, &of_each, lengths)?, segments })
    }

    pub(super) fn of_whole(view: TensorViewMut<'a>, lengths: Lengths) -> Self {
        Self { segments: vec![view], parts: places(lengths).map(|place| (0, place)) }
    }

    /// The tensor, if it is one.
    pub(super) fn whole(&mut self) -> Option<TensorViewMut<'_>> {
        match &mut self.segments[..] {
            [whole] => Some(whole.reborrow()),
            _ => None,
        }
    }

    /// Prefix, shard or suffix.
    pub(super) fn part(&mut self, at: usize) -> Result<TensorViewMut<'_>> {
        let (segment, place) = &self.parts[at];
        self.segments[*segment].reborrow().slice(1, place.clone())
    }

    /// Some of the heads, as a call takes them.
    pub(super) fn heads(&mut self, heads: &Range<usize>) -> Result<SegmentsMut<'_>> {
        self.segments.iter_mut().map(|segment| segment.reborrow().slice(2, heads.clone())).collect()
    }

    /// Some heads of prefix, shard and suffix at once, as far as there are tokens; nothing where the host would have to write two of
    /// them through one view.
    pub(super) fn apart(&mut self, heads: &Range<usize>) -> Result<Option<[Option<TensorViewMut<'_>>; 3]>> {
        let mut found = [None, None, None];
        for (at, segment) in self.segments.iter_mut().enumerate() {
            let of_segment = self.parts.iter().enumerate().filter(|(_, part)| part.0 == at && !part.1.is_empty());
            let wanted: Vec<_> = of_segment.collect();
            let view = segment.reborrow().slice(2, heads.clone())?;
            let Some((&(last, (_, place)), others)) = wanted.split_last() else { continue };
            for (part, (_, place)) in others {
                let Some(alias) = view.alias() else { return Ok(None) };
                found[*part] = Some(alias.slice(1, place.clone())?);
            }
            found[last] = Some(view.slice(1, place.clone())?);
        }
        Ok(Some(found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_meet_where_parts_do() -> Result<()> {
        let one = cut("q", &[9], [3, 4, 2])?;
        assert_eq!(one, [(0, 0..3), (0, 3..7), (0, 7..9)]);
        assert_eq!(cut("q", &[3, 4, 2], [3, 4, 2])?, [(0, 0..3), (1, 0..4), (2, 0..2)]);
        assert_eq!(cut("q", &[7, 2], [3, 4, 2])?, [(0, 0..3), (0, 3..7), (1, 0..2)]);
        // Empty segments and empty parts.
        assert_eq!(cut("q", &[0, 3, 0, 4], [3, 4, 0])?.map(|(at, place)| (at, place.len())), [(1, 3), (3, 4), (3, 0)]);
        assert_eq!(cut("q", &[4, 0], [0, 4, 0])?.map(|(_, place)| place.len()), [0, 4, 0]);
        for segments in [&[2, 7][..], &[3, 2, 4], &[8, 1]] {
            let refused = cut("q", segments, [3, 4, 2]);
            assert!(matches!(refused, Err(Error::NotApplicable { argument: "q", .. })), "{segments:?}");
        }
        Ok(())
    }
}
