//! One call of attention, which begins while keys and values of other groups still come: where the communicator can, and the tokens
//! of all shards are valid, so that what comes is read where it lies.

use std::ops::Range;

use super::{Gather, OWN_SEGMENTS, outputs};
use crate::attention::MaskedAttention;
use crate::attention_mask::AttentionMask;
use crate::call::memory::{Input, Sink, Source};
use crate::call::op::Arrivals;
use crate::device::Device;
use crate::dist::communicator::{DeviceBytes, InPieces, Part};
use crate::dist::digest::Digest;
use crate::dist::kept::{Lent, Room};
use crate::dist::local::{Local, LocalMut};
use crate::dist::pieces::Pieces;
use crate::dist::scores::OnScores;
use crate::dist::transfer::Steps;
use crate::error::Result;
use crate::layout::Layout;
use crate::mask::meta::VarlenMeta;
use crate::primitives::pack_all;
use crate::tensor::{Segments, TensorView, TensorViewMut};

/// Words that kernels read rows in.
const WORD_BYTES: usize = 16;
/// The most bytes of keys, or of values, of a group: the copy engines' largest distance between rows.
const MOST_BYTES: u64 = i32::MAX as u64;

/// Keys and values of one group, all of whose tokens are valid, as they travel: `[2, B, S, Hkv, D]`, keys before values. In memory of a
/// device, which others read and write while this is used.
#[derive(Debug)]
struct Travelling<'a> {
    memory: TensorViewMut<'a>,
    /// `[B, S, Hkv, D]`.
    shape: [usize; 4],
}

impl<'a> Travelling<'a> {
    fn over(memory: &'a mut Lent<'_>, meta: &VarlenMeta, heads: usize) -> Self {
        let memory = memory.view_mut();
        let head_dim = memory.shape()[2];
        Self { memory, shape: [meta.batch(), meta.seq(), heads, head_dim] }
    }

    /// All of its bytes.
    fn bytes(&self) -> Option<DeviceBytes<'a>> {
        let elements = self.memory.layout().numel() as u64;
        match self.memory.alias()?.output().memory {
            Sink::Device(buffer) => Some(DeviceBytes::first(buffer, elements * self.memory.dtype().size() as u64)),
            Sink::Host(_) => None,
        }
    }

    /// What to lend where it was packed.
    fn parts(&self) -> Vec<Part<'a>> {
        let Some(bytes) = self.bytes() else { return Vec::new() };
        let [_, seq, heads, dim] = self.shape;
        let half = bytes.len() / 2;
        let of_rows = |which: u64| Part {
            memory: DeviceBytes::of(bytes.buffer(), which * half..(which + 1) * half),
            pitch: (heads * dim * self.memory.dtype().size()) as u64,
            slice_rows: seq as u64,
        };
        vec![of_rows(0), of_rows(1)]
    }

    /// Copies some heads of keys and values there.
    fn pack(
        &self,
        device: &Device,
        [k, v]: [TensorView<'_>; 2],
        heads: &Range<usize>,
        meta: &VarlenMeta,
    ) -> Result<()> {
        let [batch, seq, of_all, dim] = self.shape;
        let rows = batch * seq;
        let half = |which: usize| -> Result<Option<TensorViewMut<'_>>> {
            let Some(memory) = self.memory.alias() else { return Ok(None) };
            let strides = [of_all * dim, dim, 1].map(|stride| stride as u64);
            let layout = Layout::strided(&[rows, of_all, dim], &strides, (which * of_all * rows * dim) as u64)?;
            memory.with_layout(layout).slice(1, heads.clone()).map(Some)
        };
        let (Some(packed_k), Some(packed_v)) = (half(0)?, half(1)?) else { return Ok(()) };
        let (k, v) = (k.slice(2, heads.clone())?, v.slice(2, heads.clone())?);
        let copies = [("padded", k, "packed", packed_k), ("padded", v, "packed", packed_v)];
        pack_all(device, copies, meta, |op| device.backend()?.execute(op))
    }

    /// Keys (0) or values (1), `[B, S, Hkv, D]`.
    fn padded(&self, which: usize) -> Result<TensorView<'_>> {
        let [batch, seq, heads, dim] = self.shape;
        let strides = [seq * heads * dim, heads * dim, dim, 1].map(|stride| stride as u64);
        let offset = (which * heads * batch * seq * dim) as u64;
        let layout = Layout::strided(&self.shape, &strides, offset)?;
        Ok(self.memory.as_view().with_layout(layout))
    }
}

