//! One call of attention, which begins while keys and values of other groups still come: where the communicator can, and the tokens
//! of all shards are valid, so that what comes is read where it lies.

use std::ops::Range;

use super::{Gather, OWN_SEGMENTS, outputs};
use crate::attention::MaskedAttention;
use crate::attention_mask::AttentionMask;
use crate::call::memory::{Sink, Source};
use crate::call::op::Arrivals;
use crate::device::Device;
use crate::dist::communicator::{DeviceBytes, InPieces};
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

/// Keys and values of one group, all of whose tokens are valid: `[2, Hkv, B, S, D]`. The heads of one batch row that come in one piece
/// thus lie together. In memory of a device, which others read and write while this is used.
#[derive(Debug)]
struct ByHeads<'a> {
    memory: TensorViewMut<'a>,
    /// `[B, S, Hkv, D]`.
    shape: [usize; 4],
}

impl<'a> ByHeads<'a> {
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
            let strides = [dim, rows * dim, 1].map(|stride| stride as u64);
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
        let strides = [seq * dim, dim, batch * seq * dim, 1].map(|stride| stride as u64);
        let offset = (which * heads * batch * seq * dim) as u64;
        Ok(self.memory.as_view().with_layout(Layout::strided(&self.shape, &strides, offset)?))
    }
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
        let memory_of = |meta: &VarlenMeta| self.memory_by_heads(room, meta);
        let mut own_memory = memory_of(own_meta)?;
        let mut memories = self.sources().map(|source| memory_of(&source.meta)).collect::<Result<Vec<_>>>()?;
        let own = own_memory.as_mut().map(|memory| ByHeads::over(memory, own_meta, kv_heads));
        let sources = self.sources().zip(&mut memories);
        let came: Vec<_> = sources
            .map(|(source, memory)| memory.as_mut().map(|memory| ByHeads::over(memory, &source.meta, kv_heads)))
            .collect();

        let rows = self.query.seq() * heads / kv_heads;
        let pieces = Pieces::new((kv_heads, own_meta.batch().max(1)), rows, self.chunks);
        let first = pieces.first_heads();
        let shards = [k, v].map(|tensor| tensor.parts()[1]);
        // Whether there is something to pack.
        let pack = |heads: &Range<usize>| match &own {
            Some(own) if !heads.is_empty() => own.pack(room.device, shards, heads, own_meta).map(|()| true),
            _ => Ok(false),
        };
        pack(&first)?;
        let rooms = self.sources().zip(&came).filter_map(|(source, came)| Some((source.rank, came.as_ref()?.bytes()?)));
        let exchange = InPieces {
            operation: OPERATION,
            tag: Digest::new().bytes(&steps.tag).bytes(OPERATION.as_bytes()).tag(),
            own: own.as_ref().and_then(ByHeads::bytes),
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
        match steps.communicator.in_pieces() {
            Some(communicator) => {
                communicator.exchange_in_pieces(exchange, &mut || pack(&(first.end..kv_heads)), &mut attend)
            }
            // It is there, as `fits_pieces` has seen.
            None => Ok(()),
        }
    }

    /// Memory for keys and values of a group; none without a token.
    fn memory_by_heads<'k>(&self, room: Room<'k>, meta: &VarlenMeta) -> Result<Option<Lent<'k>>> {
        let [_, kv_heads] = self.heads.of_each(self.ulysses);
        let rows = meta.batch() * meta.seq();
        let shape = [2 * kv_heads, rows, self.heads.head_dim];
        (rows > 0).then(|| room.tensor(self.heads.dtype, &shape)).transpose()
    }

    /// All keys (0) or values (1), in the order of the whole sequence.
    fn with_arriving<'a>(
        &self,
        own: &Local<'a>,
        came: &'a [Option<ByHeads<'_>>],
        which: usize,
    ) -> Result<Segments<'a>> {
        let [prefix, shards, suffix] = *own.parts();
        let (before, after) = came.split_at(self.before.len());
        let views = |came: &'a [Option<ByHeads<'_>>]| -> Result<Vec<TensorView<'a>>> {
            came.iter().flatten().map(|came| came.padded(which)).collect()
        };
        let all = [vec![prefix], views(before)?, vec![shards], views(after)?, vec![suffix]];
        Ok(all.into_iter().flatten().collect())
    }
}
