//! Every check of a call. Nothing here touches a buffer: views come as [`ViewInfo`], and what leaves is known to be sound, so
//! that kernels need no checks of their own.

use std::ops::Range;

use super::segments::{Cuts, MAX_SEGMENTS, Role};
use crate::cache::DeviceId;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::MAX_HEAD_DIM;
use crate::layout::Layout;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_mask::{KeyMask, check_token_count};
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;
use crate::score_modifiers::ScoreModifiers;

/// The device of a call, as far as checks need it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceInfo<'a> {
    pub id: DeviceId,
    pub name: &'a str,
    pub dtypes: &'a [DType],
}

/// A view without its memory.
#[derive(Debug, Clone)]
pub(crate) struct ViewInfo<'a> {
    pub layout: Layout,
    pub dtype: DType,
    pub device: DeviceId,
    pub device_name: &'a str,
    /// Bytes of the memory that the layout indexes.
    pub memory_bytes: u64,
    /// Which address space `touched` counts in: host memory, or one buffer of a device.
    pub space: u64,
    /// Addresses that count as touched when looking for overlaps.
    pub touched: Range<u64>,
}

/// Sizes of an attention call. Packed calls count rows over the whole batch in `seq_q` and `seq_k`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttentionShape {
    pub batch: usize,
    pub seq_q: usize,
    pub seq_k: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

impl AttentionShape {
    /// Query heads that share one key/value head.
    pub(crate) fn group_size(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }
}

/// A checked attention call.
#[derive(Debug, Clone)]
pub(crate) struct AttentionProblem {
    pub shape: AttentionShape,
    pub dtype: DType,
    pub softmax_scale: f32,
    /// The bias as a `[B, H, Sq, Sk]` view; broadcast dimensions have stride 0.
    pub bias: Option<Layout>,
    /// Whether q, k, v or the output come in several segments.
    pub cuts: Cuts,
    /// Whether the log-sum-exp is asked for.
    pub lse: bool,
}

/// The tensors of an attention call, each in segments.
#[derive(Debug)]
pub(crate) struct AttentionViews<'a> {
    pub q: &'a [ViewInfo<'a>],
    pub k: &'a [ViewInfo<'a>],
    pub v: &'a [ViewInfo<'a>],
    pub out: &'a [ViewInfo<'a>],
    /// `[B, H, Sq]` f32, or `[H, total_q]` of packed rows.
    pub lse: Option<&'a ViewInfo<'a>>,
}

/// The mask of a padded attention call.
#[derive(Debug, Clone)]
pub(crate) struct MaskInfo<'a> {
    pub tokens: TokenInfo<'a>,
    pub ranges: Option<&'a KeyRanges>,
    pub modifiers: Option<&'a ScoreModifiers>,
    pub bias: Option<ViewInfo<'a>>,
}

/// Which tokens of padded tensors count.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TokenInfo<'a> {
    All,
    Key(&'a KeyMask),
    Varlen {
        query: &'a VarlenMeta,
        key: &'a VarlenMeta,
    },
    /// Metadata in tables of a device, as (device, batch and sequence).
    DeviceVarlen {
        query: DeviceMetaInfo<'a>,
        key: DeviceMetaInfo<'a>,
    },
}

/// Metadata in tables of a device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceMetaInfo<'a> {
    pub device: DeviceId,
    pub device_name: &'a str,
    /// `[batch, sequence]` of its mask.
    pub size: [usize; 2],
}

/// A `[B, S]` mask in a device's memory.
#[derive(Debug, Clone)]
pub(crate) struct DeviceMaskInfo<'a> {
    pub layout: Layout,
    pub element_bytes: usize,
    pub device: DeviceId,
    pub device_name: &'a str,
    /// Bytes of the memory that the layout indexes.
    pub memory_bytes: u64,
}

