//! Queries stay; keys and values of all groups come to each.

use std::ops::Range;

use super::mode::Heads;
use super::sharded_meta::ShardedMeta;
use super::transfer::{Steps, pack_beside, room};
use crate::attention::MaskedAttention;
use crate::attention_mask::AttentionMask;
use crate::device::Device;
use crate::error::Result;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;
use crate::primitives::scatter_to_padded_into;
use crate::tensor::{Tensor, TensorView, TensorViewMut};

/// Attention of one group's queries to all keys.
#[derive(Debug)]
pub(super) struct Gather {
    heads: Heads,
    /// Of this rank.
    kv_heads: usize,
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
    /// `groups`: the ranks of each group. `at`: this rank's place in its own.
    pub(super) fn new(
        meta: &ShardedMeta,
        groups: &[Range<usize>],
        (group, at): (usize, usize),
        heads: &Heads,
    ) -> Result<Self> {
        let shards = meta.shards();
        let source =
            |ranks: &Range<usize>| Ok(Source { rank: ranks.start + at, meta: meta.cut(&meta.sharded(ranks))? });
        let local = meta.local(&groups[group]);
        let [_, kv_heads] = heads.of_each(groups[group].len());
        Ok(Self {
            heads: *heads,
            kv_heads,
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
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        if self.sources().next().is_none() {
            // Queries and keys are the same tokens: the call that one device would make.
            let mask = self.ranges.iter().fold(AttentionMask::varlen(&self.keys), AttentionMask::with_ranges);
            return layer.forward_into(q, k, v, mask, out).map(drop);
        }
        let mask = AttentionMask::varlen_cross(&self.query, &self.keys);
        let mask = self.ranges.iter().fold(mask, AttentionMask::with_ranges);
        let [before, after] = self.receive(steps, [k, v])?;
        let [k, v] = [(k, &before[0], &after[0]), (v, &before[1], &after[1])].map(|(own, before, after)| {
            let [prefix, shard, suffix] = [0..self.own.start, self.own.clone(), self.own.end..own.shape()[1]];
            Ok([own.slice(1, prefix)?, before.view(), own.slice(1, shard)?, after.view(), own.slice(1, suffix)?])
        });
        layer.forward_into(q, k?, v?, mask, out).map(drop)
    }

    /// The other groups, in order.
    fn sources(&self) -> impl Iterator<Item = &Source> {
        self.before.iter().chain(&self.after)
    }

    /// Padded keys and values of the groups before this one, and of those after it. What rows of masked tokens hold is not
    /// specified.
    fn receive(&self, steps: &mut Steps<'_>, [k, v]: [TensorView<'_>; 2]) -> Result<[[Tensor; 2]; 2]> {
        let device = steps.device;
        let own = [k.slice(1, self.own.clone())?, v.slice(1, self.own.clone())?];
        let packed = pack_beside(device, &own, &self.own_meta)?;
        let sends = packed.iter().flat_map(|rows| self.sources().map(move |source| (source.rank, rows))).collect();
        let mut arrived = Vec::new();
        for source in self.sources() {
            arrived.push(room(device, &source.meta, [2 * self.kv_heads, self.heads.head_dim], self.heads.dtype)?);
        }
        let receives = self.sources().zip(&mut arrived);
        let receives = receives.filter_map(|(source, rows)| Some((source.rank, rows.as_mut()?))).collect();
        steps.exchange(("gathering keys and values", 0), sends, receives, &mut || Ok(()))?;
        let (before, after) = arrived.split_at(self.before.len());
        Ok([self.unpack(device, &self.before, before)?, self.unpack(device, &self.after, after)?])
    }

    fn unpack(&self, device: &Device, sources: &[Source], rows: &[Option<Tensor>]) -> Result<[Tensor; 2]> {
        let seq = sources.iter().map(|source| source.meta.seq()).sum();
        let shape = [self.keys.batch(), seq, self.kv_heads, self.heads.head_dim];
        let new = || Tensor::uninit(device, self.heads.dtype, &shape);
        let mut pair = [new()?, new()?];
        let mut first = 0;
        for (source, rows) in sources.iter().zip(rows) {
            let place = first..first + source.meta.seq();
            first = place.end;
            let Some(rows) = rows else { continue };
            for (which, to) in pair.iter_mut().enumerate() {
                let part = rows.view().slice(1, which * self.kv_heads..(which + 1) * self.kv_heads)?;
                scatter_to_padded_into(device, part, &source.meta, to.view_mut().slice(1, place.clone())?)?;
            }
        }
        Ok(pair)
    }
}
