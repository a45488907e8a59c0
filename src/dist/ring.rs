//! Queries stay; keys and values go round among the groups, and what each adds is merged.
//!
//! Rows are packed throughout: what arrives is attended to and sent on as it is.

use std::ops::Range;
use std::sync::Arc;

use super::kept::{Lent, Room};
use super::local::LocalMut;
use super::mode::Heads;
use super::sharded_meta::{Pieces, ShardedMeta};
use super::transfer::{Rows, Steps};
use crate::attention_outputs::AttentionOutputs;
use crate::dtype::DType;
use crate::error::Result;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;
use crate::merge::merge_attention_into;
use crate::primitives::{VarlenOptions, pack_into, scatter_to_padded_into, varlen_attention_into};
use crate::tensor::TensorView;

/// Attention of one group's queries to the keys of each group in turn.
#[derive(Debug)]
pub(super) struct Ring {
    heads: Heads,
    /// Key heads of this rank.
    kv_heads: usize,
    /// Prefix, own shards and suffix, as far as there are any.
    queries: Vec<Queries>,
    /// Where the own shards lie in the group's tensors.
    own: Range<usize>,
    /// Prefix, own shards and suffix.
    parts: [VarlenMeta; 3],
    /// The keys of each group's shards.
    groups: Vec<VarlenMeta>,
    group: usize,
    /// The ranks to send to and to receive from.
    next: usize,
    previous: usize,
}

/// Some of the queries.
///
/// Those of prefix and suffix are on every rank, and must come to the same bits there: their parts are merged in one order, that of the
/// groups, once all are there. Those of shards are merged as the keys come.
#[derive(Debug)]
struct Queries {
    /// 0 of the prefix, 1 of shards, 2 of the suffix.
    piece: usize,
    is_replicated: bool,
    /// Where they lie in the group's tensors.
    place: Range<usize>,
    meta: VarlenMeta,
    /// The keys of the first part. Of replicated queries: prefix and suffix. Of the others: all that the group has itself, so that
    /// prefix and suffix count once.
    first: Keys,
    /// For the keys of each group.
    ranges: Vec<Option<Arc<KeyRanges>>>,
}

/// Keys that a rank has itself.
#[derive(Debug)]
struct Keys {
    /// Of the group's tensors: those that do not count here are masked.
    meta: VarlenMeta,
    ranges: Option<Arc<KeyRanges>>,
}

/// Packed attention to some keys: output and log-sum-exp.
type Partial<'k> = (Lent<'k>, Lent<'k>);

impl Ring {
    /// `groups`: the ranks of each group. `at`: this rank's place in its own.
    pub(super) fn new(
        meta: &ShardedMeta,
        groups: &[Range<usize>],
        (group, at): (usize, usize),
        heads: &Heads,
    ) -> Result<Self> {
        let (shards, count) = (meta.shards(), groups.len());
        let local = meta.local(&groups[group]);
        let [prefix, own, suffix] = local.clone();
        let places = {
            let (first, second) = (prefix.len(), prefix.len() + own.len());
            [0..first, first..second, second..second + suffix.len()]
        };
        let [_, kv_heads] = heads.of_each(groups[group].len());
        let mut queries = Vec::new();
        for (piece, place) in places.iter().enumerate().filter(|(_, place)| !place.is_empty()) {
            let mut pieces = [0..0, 0..0, 0..0];
            pieces[piece] = local[piece].clone();
            let query = meta.cut(&pieces)?;
            let packed = |keys_meta: &VarlenMeta, keys: &Pieces| -> Result<_> {
                let ranges = meta.cut_ranges(&pieces, keys)?;
                ranges.map(|ranges| ranges.of_packed_rows(&query, keys_meta, false)).transpose()
            };
            let is_replicated = piece != 1;
            let first_keys = match is_replicated {
                true => [prefix.clone(), own.start..own.start, suffix.clone()],
                false => local.clone(),
            };
            let first_meta = meta.cut(&first_keys)?;
            let ranges = groups.iter().map(|ranks| {
                let keys = meta.sharded(ranks);
                packed(&meta.cut(&keys)?, &keys)
            });
            let ranges = ranges.collect::<Result<_>>()?;
            let first = Keys { ranges: packed(&first_meta, &first_keys)?, meta: within(meta, &local, is_replicated)? };
            queries.push(Queries { piece, is_replicated, place: place.clone(), meta: query, first, ranges });
        }
        Ok(Self {
            heads: *heads,
            kv_heads,
            queries,
            own: shards.prefix()..shards.prefix() + own.len(),
            parts: [
                meta.cut(&[prefix.clone(), 0..0, 0..0])?,
                meta.cut(&[0..0, own.clone(), 0..0])?,
                meta.cut(&[0..0, 0..0, suffix.clone()])?,
            ],
            groups: groups.iter().map(|ranks| meta.cut(&meta.sharded(ranks))).collect::<Result<_>>()?,
            group,
            next: groups[(group + 1) % count].start + at,
            previous: groups[(group + count - 1) % count].start + at,
        })
    }

