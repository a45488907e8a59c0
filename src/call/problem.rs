//! Every check of a call. Nothing here touches a buffer: views come as [`ViewInfo`], and what leaves is known to be sound, so
//! that kernels need no checks of their own.

use std::ops::Range;

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
}

/// The tensors of an attention call.
#[derive(Debug)]
pub(crate) struct AttentionViews<'a> {
    pub q: &'a ViewInfo<'a>,
    pub k: &'a ViewInfo<'a>,
    pub v: &'a ViewInfo<'a>,
    pub out: &'a ViewInfo<'a>,
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
        let [batch, seq_q, num_heads, head_dim] = sizes("q", views.q, "4: [B, S, H, D]")?;
        let [_, seq_k, num_kv_heads, _] = sizes("k", views.k, "4: [B, S, Hkv, D]")?;
        // Whatever the mask: kernels count tokens of the whole batch in 32 bits.
        check_token_count("q", batch, seq_q)?;
        check_token_count("k", batch, seq_k)?;
        expect_shape("k", views.k, &[batch, seq_k, num_kv_heads, head_dim])?;
        expect_shape("v", views.v, &[batch, seq_k, num_kv_heads, head_dim])?;
        expect_shape("out", views.out, &[batch, seq_q, num_heads, head_dim])?;
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
            // Padded rows that see no key have no place for the sink yet: devices would differ.
            if let (Some(sinks), Some(_)) = (modifiers.sinks(), views.lse) {
                return Err(Error::ScoreModifier {
                    argument: "sinks",
                    expected: "none beside the log-sum-exp of a padded call".to_owned(),
                    got: format!("{} sinks", sinks.len()),
                });
            }
        }
        let mut bias = None;
        if let Some(view) = &mask.bias {
            bias = Some(broadcast_bias(view, [batch, num_heads, seq_q, seq_k])?);
            if view.dtype != DType::F32 && view.dtype != views.q.dtype {
                return Err(Error::DTypeMismatch { argument: "bias", expected: views.q.dtype, got: view.dtype });
            }
            expect_device("bias", view, device)?;
            expect_in_bounds("bias", view)?;
            expect_apart("out", views.out, "bias", view)?;
            if let Some(lse) = views.lse {
                expect_apart("lse", lse, "bias", view)?;
            }
        }
        Ok(Self { shape, dtype: views.q.dtype, softmax_scale, bias })
    }

    /// Checks a call on packed rows `[total, H, D]`.
    pub(crate) fn packed(
        device: DeviceInfo<'_>,
        views: &AttentionViews<'_>,
        (cu_seqlens_q, cu_seqlens_k): (&CuSeqlens, &CuSeqlens),
        (ranges, modifiers): (Option<&KeyRanges>, Option<&ScoreModifiers>),
        softmax_scale: Option<f32>,
    ) -> Result<Self> {
        let [total_q, num_heads, head_dim] = sizes("q", views.q, "3: [total_q, H, D]")?;
        let [total_k, num_kv_heads, _] = sizes("k", views.k, "3: [total_k, Hkv, D]")?;
        expect_shape("k", views.k, &[total_k, num_kv_heads, head_dim])?;
        expect_shape("v", views.v, &[total_k, num_kv_heads, head_dim])?;
        expect_shape("out", views.out, &[total_q, num_heads, head_dim])?;
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
        Ok(Self { shape, dtype: views.q.dtype, softmax_scale, bias: None })
    }
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
    let AttentionViews { q, k, v, out, .. } = *views;
    let AttentionShape { num_heads, num_kv_heads, head_dim, .. } = *shape;
    if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
        return Err(Error::HeadsNotDivisible { num_heads, num_kv_heads });
    }
    expect_head_dim(head_dim)?;
    expect_supported("q", q, device)?;
    for (name, view) in [("k", k), ("v", v), ("out", out)] {
        expect_dtype(name, view, q.dtype)?;
    }
    for (name, view) in [("q", q), ("k", k), ("v", v)] {
        expect_input(name, view, device)?;
        expect_count(name, view.layout.shape())?;
    }
    expect_output("out", out, device)?;
    for (name, view) in [("q", q), ("k", k), ("v", v)] {
        expect_apart("out", out, name, view)?;
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
    for (other, view) in [("q", views.q), ("k", views.k), ("v", views.v), ("out", views.out)] {
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
fn broadcast_bias(view: &ViewInfo<'_>, full: [usize; 4]) -> Result<Layout> {
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
