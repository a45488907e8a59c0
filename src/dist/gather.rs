//! Queries stay; keys and values of all groups come to each.

use std::ops::Range;

use super::kept::Room;
use super::mode::Heads;
use super::sharded_meta::ShardedMeta;
use super::transfer::{Padded, Rows, Steps};
use crate::attention::MaskedAttention;
use crate::attention_mask::AttentionMask;
use crate::error::Result;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;
use crate::primitives::scatter_to_padded_into;
use crate::tensor::{Segments, TensorView, TensorViewMut};

/// Segments of keys that a group has itself: prefix, own shards, suffix.
const OWN_SEGMENTS: usize = 3;

/// Attention of one group's queries to all keys.
#[derive(Debug)]
pub(super) struct Gather {
    heads: Heads,
    /// Ranks of a group, which share the heads, and chunks of the heads of each.
    ulysses: usize,
    chunks: usize,
    query: VarlenMeta,
    keys: VarlenMeta,
    ranges: Option<KeyRanges>,
    /// The group's own shards in its tensors.
    own: Range<usize>,
    own_meta: VarlenMeta,
    /// The rank to exchange with of each other group, and that group's tokens, in order.
    before: Vec<Source>,
    after: Vec<Source>,
}

/// Another group.
#[derive(Debug)]
struct Source {
    rank: usize,
    meta: VarlenMeta,
}

impl Gather {
    /// `groups`: the ranks of each group. `at`: this rank's place in its own. `chunks`: in how many parts heads are computed; keys
    /// and values of the next part come meanwhile.
    pub(super) fn new(
        meta: &ShardedMeta,
        groups: &[Range<usize>],
        (group, at): (usize, usize),
        (heads, chunks): (&Heads, usize),
    ) -> Result<Self> {
        let shards = meta.shards();
        let source =
            |ranks: &Range<usize>| Ok(Source { rank: ranks.start + at, meta: meta.cut(&meta.sharded(ranks))? });
        let local = meta.local(&groups[group]);
        Ok(Self {
            heads: *heads,
            ulysses: groups[group].len(),
            chunks,
            query: meta.cut(&local)?,
            keys: meta.keys().clone(),
            ranges: meta.cut_ranges(&local, &[0..shards.seq(), 0..0, 0..0])?,
            own: shards.prefix()..shards.prefix() + shards.shards_of(&groups[group]).len(),
            own_meta: meta.cut(&meta.sharded(&groups[group]))?,
            before: groups[..group].iter().map(source).collect::<Result<_>>()?,
            after: groups[group + 1..].iter().map(source).collect::<Result<_>>()?,
        })
    }

    pub(super) fn attend(
        &self,
        steps: &mut Steps<'_>,
        layer: &MaskedAttention,
        [q, k, v]: [TensorView<'_>; 3],
        mut out: TensorViewMut<'_>,
    ) -> Result<()> {
        if self.sources().next().is_none() {
            // Queries and keys are the same tokens: the call that one device would make.
            return layer.forward_into(q, k, v, self.mask_of_all(), out).map(drop);
        }
        let room = steps.room;
        let mut arrived = self.receive(steps, 0, [k, v], &mut || Ok(()))?;
        for chunk in 0..self.chunks {
            let [q_heads, kv_heads] = self.heads.chunk(self.ulysses, (chunk, self.chunks));
            let mut attend = || -> Result<()> {
                let mask = AttentionMask::varlen_cross(&self.query, &self.keys);
                let mask = self.ranges.iter().fold(mask, AttentionMask::with_ranges);
                let [k, v] = [k.slice(2, kv_heads.clone())?, v.slice(2, kv_heads.clone())?];
                let [k_came, v_came] = [0, 1].map(|which| self.padded(room, &arrived, which, kv_heads.len()));
                let [k_came, v_came] = [k_came?, v_came?];
                let [k, v] = [self.in_order(k, &k_came)?, self.in_order(v, &v_came)?];
                let out = out.reborrow().slice(2, q_heads.clone())?;
                layer.forward_into(q.slice(2, q_heads.clone())?, k, v, mask, out).map(drop)
            };
            if chunk + 1 == self.chunks {
                attend()?;
                break;
            }
            arrived = self.receive(steps, chunk + 1, [k, v], &mut attend)?;
        }
        Ok(())
    }

    /// The mask where queries and keys are the same tokens.
    pub(super) fn mask_of_all(&self) -> AttentionMask<'_> {
        self.ranges.iter().fold(AttentionMask::varlen(&self.keys), AttentionMask::with_ranges)
    }

