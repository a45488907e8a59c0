//! What the packed path is made of, for calls of their own: pack, attention on packed rows, scatter.

use std::slice;

use crate::call::op::{Attention, Op, Rows};
use crate::call::plan::{Forced, Plan, plan_packed};
use crate::call::problem::{AttentionProblem, AttentionViews, PackViews, check_pack, check_scatter};
use crate::call::segments::Segmented;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;
use crate::score_modifiers::ScoreModifiers;
use crate::tensor::{Tensor, TensorView, TensorViewMut};

/// Copies the valid rows of a padded `[B, S, H, D]` tensor to a packed `[total_valid, H, D]` one, bit for bit.
///
/// # Errors
/// An [`Error`] that names the argument that does not fit; [`Error::OutOfMemory`].
pub fn pack<'a>(device: &Device, padded: impl Into<TensorView<'a>>, meta: &VarlenMeta) -> Result<Tensor> {
    let padded = padded.into();
    let mut packed = uninit_packed(device, "padded", &padded, meta)?;
    pack_into(device, padded, meta, &mut packed)?;
    Ok(packed)
}

/// [`pack`] into memory of the caller: `packed` is a `[total_valid, H, D]` view that shares no memory with the input. Every
/// element of the view is written, and nothing else.
///
/// # Errors
/// As [`pack`]; [`Error::Overlap`] if `packed` shares memory with the input.
pub fn pack_into<'a, 'o>(
    device: &Device,
    padded: impl Into<TensorView<'a>>,
    meta: &VarlenMeta,
    packed: impl Into<TensorViewMut<'o>>,
) -> Result<()> {
    pack_all(device, [("padded", padded.into(), "packed", packed.into())], meta, |op| device.backend()?.execute(op))
}

/// Copies the valid rows of padded `q`, `k` and `v` to packed tensors in one launch, bit for bit: `[B, S, H, D]` to
/// `[total_valid, H, D]`, and the same with Hkv heads (`fused_pack_qkv` of sglang PR #26318).
///
/// # Errors
/// As [`pack`].
pub fn pack_qkv<'a>(
    device: &Device,
    q: impl Into<TensorView<'a>>,
    k: impl Into<TensorView<'a>>,
    v: impl Into<TensorView<'a>>,
    meta: &VarlenMeta,
) -> Result<[Tensor; 3]> {
    let (q, k, v) = (q.into(), k.into(), v.into());
    let mut packed = [
        uninit_packed(device, "q", &q, meta)?,
        uninit_packed(device, "k", &k, meta)?,
        uninit_packed(device, "v", &v, meta)?,
    ];
    pack_qkv_into(device, q, k, v, meta, packed.each_mut())?;
    Ok(packed)
}

