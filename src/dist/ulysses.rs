//! Rows for heads, and back: the ranks of a group come to have all tokens of the group, each with some of the heads.

use std::ops::Range;

use super::kept::{Lent, Room};
use super::local::{Local, LocalMut};
use super::mode::Heads;
use super::scores::OnScores;
use super::sharded_meta::ShardedMeta;
use super::transfer::{Padded, Rows, Steps, copy_rows, unpack};
use crate::attention::MaskedAttention;
use crate::attention_mask::AttentionMask;
use crate::dtype::DType;
use crate::error::Result;
use crate::mask::meta::VarlenMeta;
use crate::tensor::{Segments, SegmentsMut, Tensor, TensorViewMut};

/// A group of ranks, as one of them sees it.
///
/// ```text
///    tokens of the group   prefix │ shard of the first │ … │ shard of the last │ suffix
/// ```
#[derive(Debug)]
pub(super) struct Group {
    heads: Heads,
    /// In how many parts heads are computed where the group is all ranks.
    chunks: usize,
    /// Tokens of a group's tensors.
    tokens: usize,
    batch: usize,
    /// By their places in the group.
    members: Vec<Member>,
    /// This rank's place.
    own: usize,
    /// Prefix, own shard and suffix.
    parts: [Part; 3],
    /// The local tokens of this rank.
    query: VarlenMeta,
}

/// One rank of a group.
#[derive(Debug)]
struct Member {
    rank: usize,
    shard: VarlenMeta,
    /// Where the shard lies among the group's tokens.
    place: Range<usize>,
    q_heads: Range<usize>,
    kv_heads: Range<usize>,
    /// The rank's local tokens among the group's.
    local: VarlenMeta,
}

/// Tokens that a rank has itself.
#[derive(Debug)]
struct Part {
    meta: VarlenMeta,
    /// Where they lie in local tensors, and among the group's tokens.
    local: Range<usize>,
    place: Range<usize>,
}

impl Group {
    pub(super) fn new(meta: &ShardedMeta, ranks: Range<usize>, (heads, chunks): (&Heads, usize)) -> Result<Self> {
        let shards = meta.shards();
        let (prefix, suffix) = (shards.prefix(), shards.suffix());
        let sharded = shards.shards_of(&ranks);
        let tokens = prefix + sharded.len() + suffix;
        let place = |rank| {
            let shard = shards.shard(rank);
            let start = prefix + shard.start - sharded.start;
            start..start + shard.len()
        };
        let mut members = Vec::with_capacity(ranks.len());
        for (at, rank) in ranks.clone().enumerate() {
            let place = place(rank);
            let [q_heads, kv_heads] = heads.of(at, ranks.len());
            // The tokens of other members are left out by a mask.
            let group = meta.cut(&meta.local(&ranks))?;
            let pieces = [0..prefix, place.clone(), tokens - suffix..tokens];
            let local = group.among(&pieces)?;
            members.push(Member { rank, shard: meta.keys_of(rank)?, place, q_heads, kv_heads, local });
        }
        let own_place = place(meta.rank());
        let local_len = shards.local_len(meta.rank());
        let seq = shards.seq();
        let part = |pieces, local, place| Ok(Part { meta: meta.cut(pieces)?, local, place });
        let parts = [
            part(&[0..prefix, 0..0, 0..0], 0..prefix, 0..prefix)?,
            part(&[0..0, shards.shard(meta.rank()), 0..0], prefix..local_len - suffix, own_place)?,
            part(&[0..0, 0..0, seq - suffix..seq], local_len - suffix..local_len, tokens - suffix..tokens)?,
        ];
        let own = meta.rank() - ranks.start;
        let query = meta.query().clone();
        Ok(Self { heads: *heads, chunks, tokens, batch: meta.batch(), members, own, parts, query })
    }

    /// Metadata of prefix, own shard and suffix.
    pub(super) fn parts(&self) -> [&VarlenMeta; 3] {
        self.parts.each_ref().map(|part| &part.meta)
    }

    fn others(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().enumerate().filter(|&(at, _)| at != self.own).map(|(_, member)| member)
    }

    /// Whether a call takes the group's tokens in segments, as [`attend`](Self::attend) does.
    pub(super) fn fits_segments(&self) -> bool {
        // And prefix and suffix.
        self.members.len() + 2 <= Segments::MAX
    }