impl AttentionProblem {
    /// `softmax_scale` · log2(e), what exponentials to base 2 take. A product beyond f32 becomes the
    /// largest number, on every device: infinity times a score of 0 would be NaN.
    #[cfg(any(feature = "wgpu", all(feature = "cuda", not(target_arch = "wasm32"))))]
    pub(crate) fn score_scale(&self) -> f32 {
        (self.softmax_scale * std::f32::consts::LOG2_E).clamp(f32::MIN, f32::MAX)
    }

    /// Checks a call on padded tensors `[B, S, H, D]`.
    pub(crate) fn padded(
        device: DeviceInfo<'_>,
        views: &AttentionViews<'_>,
        mask: &MaskInfo<'_>,
        softmax_scale: Option<f32>,
    ) -> Result<Self> {
        let [batch, seq_q, num_heads, head_dim] = joint_sizes(Role::Q, views.q, "4: [B, S, H, D]")?;
        let [_, seq_k, num_kv_heads, _] = joint_sizes(Role::K, views.k, "4: [B, S, Hkv, D]")?;
        // Whatever the mask: kernels count tokens of the whole batch in 32 bits.
        check_token_count("q", batch, seq_q)?;
        check_token_count("k", batch, seq_k)?;
        expect_joint_shape(Role::Q, views.q, [batch, seq_q, num_heads, head_dim])?;
        expect_joint_shape(Role::K, views.k, [batch, seq_k, num_kv_heads, head_dim])?;
        expect_joint_shape(Role::V, views.v, [batch, seq_k, num_kv_heads, head_dim])?;
        expect_joint_shape(Role::Out, views.out, [batch, seq_q, num_heads, head_dim])?;
        let shape = AttentionShape { batch, seq_q, seq_k, num_heads, num_kv_heads, head_dim };
        let softmax_scale = check_attention(device, views, &shape, softmax_scale)?;
        check_lse(device, views, &[batch, num_heads, seq_q])?;
        match &mask.tokens {
            TokenInfo::All => {}
            TokenInfo::Key(mask) => expect_mask("mask", mask, batch, seq_k)?,
            TokenInfo::Varlen { query, key } => {
                expect_mask("query metadata", query.key_mask(), batch, seq_q)?;
                expect_mask("key metadata", key.key_mask(), batch, seq_k)?;
            }
            TokenInfo::DeviceVarlen { query, key } => {
                expect_device_meta("query metadata", query, device, [batch, seq_q])?;
                expect_device_meta("key metadata", key, device, [batch, seq_k])?;
            }
        }
        if let Some(ranges) = mask.ranges {
            ranges.expect_padded(batch, seq_q, seq_k)?;
        }
        if let Some(modifiers) = mask.modifiers {
            modifiers.check(num_heads)?;
        }
        let mut bias = None;
        if let Some(view) = &mask.bias {
            bias = Some(broadcast_bias(view, [batch, num_heads, seq_q, seq_k])?);
            let dtype = views.dtype();
            if view.dtype != DType::F32 && view.dtype != dtype {
                return Err(Error::DTypeMismatch { argument: "bias", expected: dtype, got: view.dtype });
            }
            expect_device("bias", view, device)?;
            expect_in_bounds("bias", view)?;
            for (out_name, out) in named(Role::Out, views.out) {
                expect_apart(out_name, out, "bias", view)?;
            }
            if let Some(lse) = views.lse {
                expect_apart("lse", lse, "bias", view)?;
            }
        }
        let lse = views.lse.is_some();
        Ok(Self { shape, dtype: views.dtype(), softmax_scale, bias, cuts: views.cuts(), lse })
    }

