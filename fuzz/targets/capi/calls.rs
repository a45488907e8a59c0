//! The calls: what each is given, what the header allows, and what it writes.

use std::ptr::{null, null_mut, without_provenance_mut};

use arbitrary::Arbitrary;

use crate::memory::{ARENA_BYTES, At, Slot, Spot};
use crate::session::{Handle, Kind, Ref, Session, Sizes, free};
use crate::tensor::{self, F32, Fault, Size, Tensors, enum_of};
use crate::types::{
    varlen_fa_attention_mask, varlen_fa_attention_options, varlen_fa_cu_seqlens, varlen_fa_device,
    varlen_fa_device_info, varlen_fa_device_meta, varlen_fa_key_mask, varlen_fa_key_range, varlen_fa_key_ranges,
    varlen_fa_mask_view, varlen_fa_meta, varlen_fa_meta_info, varlen_fa_plan, varlen_fa_ranges_of, varlen_fa_run,
    varlen_fa_status, varlen_fa_tensor,
};
use crate::{attention, device, device_meta, key_ranges, mask_values, masks, primitives};

/// Masks of more tokens, up to the limit, would be built, and take their time and memory by right.
const MAX_TOKENS: u64 = 1 << 15;

#[derive(Debug, Arbitrary)]
pub enum Call {
    Open { kind: u8, ordinal: u8, place: At },
    Describe { device: Ref, place: At },
    Synchronize(Ref),
    MaskFromIntegers { at: Spot, element: u8, batch: Size, seq: Size, place: At },
    MaskFromLengths { at: Spot, lengths: Option<Vec<u8>>, batch: Size, seq: Size, place: At },
    MaskFromRuns { at: Spot, runs: Option<Vec<[u8; 3]>>, count: Size, batch: Size, seq: Size, place: At },
    Meta { mask: Ref, place: At },
    DescribeMeta { meta: Ref, place: At },
    Upload { meta: Ref, device: Ref },
    Copy { meta: Ref, what: u8, at: Spot, count: Option<Size> },
    CuSeqlens { at: Spot, values: Option<Vec<u8>>, count: Size, place: At },
    CuSeqlensOfMeta { meta: Ref, place: At },
    DeviceMeta { device: Ref, batch: Size, seq: Size, place: At },
    Rebuild { meta: Ref, view: View },
    Free { kind: Kind, handle: Ref },
    Forward { attend: Attend, mask: MaskSpec, at: At },
    VarlenAttention { attend: Attend, sequences: [Ref; 2], lse: bool },
    Pack(Move),
    Scatter(Move),
    MetaFromDocuments { at: Spot, ids: Option<Vec<u8>>, batch: Size, seq: Size, place: At },
    Window { of: RangesOf, sides: [Side; 2], place: At },
    Prefix { of: RangesOf, count: Size, place: At },
    RangesFromValues { of: RangesOf, at: Spot, values: Option<Vec<[u8; 2]>>, count: Option<Size>, place: At },
    Intersect { ranges: [Ref; 2], place: At },
    MaskFromValues { at: Spot, element: u8, is_additive: bool, batch: Size, seq: Size, place: At },
    Broadcast { mask: Ref, batch: Size, place: At },
}

/// Keys before or after a query.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Side {
    NoLimit,
    Keys(u8),
    Any(i64),
}

impl Side {
    fn get(self) -> i64 {
        match self {
            Self::NoLimit => -1,
            Self::Keys(count) => count.into(),
            Self::Any(count) => count,
        }
    }
}

/// What ranges are made for: packed sequences, or sizes.
#[derive(Debug, Arbitrary)]
pub struct RangesOf {
    sequences: Option<[Ref; 2]>,
    sizes: [Size; 3],
    stray: u8,
    at: At,
}

/// A `[B, S]` mask in memory: of the metadata's size, but for the faults.
#[derive(Debug, Arbitrary)]
pub struct View {
    at: Spot,
    dtype: u32,
    wide: bool,
    faults: Vec<(u8, Size)>,
    place: At,
}

/// What both attention calls share.
#[derive(Debug, Arbitrary)]
pub struct Attend {
    device: Ref,
    /// Batch rows, tokens of queries and of keys, heads of keys, heads of queries for each, head
    /// dimension.
    sizes: [u8; 6],
    dtype: u8,
    rows: [u8; 4],
    options: Option<OptionsSpec>,
    plan: At,
    faults: Vec<Fault>,
}

#[derive(Debug, Arbitrary)]
struct OptionsSpec {
    has_scale: u8,
    scale: f32,
    path: u8,
    kernel: u8,
    reserved: u8,
    ranges: Option<Ref>,
    at: At,
}

/// The mask of a call: of a kind, with the handles that the kind needs and, now and then, others.
#[derive(Debug, Arbitrary)]
pub struct MaskSpec {
    kind: u8,
    handles: [Ref; 2],
    /// Takes batch and tokens from the handles.
    fits: bool,
    /// Rank of the bias, and which of its dimensions are 1.
    bias: u8,
    bias_is_f32: bool,
    /// A bias also where the kind asks for none.
    has_bias: bool,
    ranges: Option<Ref>,
    stray: u8,
}

/// Tensors of packing and scattering.
#[derive(Debug, Arbitrary)]
pub struct Move {
    device: Ref,
    meta: Ref,
    sizes: [u8; 3],
    dtype: u8,
    rows: [u8; 3],
    faults: Vec<Fault>,
}

/// A number that is mostly one of these, else any.
fn among(byte: u8, count: u8) -> u32 {
    u32::from(if byte < 240 { byte % count } else { byte })
}

fn tokens(batch: u64, seq: u64) -> u64 {
    batch.max(1).saturating_mul(seq.max(1))
}

/// Sizes that are small, or that must be refused.
fn not_between(batch: u64, seq: u64) -> (u64, u64) {
    match (MAX_TOKENS..=i32::MAX as u64).contains(&tokens(batch, seq)) {
        true => (batch % 5, seq % 40),
        false => (batch, seq),
    }
}

impl Session {
    /// An array of `count` elements, for a call that reads or writes it; the count is cut to what
    /// the memory holds, unless the call must refuse it unseen.
    fn array<T>(&mut self, at: Spot, count: u64) -> (*mut T, u64) {
        let (pointer, count) = self.array_of(at, [size_of::<T>(), align_of::<T>()], count);
        (pointer.cast(), count)
    }