    /// Attention of the group's tokens to one another, by `layer` under `mask`, which is of those tokens. This rank computes its
    /// heads chunk by chunk, on what came where it lies. The next chunk comes, and the output of the one before goes, meanwhile.
    pub(super) fn attend(
        &self,
        steps: &mut Steps<'_>,
        (layer, mask, scores): (&MaskedAttention, AttentionMask<'_>, &OnScores<'_>),
        local: [Local<'_>; 3],
        mut out: LocalMut<'_>,
    ) -> Result<()> {
        let room = steps.room;
        let sent = self.rows_to_send(room, local, 0)?;
        let mut arrived = self.room_for_rows(room, 0)?;
        let sends = self.others().zip(&sent).filter_map(message).collect();
        let receives = self.others().zip(&mut arrived).filter_map(message_mut).collect();
        steps.exchange(("rows for heads", 0), sends, receives, &mut || Ok(()))?;
        drop(sent);
        let mut output = None;
        for chunk in 0..self.chunks {
            let before = output.take();
            let mut attend = || -> Result<()> {
                output = Some(self.attend_chunk(room, (layer, mask, scores), local, (chunk, &arrived), &mut out)?);
                Ok(())
            };
            if self.chunks == 1 {
                attend()?;
                break;
            }
            let (next, mut coming) = match chunk + 1 < self.chunks {
                true => (self.rows_to_send(room, local, chunk + 1)?, self.room_for_rows(room, chunk + 1)?),
                false => (Vec::new(), Vec::new()),
            };
            let mut returned = match &before {
                Some(_) => self.room_for_output(room, chunk - 1)?,
                None => Vec::new(),
            };
            let sends = self.others().zip(&next).filter_map(message);
            let sends = sends.chain(before.iter().flat_map(|before| self.messages(before))).collect();
            let receives = self.others().zip(&mut coming).filter_map(message_mut);
            let receives = receives.chain(self.others().zip(&mut returned).flat_map(messages_mut)).collect();
            steps.exchange(("rows for heads, and back", chunk), sends, receives, &mut attend)?;
            arrived = coming;
            if before.is_some() {
                self.unpack_output(room, chunk - 1, &returned, &mut out)?;
            }
        }
        let Some(output) = output else { return Ok(()) };
        let last = self.chunks - 1;
        let mut returned = self.room_for_output(room, last)?;
        let sends = self.messages(&output).collect();
        let receives = self.others().zip(&mut returned).flat_map(messages_mut).collect();
        steps.exchange(("heads for rows", last), sends, receives, &mut || Ok(()))?;
        self.unpack_output(room, last, &returned, &mut out)
    }

    /// Heads of `q`, `k` and `v` of a member's chunk.
    fn heads_of(&self, member: &Member, chunk: usize) -> [Range<usize>; 3] {
        let [q, kv] = self.heads.chunk(self.members.len(), (chunk, self.chunks));
        let after = |start: usize, range: &Range<usize>| start + range.start..start + range.end;
        [after(member.q_heads.start, &q), after(member.kv_heads.start, &kv), after(member.kv_heads.start, &kv)]
    }

    fn row(&self) -> (usize, DType) {
        (self.heads.head_dim, self.heads.dtype)
    }

    /// The valid rows of this rank's shard with the heads of each other member.
    fn rows_to_send<'k>(&self, room: Room<'k>, local: [Local<'_>; 3], chunk: usize) -> Result<Vec<Option<Rows<'k>>>> {
        let [_, shard, _] = &self.parts;
        let [own_q, own_k, own_v] = local.map(|tensor| tensor.parts()[1]);
        let of_peer = |peer: &Member| -> Result<_> {
            let [q, k, v] = self.heads_of(peer, chunk);
            let parts = [own_q.slice(2, q)?, own_k.slice(2, k)?, own_v.slice(2, v)?];
            Rows::pack(room, parts, &shard.meta)
        };
        self.others().map(of_peer).collect()
    }

    fn room_for_rows<'k>(&self, room: Room<'k>, chunk: usize) -> Result<Vec<Option<Rows<'k>>>> {
        let heads = self.heads_of(&self.members[self.own], chunk).map(|heads| heads.len());
        self.others().map(|peer| Rows::room(room, &peer.shard, heads, self.row())).collect()
    }