    /// The other groups, in order.
    fn sources(&self) -> impl Iterator<Item = &Source> {
        self.before.iter().chain(&self.after)
    }

    /// One chunk of the keys and values of the other groups.
    fn receive<'k>(
        &self,
        steps: &mut Steps<'k>,
        chunk: usize,
        own: [TensorView<'_>; 2],
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<Option<Rows<'k>>>> {
        let room = steps.room;
        let [_, heads] = self.heads.chunk(self.ulysses, (chunk, self.chunks));
        let [k, v] = own.map(|tensor| tensor.slice(1, self.own.clone())?.slice(2, heads.clone()));
        let packed = Rows::pack(room, [k?, v?], &self.own_meta)?;
        let packed = packed.as_ref().map(Rows::memory);
        let sends = packed.iter().flat_map(|rows| self.sources().map(move |source| (source.rank, *rows))).collect();
        let mut arrived = Vec::with_capacity(self.before.len() + self.after.len());
        let row = (self.heads.head_dim, self.heads.dtype);
        for source in self.sources() {
            arrived.push(Rows::room(room, &source.meta, [heads.len(); 2], row)?);
        }
        let receives = self.sources().zip(&mut arrived);
        let receives = receives.filter_map(|(source, rows)| Some((source.rank, rows.as_mut()?.memory_mut()))).collect();
        steps.exchange(("gathering keys and values", chunk), sends, receives, meanwhile)?;
        Ok(arrived)
    }

    /// What came of keys or values, padded: of each other group, or, where those are more than a call takes, of all before this
    /// one and of all after it.
    fn padded<'a>(
        &self,
        room: Room<'a>,
        arrived: &'a [Option<Rows<'_>>],
        which: usize,
        heads: usize,
    ) -> Result<[Vec<Padded<'a>>; 2]> {
        let (before, after) = arrived.split_at(self.before.len());
        let form = (heads, self.heads.head_dim, self.heads.dtype);
        if arrived.len() + OWN_SEGMENTS <= Segments::MAX {
            let each = |sources: &[Source], rows: &'a [Option<Rows<'_>>]| -> Result<Vec<_>> {
                let each = sources.iter().zip(rows);
                each.map(|(source, rows)| Padded::of(room, rows.as_ref(), which, &source.meta, form)).collect()
            };
            return Ok([each(&self.before, before)?, each(&self.after, after)?]);
        }
        let together = |sources: &[Source], rows: &[Option<Rows<'_>>]| -> Result<_> {
            let seq = sources.iter().map(|source| source.meta.seq()).sum();
            let mut padded = room.tensor(form.2, &[self.keys.batch(), seq, heads, form.1])?;
            let mut first = 0;
            for (source, rows) in sources.iter().zip(rows) {
                let place = first..first + source.meta.seq();
                first = place.end;
                if let Some(rows) = rows {
                    let to = padded.view_mut().slice(1, place)?;
                    scatter_to_padded_into(room.device, rows.part(which)?, &source.meta, to)?;
                }
            }
            Ok(vec![Padded::Own(padded)])
        };
        Ok([together(&self.before, before)?, together(&self.after, after)?])
    }

    /// All keys or values, in the order of the whole sequence.
    fn in_order<'a>(
        &self,
        own: TensorView<'a>,
        [before, after]: &'a [Vec<Padded<'_>>; 2],
    ) -> Result<Vec<TensorView<'a>>> {
        let mut all = Vec::with_capacity(before.len() + after.len() + OWN_SEGMENTS);
        all.push(own.slice(1, 0..self.own.start)?);
        all.extend(before.iter().map(Padded::view));
        all.push(own.slice(1, self.own.clone())?);
        all.extend(after.iter().map(Padded::view));
        all.push(own.slice(1, self.own.end..own.shape()[1])?);
        Ok(all)
    }
}