    /// The same of elements of this size and alignment.
    fn array_of(&mut self, at: Spot, [size, align]: [usize; 2], count: u64) -> (*mut u8, u64) {
        let pointer = at.pointer(&mut self.arena);
        let is_wild = u128::from(count) * size as u128 + pointer.addr() as u128 > isize::MAX as u128;
        let owned = self.arena.owned(pointer.addr());
        if is_wild || owned == 0 || !pointer.addr().is_multiple_of(align) {
            return (pointer, count);
        }
        (pointer, count.min(owned / size as u64))
    }

    fn offset_of<T>(&mut self, pointer: *mut T) -> Option<usize> {
        let owned = self.arena.owned(pointer.addr());
        (owned > 0).then(|| ARENA_BYTES - owned as usize)
    }
}

pub fn run(session: &mut Session, call: &Call) {
    match call {
        Call::Open { kind, ordinal, place } => {
            // Other kinds open a driver, which is no matter of the border.
            let kind = match among(*kind, 4) {
                0 | 2 => 1,
                kind => kind,
            };
            let (ordinal, mut slot) = (if *ordinal < 200 { 0 } else { u32::from(*ordinal) }, Slot::new(*place));
            // SAFETY: a place for a handle, or none; as in all calls below, where arrays are as
            // long as said, unless the call must refuse them before it looks.
            let status = unsafe { device::varlen_fa_device_open(enum_of(kind), ordinal, slot.pointer()) };
            let made = session.made(call, status, &mut slot, Kind::Device, Sizes::default());
            assert_eq!(made.is_some(), kind == 1 && ordinal == 0 && place.is_good(), "{call:?}: {status:?}");
        }
        Call::Describe { device, place } => {
            let (handle, mut slot) =
                (session.handle::<varlen_fa_device>(Kind::Device, *device), Slot::<varlen_fa_device_info>::new(*place));
            // SAFETY: as above.
            let status = unsafe { device::varlen_fa_device_describe(handle.pointer, slot.pointer()) };
            session.judge(call, status, [], Some(handle.object.is_some() && place.is_good()));
            slot.result(status == varlen_fa_status::Ok);
        }
        Call::Synchronize(device) => {
            let handle = session.handle(Kind::Device, *device);
            let status = device::varlen_fa_device_synchronize(handle.pointer);
            session.judge(call, status, [], Some(handle.object.is_some()));
        }
        Call::MaskFromIntegers { at, element, batch, seq, place } => {
            let element = if *element < 240 { 1 << (element % 4) } else { u32::from(*element) };
            let (mut batch, mut seq) = not_between(batch.get(), seq.get());
            let count = batch.saturating_mul(seq);
            let size = if matches!(element, 2 | 4 | 8) { element as usize } else { 1 };
            let (pointer, held) = session.array_of(*at, [size; 2], count);
            if held < count {
                (batch, seq) = (batch.min(1), seq.min(held));
            }
            let mut slot = Slot::new(*place);
            // SAFETY: as above.
            let status = unsafe {
                masks::varlen_fa_key_mask_from_integers(pointer.cast(), enum_of(element), batch, seq, slot.pointer())
            };
            session.made(call, status, &mut slot, Kind::KeyMask, Sizes { batch, seq, total: 0 });
        }
        // Numbers that happen to be in memory: most are refused.
        Call::MaskFromValues { at, element, is_additive, batch, seq, place } => {
            let element = among(*element, 4);
            let (mut batch, mut seq) = not_between(batch.get(), seq.get());
            let count = batch.saturating_mul(seq);
            let (element, size) = match (is_additive, element) {
                (true, F32) => (F32, 4),
                (true, element) => (element, 2),
                (false, element) => (1 << element.min(5), 1 << element.min(3)),
            };
            let (pointer, held) = session.array_of(*at, [size; 2], count);
            if held < count {
                (batch, seq) = (batch.min(1), seq.min(held));
            }
            let (mask, mut slot) = (pointer.cast(), Slot::new(*place));
            let status = match is_additive {
                // SAFETY: as above.
                true => unsafe {
                    mask_values::varlen_fa_key_mask_from_additive(mask, enum_of(element), batch, seq, slot.pointer())
                },
                // SAFETY: as above.
                false => unsafe {
                    let element = enum_of(element);
                    mask_values::varlen_fa_key_mask_from_integers_strict(mask, element, batch, seq, slot.pointer())
                },
            };
            session.made(call, status, &mut slot, Kind::KeyMask, Sizes { batch, seq, total: 0 });
        }
        Call::MaskFromLengths { at, lengths, batch, seq, place } => {
            let (batch, seq) = not_between(batch.get(), seq.get());
            let (pointer, mut batch) = session.array::<u64>(*at, batch);
            if let (Some(lengths), Some(offset)) = (lengths, session.offset_of(pointer)) {
                batch = batch.min(lengths.len() as u64);
                session.arena.put(offset, lengths.iter().map(|&length| u64::from(length).to_ne_bytes()));
            }
            let mut slot = Slot::new(*place);
            // SAFETY: as above.
            let status = unsafe { masks::varlen_fa_key_mask_from_lengths(pointer, batch, seq, slot.pointer()) };
            session.made(call, status, &mut slot, Kind::KeyMask, Sizes { batch, seq, total: 0 });
        }
        Call::MaskFromRuns { at, runs, count, batch, seq, place } => {
            let (batch, seq) = not_between(batch.get(), seq.get());
            let (pointer, mut count) = session.array::<varlen_fa_run>(*at, count.get());
            if let (Some(runs), Some(offset)) = (runs, session.offset_of(pointer)) {
                count = count.min(runs.len() as u64);
                let bytes = runs.iter().flatten().map(|&value| u64::from(value).to_ne_bytes());
                session.arena.put(offset, bytes);
            }
            let mut slot = Slot::new(*place);
            // SAFETY: as above.
            let status = unsafe { masks::varlen_fa_key_mask_from_runs(pointer, count, batch, seq, slot.pointer()) };
            session.made(call, status, &mut slot, Kind::KeyMask, Sizes { batch, seq, total: 0 });
        }
        Call::Broadcast { mask, batch, place } => {
            let handle: Handle<varlen_fa_key_mask> = session.handle(Kind::KeyMask, *mask);
            let seq = handle.object.map_or(1, |sizes| sizes.seq);
            let (batch, _) = not_between(batch.get(), seq);
            let mut slot = Slot::new(*place);
            // SAFETY: as above.
            let status = unsafe { mask_values::varlen_fa_key_mask_broadcast(handle.pointer, batch, slot.pointer()) };
            session.made(call, status, &mut slot, Kind::KeyMask, Sizes { batch, seq, total: 0 });
        }
        Call::Meta { mask, place } => {
            let handle: Handle<varlen_fa_key_mask> = session.handle(Kind::KeyMask, *mask);
            let mut slot = Slot::new(*place);
            // SAFETY: as above.
            let status = unsafe { masks::varlen_fa_meta_create(handle.pointer, slot.pointer()) };
            session.judge(call, status, [], Some(handle.object.is_some() && place.is_good()));
            let sizes = slot.result(status == varlen_fa_status::Ok).map_or(Sizes::default(), |meta| describe(meta).1);
            session.made(call, status, &mut slot, Kind::Meta, sizes);
        }
        Call::DescribeMeta { meta, place } => {
            let handle: Handle<varlen_fa_meta> = session.handle(Kind::Meta, *meta);
            let mut slot = Slot::<varlen_fa_meta_info>::new(*place);
            // SAFETY: as above.
            let status = unsafe { masks::varlen_fa_meta_describe(handle.pointer, slot.pointer()) };
            session.judge(call, status, [], Some(handle.object.is_some() && place.is_good()));
            let info = slot.result(status == varlen_fa_status::Ok);
            if let (Some(info), Some(sizes)) = (info, handle.object) {
                assert_eq!((info.batch, info.seq, info.total_valid), (sizes.batch, sizes.seq, sizes.total));
            }
        }
        Call::Upload { meta, device } => {
            let meta = session.handle(Kind::Meta, *meta);
            let device = session.handle(Kind::Device, *device);
            let status = masks::varlen_fa_meta_upload(meta.pointer, device.pointer);
            session.judge(call, status, [], Some(meta.object.is_some() && device.object.is_some()));
        }
        Call::Copy { meta, what, at, count } => copy(session, call, *meta, *what, *at, *count),
        Call::CuSeqlens { at, values, count, place } => {
            let (pointer, mut count) = session.array::<i32>(*at, count.get());
            if let (Some(values), Some(offset)) = (values, session.offset_of(pointer)) {
                // Differences, so that most sequences are sound; the first of them is dropped to
                // start at 0.
                let mut sum = 0;
                let sums = values.iter().enumerate().map(|(at, &value)| {
                    sum += if at == 0 { 0 } else { i32::from(value % 16) };
                    sum.to_ne_bytes()
                });
                session.arena.put(offset, sums.collect::<Vec<_>>());
                count = count.min(values.len() as u64);
            }
            let last = session.offset_of(pointer).zip(count.checked_sub(1));
            let last = last.map(|(offset, last)| offset.saturating_add((last as usize).saturating_mul(4)));
            let total = last.map_or(0, |last| session.arena.i32_at(last).max(0) as u64);
            let mut slot = Slot::new(*place);
            // SAFETY: as above.
            let status = unsafe { masks::varlen_fa_cu_seqlens_create(pointer, count, slot.pointer()) };
            let sizes = Sizes { batch: count.saturating_sub(1), seq: 0, total };
            session.made(call, status, &mut slot, Kind::CuSeqlens, sizes);
        }
        Call::CuSeqlensOfMeta { meta, place } => {
            let handle: Handle<varlen_fa_meta> = session.handle(Kind::Meta, *meta);
            let mut slot = Slot::new(*place);
            // SAFETY: as above.
            let status = unsafe { masks::varlen_fa_cu_seqlens_from_meta(handle.pointer, slot.pointer()) };
            let made = session.made(call, status, &mut slot, Kind::CuSeqlens, handle.object.unwrap_or_default());
            assert_eq!(made.is_some(), handle.object.is_some() && place.is_good(), "{call:?}: {status:?}");
        }
        Call::DeviceMeta { device, batch, seq, place } => {
            let handle: Handle<varlen_fa_device> = session.handle(Kind::Device, *device);
            let (batch, seq) = not_between(batch.get(), seq.get());
            let mut slot = Slot::new(*place);
            // SAFETY: as above.
            let status =
                unsafe { device_meta::varlen_fa_device_meta_create(handle.pointer, batch, seq, slot.pointer()) };
            let made = session.made(call, status, &mut slot, Kind::DeviceMeta, Sizes { batch, seq, total: 0 });
            let is_sound = handle.object.is_some() && place.is_good() && tokens(batch, seq) < MAX_TOKENS;
            assert!(made.is_some() == is_sound || batch == 0 || seq == 0, "{call:?}: {status:?}");
        }
        Call::Rebuild { meta, view } => rebuild(session, call, *meta, view),
        Call::Free { kind, handle } => {
            let handle: Handle<varlen_fa_device> = session.handle(*kind, *handle);
            let status = free(*kind, handle.pointer.addr());
            session.freed(call, status, handle.pointer.addr(), *kind);
        }
        Call::Forward { attend, mask, at } => forward(session, call, attend, mask, *at),
        Call::VarlenAttention { attend, sequences, lse } => varlen_attention(session, call, attend, *sequences, *lse),
        Call::Pack(tensors) => pack(session, call, tensors),
        Call::Scatter(tensors) => scatter(session, call, tensors),
        Call::MetaFromDocuments { at, ids, batch, seq, place } => {
            let (mut batch, mut seq) = not_between(batch.get(), seq.get());
            let count = batch.saturating_mul(seq);
            let (pointer, held) = session.array::<u32>(*at, count);
            if held < count {
                (batch, seq) = (batch.min(1), seq.min(held));
            }
            if let (Some(ids), Some(offset)) = (ids, session.offset_of(pointer)) {
                session.arena.put(offset, ids.iter().map(|&id| u32::from(id % 4).to_ne_bytes()));
            }
            let mut slot = Slot::new(*place);
            // SAFETY: as above.
            let status = unsafe { masks::varlen_fa_meta_from_document_ids(pointer, batch, seq, slot.pointer()) };
            let sizes = slot.result(status == varlen_fa_status::Ok).map_or(Sizes::default(), |meta| describe(meta).1);
            session.has_documents |= session.made(call, status, &mut slot, Kind::Meta, sizes).is_some();
        }
        Call::Window { of, sides, place } => {
            let (mut of, sizes) = of.made(session);
            let mut slot = Slot::new(*place);
            let [left, right] = sides.map(Side::get);
            // SAFETY: as above.
            let status = unsafe { key_ranges::varlen_fa_key_ranges_window(of.pointer(), left, right, slot.pointer()) };
            let made = session.made(call, status, &mut slot, Kind::KeyRanges, sizes.unwrap_or_default());
            let is_sound = sizes.is_some() && left.min(right) >= -1 && place.is_good();
            assert_eq!(made.is_some(), is_sound, "{call:?}: {status:?}");
        }
        Call::Prefix { of, count, place } => {
            let (mut of, sizes) = of.made(session);
            let mut slot = Slot::new(*place);
            // SAFETY: as above.
            let status = unsafe { key_ranges::varlen_fa_key_ranges_prefix(of.pointer(), count.get(), slot.pointer()) };
            let made = session.made(call, status, &mut slot, Kind::KeyRanges, sizes.unwrap_or_default());
            assert_eq!(made.is_some(), sizes.is_some() && place.is_good(), "{call:?}: {status:?}");
        }
        Call::RangesFromValues { of, at, values, count, place } => {
            let total = of.queries(session);
            let (mut of, sizes) = of.made(session);
            let (pointer, count) = session.array::<varlen_fa_key_range>(*at, count.map_or(total, Size::get));
            if let (Some(values), Some(offset)) = (values, session.offset_of(pointer)) {
                let bytes = values.iter().flatten().map(|&value| u64::from(value % 16).to_ne_bytes());
                session.arena.put(offset, bytes);
            }
            let mut slot = Slot::new(*place);
            // SAFETY: as above.
            let status =
                unsafe { key_ranges::varlen_fa_key_ranges_from_values(of.pointer(), pointer, count, slot.pointer()) };
            let made = session.made(call, status, &mut slot, Kind::KeyRanges, sizes.unwrap_or_default());
            let may_be = sizes.is_some() && count == total && place.is_good();
            assert!(made.is_none() || may_be, "{call:?}: accepted");
        }
        Call::Intersect { ranges, place } => {
            let [one, other] = ranges.map(|given| session.handle::<varlen_fa_key_ranges>(Kind::KeyRanges, given));
            let mut slot = Slot::new(*place);
            // SAFETY: as above.
            let status =
                unsafe { key_ranges::varlen_fa_key_ranges_intersect(one.pointer, other.pointer, slot.pointer()) };
            let sizes = one.object.filter(|sizes| other.object.is_some_and(|other| other == *sizes));
            let made = session.made(call, status, &mut slot, Kind::KeyRanges, sizes.unwrap_or_default());
            let is_sound = sizes.is_some() && place.is_good();
            // Packed ones may be of other sequences.
            let is_known = !is_sound || sizes != Some(Sizes::PACKED);
            assert!(made.is_some() == is_sound || !is_known, "{call:?}: {status:?}");
        }
    }
}