    /// Attention with one chunk of this rank's heads. Writes the output of its own tokens, and gives what is for the others.
    fn attend_chunk<'k>(
        &self,
        room: Room<'k>,
        (layer, mask, scores): (&MaskedAttention, AttentionMask<'_>, &OnScores<'_>),
        local: [Local<'_>; 3],
        (chunk, arrived): (usize, &[Option<Rows<'k>>]),
        out: &mut LocalMut<'_>,
    ) -> Result<Output<'k>> {
        let heads = self.heads_of(&self.members[self.own], chunk);
        let (dim, dtype) = self.row();
        let padded = |which: usize| -> Result<Vec<Padded<'_>>> {
            let form = (heads[which].len(), dim, dtype);
            let each = self.others().zip(arrived);
            each.map(|(peer, rows)| Padded::of(room, rows.as_ref(), which, &peer.shard, form)).collect()
        };
        let padded = [padded(0)?, padded(1)?, padded(2)?];
        let mut inputs = [Vec::new(), Vec::new(), Vec::new()];
        for (which, segments) in inputs.iter_mut().enumerate() {
            let [prefix, shard, suffix] = *local[which].heads(&heads[which])?.parts();
            let mut peers = padded[which].iter().map(Padded::view);
            segments.push(prefix);
            for at in 0..self.members.len() {
                let of_peer = if at == self.own { None } else { peers.next() };
                segments.push(of_peer.unwrap_or(shard));
            }
            segments.push(suffix);
        }

        let new = |seq: usize| room.tensor(dtype, &[self.batch, seq, heads[0].len(), dim]);
        let mut of_peers = self.others().map(|peer| new(peer.place.len())).collect::<Result<Vec<_>>>()?;
        let scores = scores.part(&heads[0], None)?;
        // Where the host writes, views of one tensor cannot be written by one call.
        let copies_own = out.apart(&heads[0])?.is_none();
        let mut copied = match copies_own {
            true => self.parts.iter().map(|part| new(part.local.len())).collect::<Result<Vec<_>>>()?,
            false => Vec::new(),
        };
        {
            let mut of_copied = copied.iter_mut().map(|tensor| tensor.view_mut());
            let [first, middle, last] = match copies_own {
                true => [of_copied.next(), of_copied.next(), of_copied.next()],
                false => out.apart(&heads[0])?.unwrap_or_default(),
            };
            let mut outputs = Vec::with_capacity(self.members.len() + 2);
            let mut peers = of_peers.iter_mut().map(|tensor| tensor.view_mut());
            outputs.extend(first);
            outputs.extend(peers.by_ref().take(self.own));
            outputs.extend(middle);
            outputs.extend(peers);
            outputs.extend(last);
            let [q, k, v] = inputs;
            layer.forward_into(q, k, v, scores.on(mask), SegmentsMut::from(outputs))?;
        }
        for (at, (part, written)) in self.parts.iter().zip(&copied).enumerate() {
            copy_rows(room, written.view(), &part.meta, out.part(at)?.slice(2, heads[0].clone())?)?;
        }

        let shards = self.others().zip(of_peers);
        let shards = shards.map(|(peer, written)| Rows::of_padded(room, written, &peer.shard));
        let mut replicated = |at: usize| {
            let written = out.part(at)?.slice(2, heads[0].clone())?;
            Rows::pack(room, [written.as_view()], &self.parts[at].meta)
        };
        Ok(Output { shards: shards.collect::<Result<_>>()?, replicated: [replicated(0)?, replicated(2)?] })
    }