    /// Checks a call on packed rows `[total, H, D]`, which come in one segment.
    pub(crate) fn packed(
        device: DeviceInfo<'_>,
        views: &AttentionViews<'_>,
        (cu_seqlens_q, cu_seqlens_k): (&CuSeqlens, &CuSeqlens),
        (ranges, modifiers): (Option<&KeyRanges>, Option<&ScoreModifiers>),
        softmax_scale: Option<f32>,
    ) -> Result<Self> {
        let [q, k, v, out] = [views.q, views.k, views.v, views.out].map(|segments| &segments[0]);
        let [total_q, num_heads, head_dim] = sizes("q", q, "3: [total_q, H, D]")?;
        let [total_k, num_kv_heads, _] = sizes("k", k, "3: [total_k, Hkv, D]")?;
        expect_shape("k", k, &[total_k, num_kv_heads, head_dim])?;
        expect_shape("v", v, &[total_k, num_kv_heads, head_dim])?;
        expect_shape("out", out, &[total_q, num_heads, head_dim])?;
        expect_total("cu_seqlens_q", cu_seqlens_q, total_q)?;
        expect_total("cu_seqlens_k", cu_seqlens_k, total_k)?;
        if cu_seqlens_k.batch() != cu_seqlens_q.batch() {
            return Err(Error::CuSeqlens {
                argument: "cu_seqlens_k",
                expected: format!("as many sequences as cu_seqlens_q, {}", cu_seqlens_q.batch()),
                got: cu_seqlens_k.batch().to_string(),
            });
        }
        if let Some(ranges) = ranges {
            ranges.expect_packed(cu_seqlens_q, cu_seqlens_k)?;
        }
        modifiers.map_or(Ok(()), |modifiers| modifiers.check(num_heads))?;
        let batch = cu_seqlens_q.batch();
        let shape = AttentionShape { batch, seq_q: total_q, seq_k: total_k, num_heads, num_kv_heads, head_dim };
        let softmax_scale = check_attention(device, views, &shape, softmax_scale)?;
        check_lse(device, views, &[num_heads, total_q])?;
        let lse = views.lse.is_some();
        Ok(Self { shape, dtype: views.dtype(), softmax_scale, bias: None, cuts: Cuts::None, lse })
    }
}

impl<'a> AttentionViews<'a> {
    /// Of all tensors, once they are checked; there is a segment then.
    fn dtype(&self) -> DType {
        self.q.first().map_or(DType::F32, |first| first.dtype)
    }

    /// Of tensors that are checked.
    fn cuts(&self) -> Cuts {
        if [self.q, self.k, self.v, self.out].iter().all(|segments| segments.len() == 1) {
            return Cuts::None;
        }
        let lengths = |segments: &[ViewInfo<'_>]| -> Vec<usize> {
            segments.iter().map(|segment| segment.layout.shape()[1]).collect()
        };
        let [q, k, v, out] = [self.q, self.k, self.v, self.out].map(lengths);
        Cuts::of([[&q, &out], [&k, &v]])
    }