impl RangesOf {
    /// B, Sq and Sk: small, or such that they must be refused.
    fn padded(&self) -> [u64; 3] {
        let [batch, seq_q, seq_k] = self.sizes.map(Size::get);
        let is_between = |seq| (MAX_TOKENS..=i32::MAX as u64).contains(&tokens(batch, seq));
        if is_between(seq_q) || is_between(seq_k) {
            return [batch % 5, seq_q % 40, seq_k % 40];
        }
        [batch, seq_q, seq_k]
    }

    /// Queries of all rows.
    fn queries(&self, session: &Session) -> u64 {
        match self.sequences {
            None => self.padded()[0].saturating_mul(self.padded()[1]),
            Some([query, _]) => {
                let query = session.handle::<varlen_fa_cu_seqlens>(Kind::CuSeqlens, query);
                query.object.map_or(0, |sizes| sizes.total)
            }
        }
    }

    /// The struct, and the sizes of ranges for it, if the header allows it.
    fn made(&self, session: &Session) -> (Slot<varlen_fa_ranges_of>, Option<Sizes>) {
        let mut of = varlen_fa_ranges_of {
            batch: 0,
            seq_q: 0,
            seq_k: 0,
            cu_seqlens_q: null(),
            cu_seqlens_k: null(),
            reserved: [0; 4],
        };
        let mut sizes = None;
        if let Some(sequences) = self.sequences {
            let [query, key] = sequences.map(|given| session.handle(Kind::CuSeqlens, given));
            (of.cu_seqlens_q, of.cu_seqlens_k) = (query.pointer, key.pointer);
            let batch = |handle: Handle<varlen_fa_cu_seqlens>| handle.object.map(|sizes| sizes.batch);
            if batch(query).is_some() && batch(query) == batch(key) {
                sizes = Some(Sizes::PACKED);
            } else if query.pointer.is_null() && key.pointer.is_null() {
                // That is padded tensors of no size.
                sizes = Some(Sizes::default());
            }
            if self.stray >= 248 {
                of.seq_k = self.stray.into();
                sizes = sizes.filter(|&sizes| sizes != Sizes::PACKED).map(|sizes| Sizes { total: of.seq_k, ..sizes });
            }
        } else {
            let [batch, seq_q, seq_k] = self.padded();
            (of.batch, of.seq_q, of.seq_k) = (batch, seq_q, seq_k);
            let fits = |seq: u64| (u128::from(batch) * u128::from(seq)).max(batch.into()) <= i32::MAX as u128;
            sizes = (fits(seq_q) && fits(seq_k)).then_some(Sizes { batch, seq: seq_q, total: seq_k });
        }
        if (240..248).contains(&self.stray) {
            of.reserved[usize::from(self.stray % 4)] = 1;
            sizes = None;
        }
        (Slot::of(of, self.at), sizes.filter(|_| self.at.is_good()))
    }
}

