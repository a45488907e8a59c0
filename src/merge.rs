//! Attention over all keys from attention over parts of them: [`merge_attention`].

use crate::attention_outputs::AttentionOutputs;
use crate::call::memory::{Input, Output};
use crate::call::op::{Merge, MergePart, Op};
use crate::call::problem::{MergeViews, check_merge, lse_shape};
use crate::call::segments::Segmented;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::Result;
use crate::layout::Layout;
use crate::tensor::{Tensor, TensorView, TensorViewMut};

/// The result of [`merge_attention`].
#[derive(Debug)]
#[non_exhaustive]
pub struct MergedAttention {
    /// Of the shape and element type of the parts.
    pub out: Tensor,
    /// The log-sum-exp over the keys of both parts, f32.
    pub lse: Tensor,
}

/// Attention over all keys from attention over two parts of them, which share no key: each part's output, `[B, S, H, D]`, and its
/// log-sum-exp, `[B, H, S]` f32; or packed rows, `[total, H, D]` with `[H, total]`. All of a part's rows belong to the same
/// queries as the other's. More parts are merged one after the other, in any order.
///
/// With `m = max(lse1, lse2)` and `wᵢ = exp(lseᵢ − m)` it is `out = (w₁·out1 + w₂·out2) / (w₁ + w₂)` and
/// `lse = m + ln(w₁ + w₂)`, in f32: the rescaling of the online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867), as Ring
/// Attention (Liu et al. 2023, arXiv:2310.01889) and flash-decoding merge their blocks.
///
/// A part that saw no key, −∞, does not count: the other part comes out as it is, and +0.0 with −∞ if both saw none. NaN in a row
/// of a part that counts, or in its log-sum-exp, makes NaN of what it reaches.
///
/// ```
/// use varlen_fa::{AttentionMask, Device, DeviceChoice, MaskedAttention, Tensor, merge_attention};
///
/// let device = Device::new(DeviceChoice::Cpu)?;
/// let x: Vec<f32> = (0..6 * 8).map(|i| (i as f32).sin()).collect();
/// let x = Tensor::from_slice(&device, &x, &[1, 6, 1, 8])?;
/// let attention = MaskedAttention::new(&device).with_lse();
/// let among = |keys: std::ops::Range<usize>| {
///     let keys = x.view().slice(1, keys)?;
///     attention.forward(&x, keys, keys, AttentionMask::none())
/// };
/// let (first, second, whole) = (among(0..4)?, among(4..6)?, among(0..6)?);
/// // Both are there: `with_lse` asked for them.
/// let [lse1, lse2] = [first.lse.as_ref().unwrap(), second.lse.as_ref().unwrap()];
/// let merged = merge_attention(&device, &first.out, lse1, &second.out, lse2)?;
/// for (merged, whole) in merged.out.to_vec::<f32>()?.iter().zip(whole.out.to_vec::<f32>()?) {
///     assert!((merged - whole).abs() < 1e-6);
/// }
/// # Ok::<(), varlen_fa::Error>(())
/// ```
///
/// # Errors
/// An [`Error`](crate::Error) that names the argument that does not fit; [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn merge_attention<'a>(
    device: &Device,
    out1: impl Into<TensorView<'a>>,
    lse1: impl Into<TensorView<'a>>,
    out2: impl Into<TensorView<'a>>,
    lse2: impl Into<TensorView<'a>>,
) -> Result<MergedAttention> {
    let (out1, lse1, out2, lse2) = (out1.into(), lse1.into(), out2.into(), lse2.into());
    let mut out = Tensor::uninit(device, out1.dtype(), out1.shape())?;
    let mut lse = Tensor::uninit(device, DType::F32, &lse_shape("out1", out1.shape())?)?;
    merge_attention_into(device, out1, lse1, out2, lse2, AttentionOutputs::new(&mut out).with_lse(&mut lse))?;
    Ok(MergedAttention { out, lse })
}

/// [`merge_attention`] into memory of the caller: an output of the shape and element type of the parts and, if it is wanted, its
/// log-sum-exp. Neither shares memory with a part or the other. Every element of the views is written, and nothing else.
///
/// # Errors
/// As [`merge_attention`]; [`Error::Overlap`](crate::Error::Overlap) if an output shares memory with a part or the other output.
pub fn merge_attention_into<'a, 'o>(
    device: &Device,
    out1: impl Into<TensorView<'a>>,
    lse1: impl Into<TensorView<'a>>,
    out2: impl Into<TensorView<'a>>,
    lse2: impl Into<TensorView<'a>>,
    outputs: impl Into<AttentionOutputs<'o>>,
) -> Result<()> {
    let parts = [out1.into(), lse1.into(), out2.into(), lse2.into()];
    merge(device, parts, outputs.into(), |op| device.backend()?.execute(op))
}

/// The merge, which `execute` launches or records.
pub(crate) fn merge(
    device: &Device,
    parts: [TensorView<'_>; 4],
    outputs: AttentionOutputs<'_>,
    execute: impl FnOnce(Op<'_>) -> Result<()>,
) -> Result<()> {
    {
        let [out1, lse1, out2, lse2] = parts.each_ref().map(TensorView::info);
        let (out, lse) = (outputs.out.one("out")?.info(), outputs.lse.as_ref().map(TensorViewMut::info));
        let parts = [("out1", out1), ("lse1", lse1), ("out2", out2), ("lse2", lse2)];
        check_merge(device.info(), &MergeViews { parts, out, lse })?;
    }
    let Segmented::One(out) = outputs.out.outputs() else { return Ok(()) };
    if out.layout.numel() == 0 {
        return Ok(());
    }
    let [out1, lse1, out2, lse2] = parts.map(TensorView::input);
    let lse = outputs
        .lse
        .map(TensorViewMut::output)
        .map(|lse| -> Result<_> { Ok(Output { layout: padded_lse(&lse.layout)?, ..lse }) });
    let out = Output { layout: padded_out(&out.layout)?, ..out };
    execute(Op::Merge(Merge {
        parts: [padded_part(out1, lse1)?, padded_part(out2, lse2)?],
        out,
        lse: lse.transpose()?,
    }))
}

fn padded_part<'a>(out: Input<'a>, lse: Input<'a>) -> Result<MergePart<'a>> {
    Ok(MergePart {
        out: Input { layout: padded_out(&out.layout)?, ..out },
        lse: Input { layout: padded_lse(&lse.layout)?, ..lse },
    })
}

// Each packed row as a batch row of one token: backends split work by batch row.

/// An output as a padded one, `[B, S, H, D]`.
fn padded_out(layout: &Layout) -> Result<Layout> {
    match (layout.shape(), layout.strides()) {
        (&[total, heads, dim], &[row, head, inner]) => {
            Layout::strided(&[total, 1, heads, dim], &[row, 0, head, inner], layout.offset())
        }
        _ => Ok(*layout),
    }
}

/// A log-sum-exp as that of a padded output, `[B, H, S]`.
fn padded_lse(layout: &Layout) -> Result<Layout> {
    match (layout.shape(), layout.strides()) {
        (&[heads, total], &[head, row]) => Layout::strided(&[total, heads, 1], &[row, head, 1], layout.offset()),
        _ => Ok(*layout),
    }
}