    /// The segments of the inputs, and what errors call them.
    fn inputs(&self) -> impl Iterator<Item = (&'static str, &'a ViewInfo<'a>)> + use<'a> {
        named(Role::Q, self.q).chain(named(Role::K, self.k)).chain(named(Role::V, self.v))
    }
}

/// The segments of a tensor, and what errors call them.
fn named<'a>(
    role: Role,
    segments: &'a [ViewInfo<'a>],
) -> impl Iterator<Item = (&'static str, &'a ViewInfo<'a>)> + use<'a> {
    let name = move |(index, segment)| (role.segment_name(index, segments.len()), segment);
    segments.iter().enumerate().map(name)
}

/// The sizes of a tensor in segments of rank 4: those of the first one, and S of all.
fn joint_sizes(role: Role, segments: &[ViewInfo<'_>], expected: &'static str) -> Result<[usize; 4]> {
    let Some(first) = segments.first().filter(|_| segments.len() <= MAX_SEGMENTS) else {
        return Err(Error::SegmentCount { argument: role.name(), limit: MAX_SEGMENTS, got: segments.len() });
    };
    let [batch, _, heads, head_dim] = sizes(role.segment_name(0, segments.len()), first, expected)?;
    let mut joint = 0_usize;
    for (name, segment) in named(role, segments) {
        let [_, seq, ..] = sizes::<4>(name, segment, expected)?;
        joint = joint.saturating_add(seq);
    }
    Ok([batch, joint, heads, head_dim])
}

/// Checks a tensor in segments: their lengths add up, and all else is as expected.
fn expect_joint_shape(role: Role, segments: &[ViewInfo<'_>], expected: [usize; 4]) -> Result<()> {
    let [batch, seq, heads, head_dim] = expected;
    if let [one] = segments {
        return expect_shape(role.name(), one, &expected);
    }
    let [_, got, ..] = joint_sizes(role, segments, "4: [B, S, H, D]")?;
    for (name, segment) in named(role, segments) {
        expect_shape(name, segment, &[batch, segment.layout.shape()[1], heads, head_dim])?;
    }
    if got == seq {
        return Ok(());
    }
    let got = vec![batch, got, heads, head_dim];
    Err(Error::Shape { argument: role.name(), expected: expected.to_vec(), got })
}

/// One tensor of a pack: its padded and its packed form, and what the caller knows them as.
#[derive(Debug)]
pub(crate) struct PackViews<'a> {
    pub padded: (&'static str, ViewInfo<'a>),
    pub packed: (&'static str, ViewInfo<'a>),
}

/// Checks copies of the valid rows of padded `[B, S, H, D]` tensors to packed `[n, H, D]` ones.
pub(crate) fn check_pack(device: DeviceInfo<'_>, copies: &[PackViews<'_>], meta: &VarlenMeta) -> Result<()> {
    for PackViews { padded, packed } in copies {
        check_rows(device, (padded.0, &padded.1), (packed.0, &packed.1), meta)?;
        expect_input(padded.0, &padded.1, device)?;
        expect_output(packed.0, &packed.1, device)?;
    }
    for (at, PackViews { packed, .. }) in copies.iter().enumerate() {
        let inputs = copies.iter().map(|copy| &copy.padded);
        let later_outputs = copies[at + 1..].iter().map(|copy| &copy.packed);
        for (other, view) in inputs.chain(later_outputs) {
            expect_apart(packed.0, &packed.1, other, view)?;
        }
    }
    Ok(())
}

/// Checks a copy of packed `[n, H, D]` rows to the valid rows of a padded `[B, S, H, D]` tensor.
pub(crate) fn check_scatter(
    device: DeviceInfo<'_>,
    packed: &ViewInfo<'_>,
    padded: &ViewInfo<'_>,
    meta: &VarlenMeta,
) -> Result<()> {
    check_rows(device, ("padded", padded), ("packed", packed), meta)?;
    expect_input("packed", packed, device)?;
    expect_output("padded", padded, device)?;
    expect_apart("padded", padded, "packed", packed)
}

/// Checks a mask from which metadata of `size`, `[batch, sequence]`, is built on a device.
pub(crate) fn check_device_mask(device: DeviceInfo<'_>, mask: &DeviceMaskInfo<'_>, size: [usize; 2]) -> Result<()> {
    let argument = "mask";
    let &[batch, seq] = mask.layout.shape() else {
        return Err(Error::Rank { argument, expected: "2: [B, S]", got: mask.layout.rank() });
    };
    if [batch, seq] != size {
        return Err(Error::MaskSize { argument, expected: size, got: [batch, seq] });
    }
    if mask.device != device.id {
        let (expected, got) = (device.name.to_owned(), mask.device_name.to_owned());
        return Err(Error::DeviceMismatch { argument, expected, got });
    }
    let expected = mask.layout.end() * mask.element_bytes as u64;
    if mask.layout.numel() > 0 && expected > mask.memory_bytes {
        return Err(Error::BufferTooSmall { argument, expected, got: mask.memory_bytes });
    }
    Ok(())
}

fn expect_device_meta(
    argument: &'static str,
    meta: &DeviceMetaInfo<'_>,
    device: DeviceInfo<'_>,
    expected: [usize; 2],
) -> Result<()> {
    if meta.device != device.id {
        let (expected, got) = (device.name.to_owned(), meta.device_name.to_owned());
        return Err(Error::DeviceMismatch { argument, expected, got });
    }
    if meta.size != expected {
        return Err(Error::MaskSize { argument, expected, got: meta.size });
    }
    Ok(())
}

fn check_rows(
    device: DeviceInfo<'_>,
    (padded_name, padded): (&'static str, &ViewInfo<'_>),
    (packed_name, packed): (&'static str, &ViewInfo<'_>),
    meta: &VarlenMeta,
) -> Result<()> {
    let [batch, seq, num_heads, head_dim] = sizes(padded_name, padded, "4: [B, S, H, D]")?;
    expect_mask("meta", meta.key_mask(), batch, seq)?;
    expect_shape(packed_name, packed, &[meta.total_valid(), num_heads, head_dim])?;
    expect_head_dim(head_dim)?;
    expect_dtype(packed_name, packed, padded.dtype)?;
    expect_supported(padded_name, padded, device)?;
    expect_count(padded_name, padded.layout.shape())
}

/// The checks that padded and packed calls share; returns the scale to use.
fn check_attention(
    device: DeviceInfo<'_>,
    views: &AttentionViews<'_>,
    shape: &AttentionShape,
    softmax_scale: Option<f32>,
) -> Result<f32> {
    let AttentionShape { num_heads, num_kv_heads, head_dim, .. } = *shape;
    if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
        return Err(Error::HeadsNotDivisible { num_heads, num_kv_heads });
    }
    expect_head_dim(head_dim)?;
    let outputs = || named(Role::Out, views.out);
    if let Some((name, first)) = views.inputs().next() {
        expect_supported(name, first, device)?;
    }
    for (name, view) in views.inputs().chain(outputs()) {
        expect_dtype(name, view, views.dtype())?;
    }
    for (name, view) in views.inputs() {
        expect_input(name, view, device)?;
        expect_count(name, view.layout.shape())?;
    }
    for (name, view) in outputs() {
        expect_output(name, view, device)?;
    }
    for (at, (out_name, out)) in outputs().enumerate() {
        for (name, view) in views.inputs() {
            expect_apart(out_name, out, name, view)?;
        }
        for (name, later) in outputs().skip(at + 1) {
            expect_outputs_apart(out_name, out, name, later)?;
        }
    }
    match softmax_scale {
        None => Ok(1.0 / (head_dim as f32).sqrt()),
        Some(scale) if scale.is_finite() => Ok(scale),
        Some(got) => Err(Error::SoftmaxScale { got }),
    }
}