/// What live metadata says of itself.
fn describe(meta: *const varlen_fa_meta) -> (varlen_fa_status, Sizes) {
    let mut slot = Slot::<varlen_fa_meta_info>::new(At::GOOD);
    // SAFETY: as in `run`.
    let status = unsafe { masks::varlen_fa_meta_describe(meta, slot.pointer()) };
    let info = slot.result(status == varlen_fa_status::Ok);
    let sizes =
        info.map(|info| Sizes { batch: info.batch, seq: info.seq, total: info.total_valid }).unwrap_or_default();
    (status, sizes)
}

fn copy(session: &mut Session, call: &Call, meta: Ref, what: u8, at: Spot, count: Option<Size>) {
    let handle: Handle<varlen_fa_meta> = session.handle(Kind::Meta, meta);
    let sizes = handle.object.unwrap_or_default();
    let right = match what % 3 {
        0 => sizes.total,
        1 => sizes.batch.wrapping_mul(sizes.seq),
        _ => sizes.batch + 1,
    };
    let (pointer, count) = session.array::<u32>(at, count.map_or(right, Size::get));
    // SAFETY: as in `run`.
    let status = unsafe {
        match what % 3 {
            0 => masks::varlen_fa_meta_copy_indices(handle.pointer, pointer, count),
            1 => masks::varlen_fa_meta_copy_inv_indices(handle.pointer, pointer.cast(), count),
            _ => masks::varlen_fa_meta_copy_cu_seqlens(handle.pointer, pointer.cast(), count),
        }
    };
    let is_place = count == 0 || (session.arena.owned(pointer.addr()) > 0 && pointer.is_aligned());
    let is_sound = handle.object.is_some() && count == right && is_place;
    let written = (is_sound && count > 0).then(|| (pointer.addr(), count as usize * 4));
    session.judge(call, status, written, Some(is_sound));
}

