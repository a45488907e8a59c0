//! Queries stay; keys and values go round among the groups, and what each adds is merged.
//!
//! Rows are packed throughout: what arrives is attended to and sent on as it is.

use std::ops::Range;
use std::sync::Arc;

use super::mode::Heads;
use super::sharded_meta::{Pieces, ShardedMeta};
use super::transfer::{Steps, pack_beside, room};
use crate::device::Device;
use crate::error::Result;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;
use crate::merge::merge_attention;
use crate::primitives::{PackedAttended, VarlenOptions, pack, scatter_to_padded_into, varlen_attention};
use crate::tensor::{Tensor, TensorView, TensorViewMut};

/// Attention of one group's queries to the keys of each group in turn.
#[derive(Debug)]
pub(super) struct Ring {
    heads: Heads,
    /// Of this rank: of queries, and of keys.
    own_heads: [usize; 2],
    query: VarlenMeta,
    /// The group's own shards in its tensors.
    own: Range<usize>,
    /// Of each group, by its number.
    groups: Vec<Keys>,
    group: usize,
    /// The ranks to send to and to receive from.
    next: usize,
    previous: usize,
    /// Of the queries and the keys that the group has itself.
    own_ranges: Option<Arc<KeyRanges>>,
}

/// The keys of a group's shards.
#[derive(Debug)]
struct Keys {
    meta: VarlenMeta,
    ranges: Option<Arc<KeyRanges>>,
}

/// Packed attention to some keys: output and log-sum-exp.
type Partial = (Tensor, Tensor);

impl Ring {
    /// `groups`: the ranks of each group. `at`: this rank's place in its own.
    pub(super) fn new(
        meta: &ShardedMeta,
        groups: &[Range<usize>],
        (group, at): (usize, usize),
        heads: &Heads,
    ) -> Result<Self> {
        let local = meta.local(&groups[group]);
        let query = meta.cut(&local)?;
        let packed = |keys_meta: &VarlenMeta, pieces: &Pieces| -> Result<_> {
            let ranges = meta.cut_ranges(&local, pieces)?;
            ranges.map(|ranges| ranges.of_packed_rows(&query, keys_meta, false)).transpose()
        };
        let keys = |ranks: &Range<usize>| -> Result<_> {
            let pieces = meta.sharded(ranks);
            let meta = meta.cut(&pieces)?;
            Ok(Keys { ranges: packed(&meta, &pieces)?, meta })
        };
        let (prefix, count) = (meta.shards().prefix(), groups.len());
        Ok(Self {
            heads: *heads,
            own_heads: heads.of_each(groups[group].len()),
            own: prefix..prefix + meta.shards().shards_of(&groups[group]).len(),
            groups: groups.iter().map(keys).collect::<Result<_>>()?,
            group,
            next: groups[(group + 1) % count].start + at,
            previous: groups[(group + count - 1) % count].start + at,
            own_ranges: packed(&query, &local)?,
            query,
        })
    }

    pub(super) fn attend(
        &self,
        steps: &mut Steps<'_>,
        options: VarlenOptions<'_>,
        [q, k, v]: [TensorView<'_>; 3],
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        let (device, [_, kv_heads]) = (steps.device, self.own_heads);
        let queries = pack(device, q, &self.query)?;
        let own = [k.slice(1, self.own.clone())?, v.slice(1, self.own.clone())?];
        let count = self.groups.len();
        let mut travelling = match count {
            1 => None,
            _ => pack_beside(device, &own, &self.groups[self.group].meta)?,
        };
        let mut sum = None;
        for hop in 0..count {
            // What is here now, and what the group before has.
            let held = &self.groups[(self.group + count - hop) % count];
            let coming = &self.groups[(self.group + 2 * count - hop - 1) % count];
            let is_last = hop + 1 == count;
            let mut arriving = match is_last {
                true => None,
                false => room(device, &coming.meta, [2 * kv_heads, self.heads.head_dim], self.heads.dtype)?,
            };
            let mut attend = || -> Result<()> {
                let partial = match (hop, &travelling) {
                    // The group's own keys, prefix and suffix among them: these are counted once.
                    (0, _) => {
                        let pair = [pack(device, k, &self.query)?, pack(device, v, &self.query)?];
                        let keys = (self.query.cu_seqlens(), self.own_ranges.as_deref());
                        self.attend_to(device, &queries, pair.each_ref().map(Tensor::view), keys, options)?
                    }
                    (_, None) => return Ok(()),
                    (_, Some(rows)) => {
                        let [k, v] = [0..kv_heads, kv_heads..2 * kv_heads].map(|heads| rows.view().slice(1, heads));
                        let keys = (held.meta.cu_seqlens(), held.ranges.as_deref());
                        self.attend_to(device, &queries, [k?, v?], keys, options)?
                    }
                };
                sum = merged(device, sum.take(), partial)?;
                Ok(())
            };
            if is_last {
                attend()?;
                break;
            }
            let sends = travelling.iter().map(|rows| (self.next, rows)).collect();
            let receives = arriving.iter_mut().map(|rows| (self.previous, rows)).collect();
            // What goes on is attended to meanwhile.
            steps.exchange(("passing keys and values on", hop), sends, receives, &mut attend)?;
            travelling = arriving;
        }
        match sum {
            Some((rows, _)) => scatter_to_padded_into(device, &rows, &self.query, out),
            // Without a valid query: zeros alone.
            None => scatter_to_padded_into(device, &queries, &self.query, out),
        }
    }

    /// Nothing without queries.
    fn attend_to(
        &self,
        device: &Device,
        queries: &Tensor,
        [k, v]: [TensorView<'_>; 2],
        (cu_seqlens, ranges): (&CuSeqlens, Option<&KeyRanges>),
        options: VarlenOptions<'_>,
    ) -> Result<Option<Partial>> {
        if self.query.is_empty() {
            return Ok(None);
        }
        let options = VarlenOptions { ranges, ..options }.with_lse();
        let attended = varlen_attention(device, [queries.view(), k, v], self.query.cu_seqlens(), cu_seqlens, options)?;
        let PackedAttended { out, lse, .. } = attended;
        Ok(lse.map(|lse| (out, lse)))
    }
}

/// Both parts together.
fn merged(device: &Device, sum: Option<Partial>, part: Option<Partial>) -> Result<Option<Partial>> {
    let (Some((out1, lse1)), Some((out2, lse2))) = (&sum, &part) else { return Ok(sum.or(part)) };
    let merged = merge_attention(device, out1, lse1, out2, lse2)?;
    Ok(Some((merged.out, merged.lse)))
}