/// The checks of the log-sum-exp, if it is asked for.
fn check_lse(device: DeviceInfo<'_>, views: &AttentionViews<'_>, shape: &[usize]) -> Result<()> {
    let Some(lse) = views.lse else { return Ok(()) };
    expect_shape("lse", lse, shape)?;
    expect_dtype("lse", lse, DType::F32)?;
    expect_output("lse", lse, device)?;
    for (other, view) in views.inputs().chain(named(Role::Out, views.out)) {
        expect_apart("lse", lse, other, view)?;
    }
    Ok(())
}

/// The tensors of a merge: two parts, each the output and the log-sum-exp of attention over some of the keys, and where the
/// attention over all of them goes.
#[derive(Debug)]
pub(crate) struct MergeViews<'a> {
    pub parts: [(&'static str, ViewInfo<'a>); 4],
    pub out: ViewInfo<'a>,
    pub lse: Option<ViewInfo<'a>>,
}

/// Checks a merge of parts, in the order out1, lse1, out2, lse2: `[B, S, H, D]` with `[B, H, S]`, or `[total, H, D]` with
/// `[H, total]`.
pub(crate) fn check_merge(device: DeviceInfo<'_>, views: &MergeViews<'_>) -> Result<()> {
    let MergeViews { parts, out, lse } = views;
    let (name, first) = &parts[0];
    let (shape, lse_shape) = (first.layout.shape(), lse_shape(name, first.layout.shape())?);
    expect_head_dim(shape[shape.len() - 1])?;
    // Every device merges every element type.
    expect_count(name, shape)?;
    // Kernels count rows of one head in 32 bits.
    expect_count(name, &[first.layout.numel() / (shape[shape.len() - 1] * shape[shape.len() - 2]).max(1)])?;
    for (at, (name, view)) in parts.iter().enumerate() {
        match at % 2 {
            0 => {
                expect_shape(name, view, shape)?;
                expect_dtype(name, view, first.dtype)?;
            }
            _ => {
                expect_shape(name, view, &lse_shape)?;
                expect_dtype(name, view, DType::F32)?;
            }
        }
        expect_input(name, view, device)?;
    }
    expect_shape("out", out, shape)?;
    expect_dtype("out", out, first.dtype)?;
    expect_output("out", out, device)?;
    for (name, view) in parts {
        expect_apart("out", out, name, view)?;
    }
    let Some(lse) = lse else { return Ok(()) };
    expect_shape("lse", lse, &lse_shape)?;
    expect_dtype("lse", lse, DType::F32)?;
    expect_output("lse", lse, device)?;
    parts.iter().try_for_each(|(name, view)| expect_apart("lse", lse, name, view))?;
    expect_apart("lse", lse, "out", out)
}