    /// What each other member gets of an output.
    fn messages<'a>(&'a self, output: &'a Output<'_>) -> impl Iterator<Item = (usize, &'a Tensor)> + 'a {
        self.others().zip(&output.shards).flat_map(|(peer, shard)| {
            let rows = shard.iter().chain(output.replicated.iter().flatten());
            rows.map(|rows| (peer.rank, rows.memory()))
        })
    }

    /// For the heads of each other member: this rank's shard, prefix and suffix.
    fn room_for_output<'k>(&self, room: Room<'k>, chunk: usize) -> Result<Vec<[Option<Rows<'k>>; 3]>> {
        let [prefix, shard, suffix] = &self.parts;
        let of_peer = |peer: &Member| -> Result<_> {
            let [heads, ..] = self.heads_of(peer, chunk);
            let of_part = |part: &Part| Rows::room(room, &part.meta, [heads.len()], self.row());
            Ok([of_part(shard)?, of_part(prefix)?, of_part(suffix)?])
        };
        self.others().map(of_peer).collect()
    }

    fn unpack_output(
        &self,
        room: Room<'_>,
        chunk: usize,
        returned: &[[Option<Rows<'_>>; 3]],
        out: &mut LocalMut<'_>,
    ) -> Result<()> {
        for (peer, of_peer) in self.others().zip(returned) {
            let [heads, ..] = self.heads_of(peer, chunk);
            for (at, rows) in [1, 0, 2].into_iter().zip(of_peer) {
                let rows = rows.as_ref().map(|rows| rows.part(0)).transpose()?;
                unpack(room, rows, &self.parts[at].meta, out.part(at)?.slice(2, heads.clone())?)?;
            }
        }
        Ok(())
    }

    /// `q`, `k` and `v` of this rank's tokens and all heads to those of the group's tokens and this rank's heads, for what attends
    /// to other groups too. What rows of masked tokens hold is not specified.
    pub(super) fn rows_for_heads<'k>(&self, steps: &mut Steps<'k>, local: [Local<'_>; 3]) -> Result<[Lent<'k>; 3]> {
        let (room, (dim, dtype)) = (steps.room, self.row());
        let own = &self.members[self.own];
        let of_own = [&own.q_heads, &own.kv_heads, &own.kv_heads];
        let [q, k, v] = local.map(|tensor| tensor.parts()[1]);
        let (mut sent, mut arrived) = (Vec::new(), Vec::new());
        for peer in self.others() {
            let kv_heads = || peer.kv_heads.clone();
            let parts = [q.slice(2, peer.q_heads.clone())?, k.slice(2, kv_heads())?, v.slice(2, kv_heads())?];
            sent.push(Rows::pack(room, parts, &own.shard)?);
            arrived.push(Rows::room(room, &peer.shard, of_own.map(Range::len), self.row())?);
        }
        let new = |heads: &Range<usize>| room.tensor(dtype, &[self.batch, self.tokens, heads.len(), dim]);
        let mut group = [new(&own.q_heads)?, new(&own.kv_heads)?, new(&own.kv_heads)?];
        let mut copy_own = || -> Result<()> {
            for ((from, to), heads) in local.iter().zip(&mut group).zip(of_own) {
                for (part, from) in self.parts.iter().zip(from.parts()) {
                    let from = from.slice(2, heads.clone())?;
                    copy_rows(room, from, &part.meta, to.view_mut().slice(1, part.place.clone())?)?;
                }
            }
            Ok(())
        };
        let sends = self.others().zip(&sent).filter_map(message).collect();
        let receives = self.others().zip(&mut arrived).filter_map(message_mut).collect();
        steps.exchange(("rows for heads", 0), sends, receives, &mut copy_own)?;
        for (peer, rows) in self.others().zip(&arrived) {
            let Some(rows) = rows else { continue };
            for (which, to) in group.iter_mut().enumerate() {
                let to = to.view_mut().slice(1, peer.place.clone())?;
                unpack(room, Some(rows.part(which)?), &peer.shard, to)?;
            }
        }
        Ok(group)
    }

    /// The output of the group's tokens and this rank's heads to that of this rank's tokens and all heads.
    pub(super) fn heads_for_rows(
        &self,
        steps: &mut Steps<'_>,
        group: &Tensor,
        mut out: TensorViewMut<'_>,
    ) -> Result<()> {
        let room = steps.room;
        let own = &self.members[self.own];
        let (mut sent, mut arrived) = (Vec::new(), Vec::new());
        for peer in self.others() {
            sent.push(Rows::pack(room, [group.view()], &peer.local)?);
            arrived.push(Rows::room(room, &self.query, [peer.q_heads.len()], self.row())?);
        }
        let mut copy_own = || -> Result<()> {
            let rows = Rows::pack(room, [group.view()], &own.local)?;
            let rows = rows.as_ref().map(|rows| rows.part(0)).transpose()?;
            unpack(room, rows, &self.query, out.reborrow().slice(2, own.q_heads.clone())?)
        };
        let sends = self.others().zip(&sent).filter_map(message).collect();
        let receives = self.others().zip(&mut arrived).filter_map(message_mut).collect();
        steps.exchange(("heads for rows", 0), sends, receives, &mut copy_own)?;
        for (peer, rows) in self.others().zip(&arrived) {
            // Without a valid token: zeros alone.
            let rows = rows.as_ref().map(|rows| rows.part(0)).transpose()?;
            unpack(room, rows, &self.query, out.reborrow().slice(2, peer.q_heads.clone())?)?;
        }
        Ok(())
    }
}

/// What a chunk of heads gives the other members.
#[derive(Debug)]
struct Output<'k> {
    /// Of each one's shard.
    shards: Vec<Option<Rows<'k>>>,
    /// Of prefix and suffix, the same for all.
    replicated: [Option<Rows<'k>>; 2],
}

fn message<'a>((peer, rows): (&Member, &'a Option<Rows<'_>>)) -> Option<(usize, &'a Tensor)> {
    Some((peer.rank, rows.as_ref()?.memory()))
}

fn message_mut<'a>((peer, rows): (&Member, &'a mut Option<Rows<'_>>)) -> Option<(usize, &'a mut Tensor)> {
    Some((peer.rank, rows.as_mut()?.memory_mut()))
}

fn messages_mut<'a, 'k>(
    (peer, rows): (&Member, &'a mut [Option<Rows<'k>>; 3]),
) -> impl Iterator<Item = (usize, &'a mut Tensor)> + use<'a, 'k> {
    let rank = peer.rank;
    rows.iter_mut().flatten().map(move |rows| (rank, rows.memory_mut()))
}