/// [`pack_qkv`] into memory of the caller: views `[total_valid, H, D]` for `q` and `[total_valid, Hkv, D]` for `k` and `v`, which
/// share no memory with one another or with the inputs. Every element of the views is written, and nothing else. Errors name
/// them `packed_q`, `packed_k` and `packed_v`.
///
/// # Errors
/// As [`pack_into`].
pub fn pack_qkv_into<'a, 'o>(
    device: &Device,
    q: impl Into<TensorView<'a>>,
    k: impl Into<TensorView<'a>>,
    v: impl Into<TensorView<'a>>,
    meta: &VarlenMeta,
    [packed_q, packed_k, packed_v]: [impl Into<TensorViewMut<'o>>; 3],
) -> Result<()> {
    let copies = [
        ("q", q.into(), "packed_q", packed_q.into()),
        ("k", k.into(), "packed_k", packed_k.into()),
        ("v", v.into(), "packed_v", packed_v.into()),
    ];
    pack_all(device, copies, meta, |op| device.backend()?.execute(op))
}

fn uninit_packed(
    device: &Device,
    argument: &'static str,
    padded: &TensorView<'_>,
    meta: &VarlenMeta,
) -> Result<Tensor> {
    let &[_, _, heads, dim] = padded.shape() else {
        return Err(Error::Rank { argument, expected: "4: [B, S, H, D]", got: padded.shape().len() });
    };
    Tensor::uninit(device, padded.dtype(), &[meta.total_valid(), heads, dim])
}

/// Padded tensors and where their valid rows go, with the names of both; `execute` launches the copies or records them.
pub(crate) fn pack_all<const N: usize>(
    device: &Device,
    copies: [(&'static str, TensorView<'_>, &'static str, TensorViewMut<'_>); N],
    meta: &VarlenMeta,
    execute: impl FnOnce(Op<'_>) -> Result<()>,
) -> Result<()> {
    {
        let infos = copies.each_ref().map(|(padded_name, padded, packed_name, packed)| PackViews {
            padded: (*padded_name, padded.info()),
            packed: (*packed_name, packed.info()),
        });
        check_pack(device.info(), &infos, meta)?;
    }
    if meta.is_empty() {
        return Ok(());
    }
    let pairs = copies.into_iter().map(|(_, from, _, to)| (from.input(), to.output())).collect();
    execute(Op::Pack { pairs, meta })
}

/// Copies packed `[total_valid, H, D]` rows to a new padded `[B, S, H, D]` tensor, bit for bit, and writes +0.0 to the masked
/// rows, in one launch (`fused_scatter_to_padded` of sglang PR #26318).
///
/// # Errors
/// As [`pack`].
pub fn scatter_to_padded<'a>(device: &Device, packed: impl Into<TensorView<'a>>, meta: &VarlenMeta) -> Result<Tensor> {
    let packed = packed.into();
    let &[_, heads, dim] = packed.shape() else {
        let got = packed.shape().len();
        return Err(Error::Rank { argument: "packed", expected: "3: [total_valid, H, D]", got });
    };
    let mut padded = Tensor::uninit(device, packed.dtype(), &[meta.batch(), meta.seq(), heads, dim])?;
    scatter_to_padded_into(device, packed, meta, &mut padded)?;
    Ok(padded)
}

/// [`scatter_to_padded`] into memory of the caller: `padded` is a `[B, S, H, D]` view that shares no memory with the input. Every
/// element of the view is written, and nothing else.
///
/// # Errors
/// As [`pack_into`].
pub fn scatter_to_padded_into<'a, 'o>(
    device: &Device,
    packed: impl Into<TensorView<'a>>,
    meta: &VarlenMeta,
    padded: impl Into<TensorViewMut<'o>>,
) -> Result<()> {
    scatter(device, packed.into(), meta, padded.into(), |op| device.backend()?.execute(op))
}

/// The scatter, which `execute` launches or records.
pub(crate) fn scatter(
    device: &Device,
    packed: TensorView<'_>,
    meta: &VarlenMeta,
    padded: TensorViewMut<'_>,
    execute: impl FnOnce(Op<'_>) -> Result<()>,
) -> Result<()> {
    check_scatter(device.info(), &packed.info(), &padded.info(), meta)?;
    let padded = padded.output();
    if padded.layout.numel() == 0 {
        return Ok(());
    }
    execute(Op::Scatter { packed: packed.input(), padded, meta })
}

/// The result of [`varlen_attention`].
#[derive(Debug)]
#[non_exhaustive]
pub struct PackedAttended {
    /// `[total_q, H, D]`, of the element type of `q`.
    pub out: Tensor,
    /// `[H, total_q]` f32: the natural logarithm of the sum of `exp(score)` of each row, −∞ for a row with no key, NaN
    /// where the row of `out` is. With attention sinks the sum has the sink too, also for a row with no key.
    pub lse: Option<Tensor>,
}

/// Options of [`varlen_attention`].
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct VarlenOptions<'a> {
    /// The factor on `q·kᵀ`; 1/√D if there is none.
    pub softmax_scale: Option<f32>,
    /// Whether to return the log-sum-exp of every row.
    pub return_lse: bool,
    /// The kernel to run; what the plan chooses if there is none.
    pub kernel: Option<Kernel>,
    /// Keys of the kernel's tiles.
    pub(crate) tile_keys: Option<usize>,
    /// Which keys of its sequence each query sees; all if there are none.
    pub ranges: Option<&'a KeyRanges>,
    /// What else happens to the scores; nothing if there are none.
    pub modifiers: Option<&'a ScoreModifiers>,
}

impl<'a> VarlenOptions<'a> {
    /// With this factor on `q·kᵀ`.
    #[must_use]
    pub fn with_softmax_scale(mut self, softmax_scale: f32) -> Self {
        self.softmax_scale = Some(softmax_scale);
        self
    }

    /// With the log-sum-exp of every row.
    #[must_use]
    pub fn with_lse(mut self) -> Self {
        self.return_lse = true;
        self
    }

    /// With these ranges of keys, made for the same sequences.
    #[must_use]
    pub fn with_ranges(mut self, ranges: &'a KeyRanges) -> Self {
        self.ranges = Some(ranges);
        self
    }

    /// With these score modifiers. ALiBi counts positions of each sequence.
    #[must_use]
    pub fn with_modifiers(mut self, modifiers: &'a ScoreModifiers) -> Self {
        self.modifiers = Some(modifiers);
        self
    }

    /// With tiles of so many keys, where the kernel has several lengths of them, as
    /// [`MaskedAttention::with_tile_keys`](crate::MaskedAttention::with_tile_keys). For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn with_tile_keys(mut self, keys: usize) -> Self {
        self.tile_keys = Some(keys);
        self
    }

    /// With this kernel.
    #[must_use]
    pub fn with_kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = Some(kernel);
        self
    }
}