/// The shape of the log-sum-exp that belongs to an output.
pub(crate) fn lse_shape(argument: &'static str, out: &[usize]) -> Result<Vec<usize>> {
    match *out {
        [batch, seq, heads, _] => Ok(vec![batch, heads, seq]),
        [total, heads, _] => Ok(vec![heads, total]),
        _ => Err(Error::Rank { argument, expected: "4: [B, S, H, D], or 3: [total, H, D]", got: out.len() }),
    }
}

pub(super) fn sizes<const RANK: usize>(
    argument: &'static str,
    view: &ViewInfo<'_>,
    expected: &'static str,
) -> Result<[usize; RANK]> {
    let shape = view.layout.shape();
    shape.try_into().map_err(|_| Error::Rank { argument, expected, got: shape.len() })
}

pub(super) fn expect_shape(argument: &'static str, view: &ViewInfo<'_>, expected: &[usize]) -> Result<()> {
    let got = view.layout.shape();
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { argument, expected: expected.to_vec(), got: got.to_vec() })
}

pub(super) fn expect_head_dim(got: usize) -> Result<()> {
    if got == 0 || got > MAX_HEAD_DIM {
        return Err(Error::HeadDim { got });
    }
    Ok(())
}

pub(super) fn expect_dtype(argument: &'static str, view: &ViewInfo<'_>, expected: DType) -> Result<()> {
    if view.dtype == expected {
        return Ok(());
    }
    Err(Error::DTypeMismatch { argument, expected, got: view.dtype })
}

fn expect_supported(argument: &'static str, view: &ViewInfo<'_>, device: DeviceInfo<'_>) -> Result<()> {
    if device.dtypes.contains(&view.dtype) {
        return Ok(());
    }
    Err(Error::UnsupportedDType {
        argument,
        device: device.name.to_owned(),
        expected: device.dtypes.to_vec(),
        got: view.dtype,
    })
}

/// Batch rows, tokens and heads are counted in 32 bits by every kernel.
pub(super) fn expect_count(argument: &'static str, shape: &[usize]) -> Result<()> {
    let limit = i32::MAX as u64;
    match shape.iter().map(|&size| size as u64).find(|&size| size > limit) {
        Some(got) => Err(Error::TooLarge { argument, limit_name: "an i32 of each dimension", limit, got }),
        None => Ok(()),
    }
}

fn expect_device(argument: &'static str, view: &ViewInfo<'_>, device: DeviceInfo<'_>) -> Result<()> {
    if view.device == device.id {
        return Ok(());
    }
    Err(Error::DeviceMismatch { argument, expected: device.name.to_owned(), got: view.device_name.to_owned() })
}

