//! Queries stay; keys and values of all groups come to each. Heads are computed in chunks, one call each, or all in one call
//! that begins before all keys have come: `in_pieces`.

mod in_pieces;

use std::ops::Range;

use super::kept::Room;
use super::local::{Local, LocalMut, places};
use super::mode::Heads;
use super::scores::OnScores;
use super::sharded_meta::ShardedMeta;
use super::transfer::{Padded, Rows, Steps};
use crate::attention::MaskedAttention;
use crate::attention_mask::AttentionMask;
use crate::attention_outputs::AttentionOutputs;
use crate::error::Result;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;
use crate::primitives::scatter_to_padded_into;
use crate::tensor::{Segments, SegmentsMut, TensorView, TensorViewMut};

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
    /// The first of the rank's heads.
    first_head: usize,
    /// The queries of prefix, own shards and suffix, as far as there are tokens.
    queries: [Option<Queries>; 3],
    own_meta: VarlenMeta,
    /// The rank to exchange with of each other group, and that group's tokens, in order.
    before: Vec<Source>,
    after: Vec<Source>,
}

/// Queries that follow one another in the whole sequence.
#[derive(Debug)]
struct Queries {
    meta: VarlenMeta,
    ranges: Option<KeyRanges>,
    /// Where they lie in the group's tensors, and in the whole sequence.
    local: Range<usize>,
    global: Range<usize>,
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
        let [first_heads, _] = heads.of(at, groups[group].len());
        let of_piece = |piece: usize, local_place: Range<usize>| -> Result<Option<Queries>> {
            let global = local[piece].clone();
            if global.is_empty() {
                return Ok(None);
            }
            let mut pieces = [0..0, 0..0, 0..0];
            pieces[piece] = global.clone();
            let ranges = meta.cut_ranges(&pieces, &[0..shards.seq(), 0..0, 0..0])?;
            Ok(Some(Queries { meta: meta.cut(&pieces)?, ranges, local: local_place, global }))
        };
        let [prefix, own, suffix] = places(local.each_ref().map(Range::len));
        Ok(Self {
            queries: [of_piece(0, prefix)?, of_piece(1, own)?, of_piece(2, suffix)?],
            first_head: first_heads.start,
            heads: *heads,
            ulysses: groups[group].len(),
            chunks,
            query: meta.cut(&local)?,
            keys: meta.keys().clone(),
            ranges: meta.cut_ranges(&local, &[0..shards.seq(), 0..0, 0..0])?,
            own_meta: meta.cut(&meta.sharded(&groups[group]))?,
            before: groups[..group].iter().map(source).collect::<Result<_>>()?,
            after: groups[group + 1..].iter().map(source).collect::<Result<_>>()?,
        })
    }

    pub(super) fn attend(
        &self,
        steps: &mut Steps<'_>,
        (layer, scores): (&MaskedAttention, &OnScores<'_>),
        [q, k, v]: [Local<'_>; 3],
        mut out: LocalMut<'_>,
        mut lse: Option<TensorViewMut<'_>>,
    ) -> Result<()> {
        if self.sources().next().is_none() {
            // Queries and keys are the same tokens: the call that one device would make.
            let [heads, _] = self.heads.of_each(self.ulysses);
            let scores = scores.part(&self.global(&(0..heads)), None)?;
            let outputs = outputs(out.heads(&(0..heads))?, lse);
            let mask = scores.on(self.mask_of_all());
            return layer.forward_into(q.segments(), k.segments(), v.segments(), mask, outputs).map(drop);
        }
        if self.fits_pieces(steps, scores) {
            return self.attend_in_pieces(steps, (layer, scores), [q, k, v], (out, lse));
        }
        let room = steps.room;
        let first = self.pack(room, 0, [k, v])?;
        // What other chunks send is packed while the first one's comes: nothing else can be done then.
        let mut others = Vec::with_capacity(self.chunks - 1);
        let mut pack_others = || -> Result<()> {
            for chunk in 1..self.chunks {
                others.push(self.pack(room, chunk, [k, v])?);
            }
            Ok(())
        };
        let mut arrived = self.receive(steps, 0, &first, &mut pack_others)?;
        for chunk in 0..self.chunks {
            let [q_heads, kv_heads] = self.chunk(chunk);
            let mut attend = || -> Result<()> {
                let (q, k, v) = (q.heads(&q_heads)?, k.heads(&kv_heads)?, v.heads(&kv_heads)?);
                let [k_came, v_came] = [0, 1].map(|which| self.padded(room, &arrived, which, kv_heads.len()));
                let [k_came, v_came] = [k_came?, v_came?];
                let [k, v] = [self.in_order(&k, &k_came), self.in_order(&v, &v_came)];
                let global = self.global(&q_heads);
                let mut lse = lse.as_mut().map(|lse| lse.reborrow().slice(1, q_heads.clone())).transpose()?;
                if !scores.varies_with_queries() {
                    // Any row of a bias is that of every query.
                    let scores = scores.part(&global, Some(&(0..self.keys.seq().min(1))))?;
                    let mask = AttentionMask::varlen_cross(&self.query, &self.keys);
                    let mask = scores.on(self.ranges.iter().fold(mask, AttentionMask::with_ranges));
                    let outputs = outputs(out.heads(&q_heads)?, lse);
                    return layer.forward_into(q.segments(), k, v, mask, outputs).map(drop);
                }
                // Queries whose rows of the bias follow one another.
                for (at, queries) in self.queries.iter().enumerate() {
                    let Some(queries) = queries else { continue };
                    let scores = scores.part(&global, Some(&queries.global))?;
                    let mask = AttentionMask::varlen_cross(&queries.meta, &self.keys);
                    let mask = scores.on(queries.ranges.iter().fold(mask, AttentionMask::with_ranges));
                    let lse = lse.as_mut().map(|lse| lse.reborrow().slice(2, queries.local.clone())).transpose()?;
                    let outputs = outputs(out.part(at)?.slice(2, q_heads.clone())?.into(), lse);
                    layer.forward_into(q.parts()[at], k.clone(), v.clone(), mask, outputs)?;
                }
                Ok(())
            };
            match others.get(chunk) {
                Some(next) => arrived = self.receive(steps, chunk + 1, next, &mut attend)?,
                None => attend()?,
            }
        }
        Ok(())
    }

    /// The heads of a chunk, among the rank's own.
    fn chunk(&self, chunk: usize) -> [Range<usize>; 2] {
        self.heads.growing_chunk(self.ulysses, (chunk, self.chunks))
    }

    /// The rank's heads among all.
    fn global(&self, heads: &Range<usize>) -> Range<usize> {
        self.first_head + heads.start..self.first_head + heads.end
    }

    /// The mask where queries and keys are the same tokens.
    pub(super) fn mask_of_all(&self) -> AttentionMask<'_> {
        self.ranges.iter().fold(AttentionMask::varlen(&self.keys), AttentionMask::with_ranges)
    }

    /// The other groups, in order.
    fn sources(&self) -> impl Iterator<Item = &Source> {
        self.before.iter().chain(&self.after)
    }

    /// What the other groups get of one chunk: keys and values of the rank's own shards. None without a valid row.
    fn pack<'k>(&self, room: Room<'k>, chunk: usize, own: [Local<'_>; 2]) -> Result<Option<Rows<'k>>> {
        let [_, heads] = self.chunk(chunk);
        let [k, v] = own.map(|tensor| tensor.parts()[1].slice(2, heads.clone()));
        Rows::pack(room, [k?, v?], &self.own_meta)
    }

    /// One chunk of the keys and values of the other groups.
    fn receive<'k>(
        &self,
        steps: &mut Steps<'k>,
        chunk: usize,
        sent: &Option<Rows<'_>>,
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<Option<Rows<'k>>>> {
        let room = steps.room;
        let [_, heads] = self.chunk(chunk);
        let sent = sent.as_ref().map(Rows::memory);
        let sends = sent.iter().flat_map(|rows| self.sources().map(move |source| (source.rank, *rows))).collect();
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
    fn in_order<'a>(&self, own: &Local<'a>, [before, after]: &'a [Vec<Padded<'_>>; 2]) -> Vec<TensorView<'a>> {
        let [prefix, shards, suffix] = *own.parts();
        let mut all = Vec::with_capacity(before.len() + after.len() + OWN_SEGMENTS);
        all.push(prefix);
        all.extend(before.iter().map(Padded::view));
        all.push(shards);
        all.extend(after.iter().map(Padded::view));
        all.push(suffix);
        all
    }
}

fn outputs<'a>(out: SegmentsMut<'a>, lse: Option<TensorViewMut<'a>>) -> AttentionOutputs<'a> {
    lse.into_iter().fold(AttentionOutputs::new(out), AttentionOutputs::with_lse)
}