/// The rows of a `[B, S, Hkv, D]` tensor, for peers to copy from where they lie; nothing where copy engines or peers could not.
fn rows_of<'a>(tensor: TensorView<'a>, can_lend: impl Fn(&DeviceBytes<'_>) -> bool) -> Option<Part<'a>> {
    let Input { memory: Source::Device(buffer), layout, dtype } = tensor.input() else { return None };
    let (&[batch, seq, heads, dim], &[of_batch, of_token, of_head, of_element]) = (layout.shape(), layout.strides())
    else {
        return None;
    };
    let (element, row) = (dtype.size() as u64, (heads * dim) as u64);
    let of_token = if seq > 1 { of_token } else { row };
    let of_batch = if batch > 1 { of_batch } else { of_token * seq as u64 };
    let is_row = (dim == 1 || of_element == 1) && (heads == 1 || of_head == dim as u64) && row > 0;
    let is_regular =
        is_row && of_token >= row && of_batch.is_multiple_of(of_token) && of_batch / of_token >= seq as u64;
    let is_there = layout.end().checked_mul(element).is_some_and(|end| end <= buffer.size());
    let pitch = of_token.checked_mul(element).filter(|&pitch| pitch <= MOST_BYTES)?;
    if !is_regular || !is_there {
        return None;
    }
    let memory = DeviceBytes::of(buffer, layout.offset() * element..layout.end() * element);
    can_lend(&memory).then(|| Part { memory, pitch, slice_rows: of_batch / of_token })
}

impl Gather {
    /// Whether ranks attend in pieces: all come to the same, since groups, masks and calls are the same on each.
    pub(super) fn fits_pieces(&self, steps: &mut Steps<'_>, scores: &OnScores<'_>) -> bool {
        let Self { heads, own_meta, .. } = self;
        let [_, kv_heads] = heads.of_each(self.ulysses);
        let bytes = |meta: &VarlenMeta| (meta.batch() * meta.seq()) as u64 * heads.row_bytes(kv_heads);
        let fits = |meta: &VarlenMeta| meta.is_all_valid() && bytes(meta) <= MOST_BYTES;
        !scores.varies_with_queries()
            && (heads.head_dim * heads.dtype.size()).is_multiple_of(WORD_BYTES)
            && self.before.len() + self.after.len() + OWN_SEGMENTS <= Segments::MAX
            && fits(own_meta)
            && self.sources().all(|source| fits(&source.meta))
            && steps.communicator.moves_memory_of(steps.room.device)
            && steps.communicator.in_pieces().is_some()
    }

    pub(super) fn attend_in_pieces(
        &self,
        steps: &mut Steps<'_>,
        (layer, scores): (&MaskedAttention, &OnScores<'_>),
        [q, k, v]: [Local<'_>; 3],
        (mut out, mut lse): (LocalMut<'_>, Option<TensorViewMut<'_>>),
    ) -> Result<()> {
        const OPERATION: &str = "gathering keys and values in pieces";
        let (room, own_meta) = (steps.room, &self.own_meta);
        let [heads, kv_heads] = self.heads.of_each(self.ulysses);
        let pieces = self.pieces();
        let shards = [k, v].map(|tensor| tensor.parts()[1]);
        let mut communicator = steps.communicator.in_pieces();
        let can_lend =
            |memory: &DeviceBytes<'_>| communicator.as_ref().is_some_and(|communicator| communicator.can_lend(memory));
        let lent = shards.map(|tensor| rows_of(tensor, can_lend));
        let memory_of = |meta: &VarlenMeta| self.memory_of(room, meta);
        // What is not lent where it lies is packed.
        let mut own_memory = if let [Some(_), Some(_)] = lent { None } else { memory_of(own_meta)? };
        let mut memories = self.sources().map(|source| memory_of(&source.meta)).collect::<Result<Vec<_>>>()?;
        let travelling = |memory, meta| Travelling::over(memory, meta, kv_heads);
        let own = own_memory.as_mut().map(|memory| travelling(memory, own_meta));
        let sources = self.sources().zip(&mut memories);
        let came: Vec<_> =
            sources.map(|(source, memory)| memory.as_mut().map(|memory| travelling(memory, &source.meta))).collect();

        let first = pieces.first_heads();
        // Whether there is something to pack.
        let pack = |heads: &Range<usize>| match &own {
            Some(own) if !heads.is_empty() => own.pack(room.device, shards, heads, own_meta).map(|()| true),
            _ => Ok(false),
        };
        pack(&first)?;
        let rooms = self.sources().zip(&came).filter_map(|(source, came)| Some((source.rank, came.as_ref()?.bytes()?)));
        let rows = (own_meta.batch() * own_meta.seq()) as u64;
        let exchange = InPieces {
            operation: OPERATION,
            tag: Digest::new().bytes(&steps.tag).bytes(OPERATION.as_bytes()).tag(),
            own: match (&own, lent) {
                (Some(own), _) => own.parts(),
                (None, [Some(k), Some(v)]) if rows > 0 => vec![k, v],
                _ => Vec::new(),
            },
            own_bytes: rows * self.heads.row_bytes(2 * kv_heads),
            to: self.sources().map(|source| source.rank).collect(),
            rooms: rooms.collect(),
            pieces: &pieces,
        };
        let mut attend = |count: DeviceBytes<'_>, before: u32| -> Result<()> {
            let [k, v] = [(&k, 0), (&v, 1)].map(|(own, which)| self.with_arriving(own, &came, which));
            let scores = scores.part(&self.global(&(0..heads)), Some(&(0..self.keys.seq().min(1))))?;
            let mask = AttentionMask::varlen_cross(&self.query, &self.keys);
            let mask = scores.on(self.ranges.iter().fold(mask, AttentionMask::with_ranges));
            let outputs = outputs(out.heads(&(0..heads))?, lse.as_mut().map(TensorViewMut::reborrow));
            let arrivals = Arrivals { count: Source::Device(count.buffer()), before };
            layer.forward_arriving_into([q.segments(), k?, v?], mask, outputs, arrivals).map(drop)
        };
        match &mut communicator {
            Some(communicator) => {
                communicator.exchange_in_pieces(exchange, &mut || pack(&(first.end..kv_heads)), &mut attend)
            }
            // It is there, as `fits_pieces` has seen.
            None => Ok(()),
        }
    }

    /// The same on every rank, so that each knows what the others write first.
    fn pieces(&self) -> Pieces {
        let [heads, kv_heads] = self.heads.of_each(self.ulysses);
        let own = self.own_meta.seq();
        let longest = self.sources().map(|source| source.meta.seq()).fold(own, usize::max);
        let rows = (self.query.seq() - own + longest) * heads / kv_heads;
        let head_bytes = self.heads.head_dim * self.heads.dtype.size();
        Pieces::new((kv_heads, self.own_meta.batch().max(1)), head_bytes, rows, self.chunks)
    }

    /// Memory for keys and values of a group; none without a token.
    fn memory_of<'k>(&self, room: Room<'k>, meta: &VarlenMeta) -> Result<Option<Lent<'k>>> {
        let [_, kv_heads] = self.heads.of_each(self.ulysses);
        let rows = meta.batch() * meta.seq();
        let shape = [2 * kv_heads, rows, self.heads.head_dim];
        (rows > 0).then(|| room.tensor(self.heads.dtype, &shape)).transpose()
    }

    /// All keys (0) or values (1), in the order of the whole sequence.
    fn with_arriving<'a>(
        &self,
        own: &Local<'a>,
        came: &'a [Option<Travelling<'_>>],
        which: usize,
    ) -> Result<Segments<'a>> {
        let [prefix, shards, suffix] = *own.parts();
        let (before, after) = came.split_at(self.before.len());
        let views = |came: &'a [Option<Travelling<'_>>]| -> Result<Vec<TensorView<'a>>> {
            came.iter().flatten().map(|came| came.padded(which)).collect()
        };
        let all = [vec![prefix], views(before)?, vec![shards], views(after)?, vec![suffix]];
        Ok(all.into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::{Heads, ShardedMeta, Shards};
    use crate::dtype::DType;
    use crate::mask::key_mask::KeyMask;

    /// What a rank writes first is what the others copy first, however unequal their shards.
    #[test]
    fn all_ranks_have_the_same_pieces() -> Result<()> {
        let heads = Heads { num_heads: 24, num_kv_heads: 24, head_dim: 64, dtype: DType::F16 };
        for (lengths, prefix) in [([9000, 700, 2000], 0), ([0, 5000, 40], 30)] {
            let shards = Shards::from_lengths(&lengths)?.with_prefix(prefix)?;
            let groups: Vec<_> = (0..3).map(|rank| rank..rank + 1).collect();
            let of_rank = |rank: usize| -> Result<Pieces> {
                let meta = ShardedMeta::new(&KeyMask::all(2, shards.seq())?, &shards, rank)?;
                Ok(Gather::new(&meta, &groups, (rank, 0), (&heads, 3))?.pieces())
            };
            let first = of_rank(0)?;
            assert_eq!([of_rank(1)?, of_rank(2)?], [first.clone(), first]);
        }
        Ok(())
    }
}