fn rebuild(session: &mut Session, call: &Call, meta: Ref, view: &View) {
    let handle: Handle<varlen_fa_device_meta> = session.handle(Kind::DeviceMeta, meta);
    let sizes = handle.object.unwrap_or_default();
    let dtype = if view.dtype < u32::MAX / 2 { 1 << (view.dtype % 4) } else { view.dtype };
    let step = if view.wide { 3 } else { 1 };
    let data = view.at.pointer(&mut session.arena);
    let mut mask = varlen_fa_mask_view {
        data: data.cast(),
        bytes: u64::MAX,
        dtype: enum_of(dtype),
        memory: enum_of(0),
        shape: [sizes.batch, sizes.seq],
        strides: [sizes.seq.wrapping_mul(step) as i64, step as i64],
        reserved: [0; 2],
    };
    for (field, size) in &view.faults {
        match field % 6 {
            0 => mask.bytes = size.get(),
            1 => mask.memory = enum_of(size.get() as u32),
            2 => mask.shape[usize::from(field / 6) % 2] = size.get(),
            3 => mask.strides[usize::from(field / 6) % 2] = size.get() as i64,
            4 => mask.reserved[usize::from(field / 6) % 2] = size.get(),
            _ => mask.dtype = enum_of(size.get() as u32),
        }
    }
    mask.bytes = mask.bytes.min(session.arena.owned(data.addr()));
    let mut slot = Slot::of(mask, view.place);
    // SAFETY: as in `run`.
    let status = unsafe { device_meta::varlen_fa_device_meta_rebuild(handle.pointer, slot.pointer()) };
    if status == varlen_fa_status::Ok {
        assert!(handle.object.is_some() && view.place.is_good(), "{call:?}: accepted");
        assert_eq!((mask.shape, mask.reserved), ([sizes.batch, sizes.seq], [0; 2]), "{call:?}: accepted");
    }
    session.judge(call, status, [], None);
}

impl OptionsSpec {
    fn value(&self, ranges: *const varlen_fa_key_ranges) -> varlen_fa_attention_options {
        varlen_fa_attention_options {
            has_softmax_scale: among(self.has_scale, 2),
            softmax_scale: self.scale,
            path: enum_of(among(self.path, 5)),
            kernel: enum_of(among(self.kernel, 2)),
            ranges,
            modifiers: null(),
            reserved: [u64::from(self.reserved >= 240), 0],
        }
    }

    /// Whether the header allows the options; whether they apply to a call is the library's matter.
    fn is_sound(&self) -> bool {
        let value = self.value(null());
        let scale = value.has_softmax_scale == 0 || (value.has_softmax_scale == 1 && self.scale.is_finite());
        let numbers = [(self.path, 5), (self.kernel, 2)].iter().all(|&(byte, count)| among(byte, count) < count.into());
        self.at.is_null() || (self.at.is_good() && scale && numbers && self.reserved < 240)
    }

    /// Whether they are the defaults, which apply to every call.
    fn is_plain(&self) -> bool {
        self.at.is_null() || (self.is_sound() && among(self.path, 5) == 0 && among(self.kernel, 2) == 0)
    }
}

/// Sizes of an attention call.
struct Shape {
    q: [u64; 4],
    k: [u64; 4],
    dtype: u32,
}

impl Attend {
    fn shape(&self) -> Shape {
        let [batch, seq_q, seq_k, kv_heads, group, dim] = self.sizes.map(u64::from);
        // Multiples of 8, and others.
        let (kv_heads, dim) = (kv_heads % 2 + 1, if dim < 192 { (dim % 4 + 1) * 8 } else { dim - 191 });
        Shape {
            q: [batch % 4, seq_q % 10, kv_heads * (group % 2 + 1), dim],
            k: [batch % 4, seq_k % 10, kv_heads, dim],
            dtype: u32::from(self.dtype % 3) + 1,
        }
    }

    /// The struct, and its ranges, if it is one that is read.
    fn options(
        &self,
        session: &Session,
    ) -> (Option<Slot<varlen_fa_attention_options>>, Option<Handle<varlen_fa_key_ranges>>) {
        let given = self.options.as_ref().and_then(|options| options.ranges);
        let ranges = given.map(|given| session.handle::<varlen_fa_key_ranges>(Kind::KeyRanges, given));
        let pointer = ranges.map_or(null(), |ranges| ranges.pointer.cast_const());
        let slot = self.options.as_ref().map(|options| Slot::of(options.value(pointer), options.at));
        let is_read = self.options.as_ref().is_some_and(|options| options.at.is_good());
        (slot, ranges.filter(|ranges| is_read && !ranges.pointer.is_null()))
    }