    /// Metadata of prefix, own shards and suffix.
    pub(super) fn parts(&self) -> [&VarlenMeta; 3] {
        self.parts.each_ref()
    }

    pub(super) fn attend(
        &self,
        steps: &mut Steps<'_>,
        options: VarlenOptions<'_>,
        [q, k, v]: [TensorView<'_>; 3],
        out: &mut LocalMut<'_>,
    ) -> Result<()> {
        let (room, count) = (steps.room, self.groups.len());
        let mut sums = Vec::new();
        for queries in &self.queries {
            sums.push(Sum::new(room, queries, q.slice(1, queries.place.clone())?, count)?);
        }
        let own = [k.slice(1, self.own.clone())?, v.slice(1, self.own.clone())?];
        let mut travelling = Rows::pack(room, own, &self.groups[self.group])?;
        for hop in 0..count {
            // What is here now, and what the group before has.
            let held = (self.group + count - hop) % count;
            let coming = (held + count - 1) % count;
            let is_last = hop + 1 == count;
            let mut arriving = match is_last {
                true => None,
                false => {
                    let row = (self.heads.head_dim, self.heads.dtype);
                    Rows::room(room, &self.groups[coming], [self.kv_heads; 2], row)?
                }
            };
            let mut attend = || -> Result<()> {
                for sum in &mut sums {
                    if hop == 0 {
                        sum.add_first([k, v], options)?;
                    }
                    // The first part of a shard's queries has the group's own keys.
                    if hop > 0 || sum.queries.is_replicated {
                        sum.add(held, travelling.as_ref(), &self.groups[held], options)?;
                    }
                }
                Ok(())
            };
            if is_last {
                attend()?;
                break;
            }
            let sends = travelling.iter().map(|rows| (self.next, rows.memory())).collect();
            let receives = arriving.iter_mut().map(|rows| (self.previous, rows.memory_mut())).collect();
            // What goes on is attended to meanwhile.
            steps.exchange(("passing keys and values on", hop), sends, receives, &mut attend)?;
            travelling = arriving;
        }
        for sum in sums {
            let queries = sum.queries;
            let rows = sum.finish()?;
            scatter_to_padded_into(room.device, &*rows, &queries.meta, out.part(queries.piece)?)?;
        }
        Ok(())
    }
}

/// A group's tokens: all, or those of prefix and suffix alone, which shards lie between.
fn within(meta: &ShardedMeta, local: &Pieces, is_replicated: bool) -> Result<VarlenMeta> {
    let whole = meta.cut(local)?;
    if !is_replicated {
        return Ok(whole);
    }
    let (prefix, suffix) = (local[0].len(), whole.seq() - local[2].len());
    whole.among(&[0..prefix, suffix..whole.seq()])
}

/// What some queries have come to.
struct Sum<'a> {
    room: Room<'a>,
    queries: &'a Queries,
    /// `[total_q, H, D]`.
    packed: Lent<'a>,
    /// Of shards: one part, of all keys so far. Of replicated queries: the first part, and one for each group.
    parts: Vec<Option<Partial<'a>>>,
}