/// Attention over packed rows: `q` `[total_q, H, D]`, `k` and `v` `[total_k, Hkv, D]`. Sequence `b` of the queries, rows
/// `cu_seqlens_q[b]..cu_seqlens_q[b + 1]`, attends to sequence `b` of the keys. Either may be empty; a query without keys gives
/// zeros.
///
/// # Errors
/// As [`MaskedAttention::forward`](crate::MaskedAttention::forward); [`Error::CuSeqlens`] if the sequences do not fit the tensors.
pub fn varlen_attention<'a>(
    device: &Device,
    [q, k, v]: [impl Into<TensorView<'a>>; 3],
    cu_seqlens_q: &CuSeqlens,
    cu_seqlens_k: &CuSeqlens,
    options: VarlenOptions<'_>,
) -> Result<PackedAttended> {
    let (q, k, v) = (q.into(), k.into(), v.into());
    let &[total_q, num_heads, _] = q.shape() else {
        return Err(Error::Rank { argument: "q", expected: "3: [total_q, H, D]", got: q.shape().len() });
    };
    let mut out = Tensor::uninit(device, q.dtype(), q.shape())?;
    let mut lse = match options.return_lse {
        true => Some(Tensor::uninit(device, DType::F32, &[num_heads, total_q])?),
        false => None,
    };
    varlen_attention_into(device, [q, k, v], cu_seqlens_q, cu_seqlens_k, options, &mut out, lse.as_mut())?;
    Ok(PackedAttended { out, lse })
}

/// [`varlen_attention`] into memory of the caller: `out` is a `[total_q, H, D]` view, `lse` an `[H, total_q]` f32 view or none;
/// neither shares memory with the inputs or the other. Every element of the views is written, and nothing else. `lse` alone says
/// whether there is one to write: [`VarlenOptions::return_lse`] does not count here.
///
/// # Errors
/// As [`varlen_attention`]; [`Error::Overlap`] if an output shares memory with an input or the other output.
pub fn varlen_attention_into<'a, 'o, 'l>(
    device: &Device,
    [q, k, v]: [impl Into<TensorView<'a>>; 3],
    cu_seqlens_q: &CuSeqlens,
    cu_seqlens_k: &CuSeqlens,
    options: VarlenOptions<'_>,
    out: impl Into<TensorViewMut<'o>>,
    lse: Option<impl Into<TensorViewMut<'l>>>,
) -> Result<Plan> {
    let (q, k, v, out, lse) = (q.into(), k.into(), v.into(), out.into(), lse.map(Into::into));
    let ranges = options.ranges;
    let modifiers = options.modifiers.filter(|modifiers| !modifiers.set().is_empty());
    let on_scores = (ranges, modifiers);
    let (problem, plan) = {
        let (q, k, v, out) = (q.info(), k.info(), v.info(), out.info());
        let lse = lse.as_ref().map(TensorViewMut::info);
        let [q, k, v, out] = [&q, &k, &v, &out].map(slice::from_ref);
        let views = AttentionViews { q, k, v, out, lse: lse.as_ref() };
        let cu_seqlens = (cu_seqlens_q, cu_seqlens_k);
        let problem = AttentionProblem::packed(device.info(), &views, cu_seqlens, on_scores, options.softmax_scale)?;
        let plan = plan_packed(
            &problem,
            cu_seqlens,
            on_scores,
            device.capabilities(),
            Forced { kernel: options.kernel, tile_keys: options.tile_keys, ..Forced::default() },
        )?;
        log::debug!("{} {:?}: {}", problem.dtype, problem.shape, plan.with_estimate());
        (problem, plan)
    };
    let (out, lse) = (out.output(), lse.map(TensorViewMut::output));
    if out.layout.numel() > 0 {
        let rows = Rows::Packed { query: cu_seqlens_q, key: cu_seqlens_k };
        let [q, k, v] = [q, k, v].map(|tensor| Segmented::One(tensor.input()));
        let out = Segmented::One(out);
        let attention = Attention {
            problem: &problem,
            plan,
            q,
            k,
            v,
            out,
            lse,
            rows,
            ranges,
            modifiers,
            bias: None,
            arrivals: None,
        };
        device.backend()?.execute(Op::Attention(attention))?;
    }
    Ok(plan)
}