    fn options_are_sound(&self) -> bool {
        self.options.as_ref().is_none_or(OptionsSpec::is_sound)
    }

    fn options_are_plain(&self) -> bool {
        self.options.as_ref().is_none_or(OptionsSpec::is_plain)
    }

    fn plan_is_sound(&self) -> bool {
        self.plan.is_good() || self.plan.is_null()
    }
}

/// Whether shapes fit as attention needs them: q and out, k and v, with `outer` dimensions before
/// heads.
fn attention_fits(tensors: &Tensors, outer: usize) -> bool {
    let rank = outer + 2;
    let [q, k, v, out] = [0, 1, 2, 3].map(|at| tensors.shape(at, rank));
    let (heads, kv_heads, dim) = (q[outer], k[outer], q[outer + 1]);
    let dtypes_agree = (1..4).all(|at| tensors.dtype(at) == tensors.dtype(0));
    let heads_fit = if kv_heads == 0 { heads == 0 } else { heads.is_multiple_of(kv_heads) };
    q == out
        && k == v
        && heads_fit
        && dim == k[outer + 1]
        && (1..=512).contains(&dim)
        && dtypes_agree
        && (outer == 1 || q[0] == k[0])
        && (0..4).all(|at| inner_is_contiguous(tensors, at, rank))
}

fn inner_is_contiguous(tensors: &Tensors, at: usize, rank: usize) -> bool {
    let has_elements = !tensors.shape(at, rank).contains(&0);
    !has_elements || tensors.shape(at, rank)[rank - 1] <= 1 || tensors.all[at].strides[rank - 1] == 1
}

fn pointer_of<T>(slot: &mut Option<Slot<T>>) -> *mut T {
    slot.as_mut().map_or(null_mut(), Slot::pointer)
}

fn forward(session: &mut Session, call: &Call, attend: &Attend, spec: &MaskSpec, at: At) {
    let device: Handle<varlen_fa_device> = session.handle(Kind::Device, attend.device);
    let kind = if spec.kind < 240 { u32::from(spec.kind % 7) } else { spec.kind.into() };
    let handle_kind = match kind {
        1 => Kind::KeyMask,
        5 | 6 => Kind::DeviceMeta,
        _ => Kind::Meta,
    };
    let handles = spec.handles.map(|given| session.handle::<()>(handle_kind, given));
    let ranges = spec.ranges.map(|given| session.handle::<varlen_fa_key_ranges>(Kind::KeyRanges, given));
    let ranges = ranges.filter(|ranges| !ranges.pointer.is_null());
    let mut shape = attend.shape();
    let (query, key) = match kind {
        1 => (None, handles[0].object),
        3 | 5 => (handles[0].object, handles[0].object),
        4 | 6 => (handles[0].object, handles[1].object),
        _ => (None, None),
    };
    // Objects of a larger size would not fit the memory; then the sizes differ, and the call is
    // refused.
    let fit = |to: &mut [u64; 4], sizes: Option<Sizes>| {
        if let Some(sizes) = sizes.filter(|sizes| spec.fits && sizes.batch < 4 && sizes.seq < 10) {
            (to[0], to[1]) = (sizes.batch, sizes.seq);
        }
    };
    fit(&mut shape.q, query.or(key));
    if query.is_none() {
        shape.q[1] = u64::from(attend.sizes[1] % 10);
    }
    fit(&mut shape.k, key);
    // The metadata's sizes come first.
    let of = ranges
        .and_then(|ranges| ranges.object)
        .filter(|of| spec.fits && query.or(key).is_none() && of.batch < 4 && of.seq < 10 && of.total < 10);
    if let Some(Sizes { batch, seq, total }) = of {
        (shape.q[0], shape.q[1]) = (batch, seq);
        (shape.k[0], shape.k[1]) = (batch, total);
    }
    let [b, sq, h, _] = shape.q;
    let full = [b, sq, h, shape.k[1]];
    let bias_rank = usize::from(spec.bias % 4) + 1;
    let one = |dim: usize| spec.bias >> (2 + dim) & 1 == 1;
    let bias: Vec<u64> =
        (4 - bias_rank..4).map(|dim| if one(dim) { 1 } else { [full[0], h, sq, full[3]][dim] }).collect();
    let bias_dtype = if spec.bias_is_f32 { F32 } else { shape.dtype };
    let (q, k, dtype, rows) = (&shape.q[..], &shape.k[..], shape.dtype, attend.rows);
    let mut all = vec![(q, dtype, rows[0]), (k, dtype, rows[1]), (k, dtype, rows[2]), (q, dtype, rows[3])];
    if kind == 2 || spec.has_bias {
        all.push((&bias, bias_dtype, 0));
    }
    let mut tensors = Tensors::new(&mut session.arena, &all);
    tensors.spoil(&mut session.arena, &attend.faults);
    let mut slots = tensors.slots();
    let pointers: Vec<*mut varlen_fa_tensor> = slots.iter_mut().map(Slot::pointer).collect();

    let [first, second] = handles.map(|handle| handle.pointer);
    let only = |kinds: &[u32], pointer: *mut ()| if kinds.contains(&kind) { pointer } else { null_mut() };
    let mut mask = varlen_fa_attention_mask {
        kind: enum_of(kind),
        reserved_word: 0,
        key_mask: only(&[1], first).cast(),
        bias: pointers.get(4).map_or(null(), |&bias| bias.cast_const()),
        query_meta: only(&[3, 4], first).cast(),
        key_meta: only(&[4], second).cast(),
        query_device_meta: only(&[5, 6], first).cast(),
        key_device_meta: only(&[6], second).cast(),
        ranges: ranges.map_or(null(), |ranges| ranges.pointer.cast_const()),
        modifiers: null(),
        reserved: [0; 2],
    };
    match spec.stray {
        // A handle that the kind does not use, or reserved space that is not 0.
        240..=243 if kind != 1 => mask.key_mask = without_provenance_mut::<()>(spec.stray.into()).cast(),
        244..=247 if kind < 6 => mask.key_device_meta = without_provenance_mut::<()>(spec.stray.into()).cast(),
        248..=251 => mask.reserved_word = 1,
        252.. => mask.reserved[usize::from(spec.stray % 2)] = 1,
        _ => {}
    }
    let is_stray = matches!((spec.stray, kind), (240..=243, 0 | 2..) | (244..=247, ..=5) | (248.., _));
    let has_mask = !at.is_null();
    let mut mask_slot = Slot::of(mask, at);
    let (mut options, ranges_of_options) = attend.options(session);
    let mut plan = Slot::<varlen_fa_plan>::new(attend.plan);
    let [q, k, v, out] = [0, 1, 2, 3].map(|at| pointers[at]);
    // SAFETY: as in `run`.
    let status = unsafe {
        attention::varlen_fa_forward(
            device.pointer,
            pointer_of(&mut options),
            q,
            k,
            v,
            mask_slot.pointer(),
            out,
            plan.pointer(),
        )
    };

    let rank_is_sound = (0..4).all(|at| tensors.is_sound(at, 4));
    // NULL is no bias, but for masks that are one.
    let has_bias = has_mask && (kind == 2 || pointers.get(4).is_some_and(|bias| !bias.is_null()));
    let count = if has_bias { 5 } else { 4 };
    tensors.all.truncate(count);
    let apart = tensors.are_apart(&[3]);
    let mask_is_sound = match kind {
        _ if !has_mask => true,
        _ if !at.is_good() || is_stray => false,
        _ if has_bias && !(rank_is_sound && bias_is_sound(&tensors)) => false,
        0 | 2 => true,
        _ => {
            let matches = |sizes: Option<Sizes>, at: usize| {
                sizes.is_some_and(|sizes| tensors.shape(at, 4)[..2] == [sizes.batch, sizes.seq])
            };
            kind < 7 && matches(key, 1) && (kind == 1 || matches(query, 0))
        }
    };
    let ranges_are_sound = ranges.filter(|_| has_mask).is_none_or(|ranges| {
        let (q, k) = (tensors.shape(0, 4), tensors.shape(1, 4));
        ranges.object.is_some_and(|of| [of.batch, of.seq, of.total] == [q[0], q[1], k[1]])
    });
    let is_sound = device.object.is_some()
        && attend.options_are_sound()
        && ranges_of_options.is_none()
        && attend.plan_is_sound()
        && rank_is_sound
        && ranges_are_sound
        && attention_fits(&tensors, 2)
        && apart
        && mask_is_sound;
    let is_ok = status == varlen_fa_status::Ok;
    // Options that force a path may not apply, and the device may know other limits. Metadata of
    // documents takes no keys of another.
    let applies = attend.options_are_plain() && !(has_mask && kind == 4 && session.has_documents);
    let expected = if !is_sound { Some(false) } else { Some(true).filter(|_| applies && !tensors.has_fault) };
    let written = if is_ok && is_sound { tensors.elements(3) } else { vec![] };
    session.judge(call, status, written, expected);
    plan.result(is_ok);
}