impl<'a> Sum<'a> {
    fn new(room: Room<'a>, queries: &'a Queries, q: TensorView<'_>, groups: usize) -> Result<Self> {
        let parts = (0..=groups).map(|_| None).collect();
        let [heads, dim] = [q.shape()[2], q.shape()[3]];
        let mut packed = room.tensor(q.dtype(), &[queries.meta.total_valid(), heads, dim])?;
        pack_into(room.device, q, &queries.meta, &mut *packed)?;
        Ok(Self { room, queries, packed, parts })
    }

    fn add_first(&mut self, pair: [TensorView<'_>; 2], options: VarlenOptions<'_>) -> Result<()> {
        let Keys { meta, ranges } = &self.queries.first;
        let Some(rows) = Rows::pack(self.room, pair, meta)? else { return Ok(()) };
        let pair = [rows.part(0)?, rows.part(1)?];
        self.parts[0] = self.attend(pair, meta, ranges.as_deref(), options)?;
        Ok(())
    }

    /// Keys and values of a group; none if the group has no valid key.
    fn add(
        &mut self,
        group: usize,
        rows: Option<&Rows<'_>>,
        keys: &VarlenMeta,
        options: VarlenOptions<'_>,
    ) -> Result<()> {
        let Some(rows) = rows else { return Ok(()) };
        let pair = [rows.part(0)?, rows.part(1)?];
        let part = self.attend(pair, keys, self.queries.ranges[group].as_deref(), options)?;
        if self.queries.is_replicated {
            self.parts[1 + group] = part;
        } else {
            self.parts[0] = merged(self.room, self.parts[0].take(), part)?;
        }
        Ok(())
    }

    /// Nothing without queries.
    fn attend(
        &self,
        [k, v]: [TensorView<'_>; 2],
        keys: &VarlenMeta,
        ranges: Option<&KeyRanges>,
        options: VarlenOptions<'_>,
    ) -> Result<Option<Partial<'a>>> {
        let query = &self.queries.meta;
        if query.is_empty() {
            return Ok(None);
        }
        let options = VarlenOptions { ranges, ..options };
        let sequences = (query.cu_seqlens(), keys.cu_seqlens());
        let &[total, heads, _] = self.packed.shape() else { return Ok(None) };
        let mut out = self.room.tensor(self.packed.dtype(), self.packed.shape())?;
        let mut lse = self.room.tensor(DType::F32, &[heads, total])?;
        let tensors = [self.packed.view(), k, v];
        varlen_attention_into(
            self.room.device,
            tensors,
            sequences.0,
            sequences.1,
            options,
            &mut *out,
            Some(&mut *lse),
        )?;
        Ok(Some((out, lse)))
    }

    /// The packed output.
    fn finish(self) -> Result<Lent<'a>> {
        let mut sum = None;
        for part in self.parts {
            sum = merged(self.room, sum, part)?;
        }
        match sum {
            Some((rows, _)) => Ok(rows),
            // Valid queries that see no valid key at all come to zeros; without a valid query there are no rows.
            None => {
                let mut zeros = self.room.tensor(self.packed.dtype(), self.packed.shape())?;
                zeros.fill_zeros()?;
                Ok(zeros)
            }
        }
    }
}

/// Both parts together.
fn merged<'k>(room: Room<'k>, sum: Option<Partial<'k>>, part: Option<Partial<'k>>) -> Result<Option<Partial<'k>>> {
    let (Some((out1, lse1)), Some((out2, lse2))) = (&sum, &part) else { return Ok(sum.or(part)) };
    let mut out = room.tensor(out1.dtype(), out1.shape())?;
    let mut lse = room.tensor(DType::F32, lse1.shape())?;
    let outputs = AttentionOutputs::new(&mut *out).with_lse(&mut *lse);
    merge_attention_into(room.device, &**out1, &**lse1, &**out2, &**lse2, outputs)?;
    Ok(Some((out, lse)))
}