fn expect_in_bounds(argument: &'static str, view: &ViewInfo<'_>) -> Result<()> {
    let expected = view.layout.end() * view.dtype.size() as u64;
    if view.layout.numel() == 0 || expected <= view.memory_bytes {
        return Ok(());
    }
    Err(Error::BufferTooSmall { argument, expected, got: view.memory_bytes })
}

pub(super) fn expect_input(argument: &'static str, view: &ViewInfo<'_>, device: DeviceInfo<'_>) -> Result<()> {
    expect_device(argument, view, device)?;
    if let (Some(&got), Some(&size)) = (view.layout.strides().last(), view.layout.shape().last())
        && got != 1
        && size > 1
        && view.layout.numel() > 0
    {
        return Err(Error::InnerStride { argument, got });
    }
    expect_in_bounds(argument, view)
}

pub(super) fn expect_output(argument: &'static str, view: &ViewInfo<'_>, device: DeviceInfo<'_>) -> Result<()> {
    expect_input(argument, view, device)?;
    if view.layout.self_overlaps() {
        return Err(Error::SelfOverlap {
            argument,
            shape: view.layout.shape().to_vec(),
            strides: view.layout.strides().to_vec(),
        });
    }
    Ok(())
}

/// Views that interleave without sharing an element count as overlapping: telling them apart would cost more than it gives.
pub(super) fn expect_apart(
    argument: &'static str,
    output: &ViewInfo<'_>,
    other: &'static str,
    input: &ViewInfo<'_>,
) -> Result<()> {
    let (a, b) = (&output.touched, &input.touched);
    if output.space == input.space && !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end {
        return Err(Error::Overlap { argument, other });
    }
    Ok(())
}

/// Outputs of one call may take turns in one memory: those of one fused projection, or of one joint
/// tensor, each after the other.
pub(super) fn expect_outputs_apart(
    argument: &'static str,
    output: &ViewInfo<'_>,
    other: &'static str,
    later: &ViewInfo<'_>,
) -> Result<()> {
    if is_of_same_memory(output, later) && output.layout.interleaves(&later.layout) {
        return Ok(());
    }
    expect_apart(argument, output, other, later)
}

/// Whether the layouts of both views count from one address.
fn is_of_same_memory(a: &ViewInfo<'_>, b: &ViewInfo<'_>) -> bool {
    // Where a whole buffer counts as touched, it does from 0 on.
    let base = |view: &ViewInfo<'_>| {
        let offset = view.layout.offset() * view.dtype.size() as u64;
        view.touched.start.saturating_sub(offset)
    };
    a.space == b.space && base(a) == base(b) && a.memory_bytes == b.memory_bytes
}

pub(super) fn expect_mask(argument: &'static str, mask: &KeyMask, batch: usize, seq: usize) -> Result<()> {
    let got = [mask.batch(), mask.seq()];
    if got == [batch, seq] {
        return Ok(());
    }
    Err(Error::MaskSize { argument, expected: [batch, seq], got })
}

fn expect_total(argument: &'static str, cu_seqlens: &CuSeqlens, total: usize) -> Result<()> {
    if cu_seqlens.total() == total {
        return Ok(());
    }
    Err(Error::CuSeqlens {
        argument,
        expected: format!("a last value of {total}, the number of packed rows"),
        got: cu_seqlens.total().to_string(),
    })
}

/// The bias as a `[B, H, Sq, Sk]` view: missing leading dimensions and those of size 1 get stride 0, as in PyTorch.
pub(crate) fn broadcast_bias(view: &ViewInfo<'_>, full: [usize; 4]) -> Result<Layout> {
    let (shape, strides) = (view.layout.shape(), view.layout.strides());
    let missing = full.len() - shape.len();
    let mut broadcast = [0; 4];
    for (dim, (&size, &stride)) in shape.iter().zip(strides).enumerate() {
        if size == full[missing + dim] {
            broadcast[missing + dim] = stride;
        } else if size != 1 {
            return Err(Error::Broadcast { expected: full.to_vec(), got: shape.to_vec() });
        }
    }
    Layout::strided(&full, &broadcast, view.layout.offset())
}