/// A bias of 1 to 4 dimensions that broadcasts to `[B, H, Sq, Sk]`.
fn bias_is_sound(tensors: &Tensors) -> bool {
    let rank = tensors.all[4].rank as usize;
    if !(1..=4).contains(&rank) || !tensors.is_sound(4, rank) {
        return false;
    }
    let (q, k) = (tensors.shape(0, 4), tensors.shape(1, 4));
    let full = [q[0], q[2], q[1], k[1]];
    let fits = tensors.shape(4, rank).iter().zip(&full[4 - rank..]).all(|(&size, &full)| size == 1 || size == full);
    fits && (tensors.dtype(4) == F32 || tensors.dtype(4) == tensors.dtype(0))
}

fn varlen_attention(session: &mut Session, call: &Call, attend: &Attend, sequences: [Ref; 2], with_lse: bool) {
    let device: Handle<varlen_fa_device> = session.handle(Kind::Device, attend.device);
    let handles = sequences.map(|given| session.handle::<varlen_fa_cu_seqlens>(Kind::CuSeqlens, given));
    let mut shape = attend.shape();
    // As many rows as the sequences have, if the memory holds them.
    let [_, _, heads, dim] = shape.q;
    let most = tensor::rows_in_memory(2 * (heads + shape.k[2]), dim, heads).min(40);
    let total = |at: usize| handles[at].object.map_or(3, |sizes| sizes.total).min(most);
    (shape.q[1], shape.k[1]) = (total(0), total(1));
    let lse = [shape.q[2], shape.q[1]];
    let (q, k, dtype, rows) = (&shape.q[1..], &shape.k[1..], shape.dtype, attend.rows);
    let mut all = vec![(q, dtype, rows[0]), (k, dtype, rows[1]), (k, dtype, rows[2]), (q, dtype, rows[3])];
    if with_lse {
        all.push((&lse, F32, 0));
    }
    let mut tensors = Tensors::new(&mut session.arena, &all);
    tensors.spoil(&mut session.arena, &attend.faults);
    let mut slots = tensors.slots();
    let pointers: Vec<*mut varlen_fa_tensor> = slots.iter_mut().map(Slot::pointer).collect();
    let (mut options, ranges) = attend.options(session);
    let mut plan = Slot::<varlen_fa_plan>::new(attend.plan);
    // SAFETY: as in `run`.
    let status = unsafe {
        primitives::varlen_fa_varlen_attention(
            device.pointer,
            pointer_of(&mut options),
            pointers[0],
            pointers[1],
            pointers[2],
            handles[0].pointer,
            handles[1].pointer,
            pointers[3],
            pointers.get(4).map_or(null(), |&lse| lse.cast_const()),
            plan.pointer(),
        )
    };
    // NULL is no lse.
    if with_lse && pointers[4].is_null() {
        tensors.all.truncate(4);
    }
    let with_lse = tensors.all.len() == 5;
    let outputs: &[usize] = if with_lse { &[3, 4] } else { &[3] };
    let lse_is_sound = !with_lse
        || (tensors.is_sound(4, 2) && tensors.dtype(4) == F32 && {
            let q = tensors.shape(0, 3);
            tensors.shape(4, 2) == [q[1], q[0]]
        });
    let rank_is_sound = (0..4).all(|at| tensors.is_sound(at, 3));
    let sequences_are_sound = match handles.map(|handle| handle.object) {
        [Some(q), Some(k)] => {
            q.batch == k.batch && tensors.shape(0, 3)[0] == q.total && tensors.shape(1, 3)[0] == k.total
        }
        _ => false,
    };
    let is_sound = device.object.is_some()
        && attend.options_are_sound()
        && attend.options.as_ref().is_none_or(|options| !options.at.is_good() || among(options.path, 5) == 0)
        && attend.plan_is_sound()
        && rank_is_sound
        && attention_fits(&tensors, 1)
        && lse_is_sound
        && sequences_are_sound
        && ranges.is_none_or(|ranges| ranges.object == Some(Sizes::PACKED))
        && tensors.are_apart(outputs);
    let is_ok = status == varlen_fa_status::Ok;
    // Ranges may be those of other sequences.
    let applies = attend.options_are_plain() && ranges.is_none();
    let expected = if !is_sound { Some(false) } else { Some(true).filter(|_| applies && !tensors.has_fault) };
    let written =
        if is_ok && is_sound { outputs.iter().flat_map(|&at| tensors.elements(at)).collect() } else { vec![] };
    session.judge(call, status, written, expected);
    plan.result(is_ok);
}

