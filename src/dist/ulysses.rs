//! Rows for heads, and back: the ranks of a group come to have all tokens of the group, each with some of the heads.

use std::ops::Range;

use super::mode::Heads;
use super::sharded_meta::ShardedMeta;
use super::transfer::{Steps, copy_rows, pack_beside, room};
use crate::error::Result;
use crate::mask::meta::VarlenMeta;
use crate::primitives::{pack, scatter_to_padded_into};
use crate::tensor::{Tensor, TensorView, TensorViewMut};

/// A group of ranks, as one of them sees it.
///
/// ```text
///    tokens of the group   prefix │ shard of the first │ … │ shard of the last │ suffix
/// ```
#[derive(Debug)]
pub(super) struct Group {
    heads: Heads,
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
    pub(super) fn new(meta: &ShardedMeta, ranks: Range<usize>, heads: &Heads) -> Result<Self> {
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
        Ok(Self { heads: *heads, tokens, batch: meta.batch(), members, own, parts, query })
    }

    fn others(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().enumerate().filter(|&(at, _)| at != self.own).map(|(_, member)| member)
    }

    /// `q`, `k` and `v` of this rank's tokens and all heads to those of the group's tokens and this rank's heads. What rows of masked
    /// tokens hold is not specified.
    pub(super) fn rows_for_heads(&self, steps: &mut Steps<'_>, local: [TensorView<'_>; 3]) -> Result<[Tensor; 3]> {
        let (device, dtype, dim) = (steps.device, self.heads.dtype, self.heads.head_dim);
        let own = &self.members[self.own];
        let [prefix, shard, suffix] = &self.parts;
        let of_member = |member: &Member| [&member.q_heads, &member.kv_heads, &member.kv_heads].map(Range::clone);
        let mut sends = Vec::new();
        let mut receives = Vec::new();
        for peer in self.others() {
            let mut parts = Vec::with_capacity(3);
            for (tensor, heads) in local.iter().zip(of_member(peer)) {
                parts.push(tensor.slice(1, shard.local.clone())?.slice(2, heads)?);
            }
            sends.extend(pack_beside(device, &parts, &own.shard)?.map(|rows| (peer.rank, rows)));
            let heads = own.q_heads.len() + 2 * own.kv_heads.len();
            receives.extend(room(device, &peer.shard, [heads, dim], dtype)?.map(|rows| (peer, rows)));
        }
        let new = |heads: &Range<usize>| Tensor::uninit(device, dtype, &[self.batch, self.tokens, heads.len(), dim]);
        let mut group = [new(&own.q_heads)?, new(&own.kv_heads)?, new(&own.kv_heads)?];
        let mut copy_own = || -> Result<()> {
            for ((from, to), heads) in local.iter().zip(&mut group).zip(of_member(own)) {
                for part in [prefix, shard, suffix] {
                    let from = from.slice(1, part.local.clone())?.slice(2, heads.clone())?;
                    copy_rows(device, from, &part.meta, to.view_mut().slice(1, part.place.clone())?)?;
                }
            }
            Ok(())
        };
        steps.exchange(
            ("rows for heads", 0),
            sends.iter().map(|(to, rows)| (*to, rows)).collect(),
            receives.iter_mut().map(|(peer, rows)| (peer.rank, rows)).collect(),
            &mut copy_own,
        )?;
        for (peer, rows) in &receives {
            let mut first = 0;
            for (to, heads) in group.iter_mut().zip(of_member(own)) {
                let part = rows.view().slice(1, first..first + heads.len())?;
                first += heads.len();
                scatter_to_padded_into(device, part, &peer.shard, to.view_mut().slice(1, peer.place.clone())?)?;
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
        let (device, dtype, dim) = (steps.device, self.heads.dtype, self.heads.head_dim);
        let own = &self.members[self.own];
        let mut sends = Vec::new();
        let mut receives = Vec::new();
        for peer in self.others() {
            if !peer.local.is_empty() {
                sends.push((peer.rank, pack(device, group, &peer.local)?));
            }
            let rows = room(device, &self.query, [peer.q_heads.len(), dim], dtype)?;
            receives.extend(rows.map(|rows| (peer, rows)));
        }
        let mut copy_own = || -> Result<()> {
            let rows = pack(device, group, &own.local)?;
            scatter_to_padded_into(device, &rows, &self.query, out.reborrow().slice(2, own.q_heads.clone())?)
        };
        steps.exchange(
            ("heads for rows", 0),
            sends.iter().map(|(to, rows)| (*to, rows)).collect(),
            receives.iter_mut().map(|(peer, rows)| (peer.rank, rows)).collect(),
            &mut copy_own,
        )?;
        for peer in self.others() {
            let heads = out.reborrow().slice(2, peer.q_heads.clone())?;
            match receives.iter().find(|(from, _)| from.rank == peer.rank) {
                Some((_, rows)) => scatter_to_padded_into(device, rows, &self.query, heads)?,
                // This rank has no valid token: zeros alone.
                None => {
                    let none = Tensor::uninit(device, dtype, &[0, peer.q_heads.len(), dim])?;
                    scatter_to_padded_into(device, &none, &self.query, heads)?;
                }
            }
        }
        Ok(())
    }
}