impl Move {
    /// Sizes of the metadata that the memory holds.
    fn sizes(&self, meta: &Handle<varlen_fa_meta>) -> Sizes {
        let fallback = Sizes { batch: 1, seq: 3, total: 2 };
        meta.object.filter(|sizes| sizes.batch < 4 && sizes.seq < 10).unwrap_or(fallback)
    }
}

fn pack(session: &mut Session, call: &Call, given: &Move) {
    let device: Handle<varlen_fa_device> = session.handle(Kind::Device, given.device);
    let meta: Handle<varlen_fa_meta> = session.handle(Kind::Meta, given.meta);
    let Sizes { batch, seq, total } = given.sizes(&meta);
    let [heads, kv_heads, dim] = given.sizes.map(u64::from);
    let (kv_heads, dim, dtype) = (kv_heads % 2 + 1, (dim % 4 + 1) * 8, u32::from(given.dtype % 3) + 1);
    let heads = kv_heads * (heads % 2 + 1);
    let (q, k) = ([batch, seq, heads, dim], [batch, seq, kv_heads, dim]);
    let (packed_q, packed_k) = ([total, heads, dim], [total, kv_heads, dim]);
    let rows = given.rows;
    let all: [(&[u64], u32, u8); 6] = [
        (&q, dtype, rows[0]),
        (&k, dtype, rows[1]),
        (&k, dtype, rows[2]),
        (&packed_q, dtype, rows[0] >> 4),
        (&packed_k, dtype, rows[1] >> 4),
        (&packed_k, dtype, rows[2] >> 4),
    ];
    let mut tensors = Tensors::new(&mut session.arena, &all);
    tensors.spoil(&mut session.arena, &given.faults);
    let mut slots = tensors.slots();
    let p: Vec<*mut varlen_fa_tensor> = slots.iter_mut().map(Slot::pointer).collect();
    // SAFETY: as in `run`.
    let status =
        unsafe { primitives::varlen_fa_pack_qkv(device.pointer, p[0], p[1], p[2], meta.pointer, p[3], p[4], p[5]) };
    judge_move(session, call, status, &tensors, (device.object, meta.object), &[(0, 3), (1, 4), (2, 5)], true);
}

fn scatter(session: &mut Session, call: &Call, given: &Move) {
    let device: Handle<varlen_fa_device> = session.handle(Kind::Device, given.device);
    let meta: Handle<varlen_fa_meta> = session.handle(Kind::Meta, given.meta);
    let Sizes { batch, seq, total } = given.sizes(&meta);
    let [heads, _, dim] = given.sizes.map(u64::from);
    let (heads, dim, dtype) = (heads % 4 + 1, (dim % 4 + 1) * 8, u32::from(given.dtype % 3) + 1);
    let (packed, padded) = ([total, heads, dim], [batch, seq, heads, dim]);
    let all: [(&[u64], u32, u8); 2] = [(&padded, dtype, given.rows[0]), (&packed, dtype, given.rows[1])];
    let mut tensors = Tensors::new(&mut session.arena, &all);
    tensors.spoil(&mut session.arena, &given.faults);
    let mut slots = tensors.slots();
    let [padded, packed] = [0, 1].map(|at| slots[at].pointer());
    // SAFETY: as in `run`.
    let status = unsafe { primitives::varlen_fa_scatter_to_padded(device.pointer, packed, meta.pointer, padded) };
    judge_move(session, call, status, &tensors, (device.object, meta.object), &[(0, 1)], false);
}

/// Judges a call that moves rows between padded and packed tensors, which are given by their
/// places.
fn judge_move(
    session: &mut Session,
    call: &Call,
    status: varlen_fa_status,
    tensors: &Tensors,
    (device, meta): (Option<Sizes>, Option<Sizes>),
    pairs: &[(usize, usize)],
    packs: bool,
) {
    let outputs: Vec<usize> = pairs.iter().map(|&(padded, packed)| if packs { packed } else { padded }).collect();
    let fits = |&(padded, packed): &(usize, usize)| {
        let Some(meta) = meta.filter(|_| tensors.is_sound(padded, 4) && tensors.is_sound(packed, 3)) else {
            return false;
        };
        let (a, b) = (tensors.shape(padded, 4), tensors.shape(packed, 3));
        a[..2] == [meta.batch, meta.seq]
            && b[0] == meta.total
            && a[2..] == b[1..]
            && tensors.dtype(padded) == tensors.dtype(packed)
            && inner_is_contiguous(tensors, padded, 4)
            && inner_is_contiguous(tensors, packed, 3)
    };
    let is_sound = device.is_some() && pairs.iter().all(fits) && tensors.are_apart(&outputs);
    let expected = if !is_sound { Some(false) } else { Some(true).filter(|_| !tensors.has_fault) };
    let is_ok = status == varlen_fa_status::Ok;
    let written =
        if is_ok && is_sound { outputs.iter().flat_map(|&at| tensors.elements(at)).collect() } else { vec![] };
    session.judge(call, status, written, expected);
}
