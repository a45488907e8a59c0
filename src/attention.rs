//! The layer, [`MaskedAttention`], and the primitives it is made of.

use std::sync::Arc;

use crate::call::op::{Attention, DeviceTables, Op, Rows};
use crate::call::plan::{Forced, Path, Plan, plan_packed, plan_padded};
use crate::call::problem::{
    AttentionProblem, AttentionViews, DeviceMetaInfo, MaskInfo, PackViews, ViewInfo, check_pack, check_scatter,
};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::layout::Layout;
use crate::mask::key_mask::KeyMask;
use crate::mask::meta::{CuSeqlens, VarlenMeta};
use crate::tensor::device_meta::DeviceVarlenMeta;
use crate::tensor::{Tensor, TensorView, TensorViewMut};

/// Which queries attend to which keys of padded tensors.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum AttentionMask<'a> {
    /// Every query attends to every key.
    None,
    /// Every query attends to the kept keys of its batch row, `[B, Sk]`. Rows of dropped queries are computed like any other,
    /// as PyTorch's SDPA does. NaN and Inf in dropped keys and values never matter.
    Key(&'a KeyMask),
    /// A floating-point tensor that is added to the scaled scores, broadcast over `[B, H, Sq, Sk]`; of the tensors' element
    /// type or f32. A row whose every entry is −∞ gives zeros.
    Bias(TensorView<'a>),
    /// The valid queries attend to the valid keys of their batch row; the rows of other queries are exactly zero in the output.
    /// [`varlen`](Self::varlen) is self-attention, [`varlen_cross`](Self::varlen_cross) cross-attention.
    Varlen {
        /// Which queries are valid, `[B, Sq]`.
        query: Metadata<'a>,
        /// Which keys are valid, `[B, Sk]`.
        key: Metadata<'a>,
    },
}

/// Metadata of one side of an attention call.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Metadata<'a> {
    /// Built on the host.
    Host(&'a VarlenMeta),
    /// Built by the device, of a mask in its memory.
    Device(&'a DeviceVarlenMeta),
}

impl<'a> From<&'a VarlenMeta> for Metadata<'a> {
    fn from(meta: &'a VarlenMeta) -> Self {
        Self::Host(meta)
    }
}

impl<'a> From<&'a DeviceVarlenMeta> for Metadata<'a> {
    fn from(meta: &'a DeviceVarlenMeta) -> Self {
        Self::Device(meta)
    }
}

/// Metadata is often shared among the layers and threads of a request.
impl<'a> From<&'a Arc<VarlenMeta>> for Metadata<'a> {
    fn from(meta: &'a Arc<VarlenMeta>) -> Self {
        Self::Host(meta)
    }
}

impl<'a> AttentionMask<'a> {
    /// Self-attention among the valid tokens of `[B, S]`; the rows of the others are exactly zero in the output.
    pub fn varlen(meta: impl Into<Metadata<'a>>) -> Self {
        let meta = meta.into();
        Self::Varlen { query: meta, key: meta }
    }

    /// Cross-attention of the valid queries, `[B, Sq]`, to the valid keys of their batch row, `[B, Sk]`; other rows are exactly
    /// zero in the output. Both are built on the host, or both on the device.
    pub fn varlen_cross(query: impl Into<Metadata<'a>>, key: impl Into<Metadata<'a>>) -> Self {
        Self::Varlen { query: query.into(), key: key.into() }
    }

    /// The mask as checks, plan and launch take it.
    fn resolve(self) -> Result<ResolvedMask<'a>> {
        let (query, key) = match self {
            Self::None => return Ok(ResolvedMask::None),
            Self::Key(mask) => return Ok(ResolvedMask::Key(mask)),
            Self::Bias(bias) => return Ok(ResolvedMask::Bias(bias)),
            Self::Varlen { query, key } => (query, key),
        };
        if let (Some(query), Some(key)) = (query.on_host(), key.on_host()) {
            return Ok(ResolvedMask::Varlen { query, key });
        }
        if let (Some(query), Some(key)) = (query.on_device(), key.on_device()) {
            return Ok(ResolvedMask::DeviceVarlen { query, key });
        }
        Err(Error::NotApplicable {
            argument: "mask",
            got: "metadata of the host for one side and of the device for the other".to_owned(),
            why: "both sides must be built on the host, or both on the device".to_owned(),
        })
    }
}

impl<'a> Metadata<'a> {
    /// The metadata in host memory, where a device whose memory is the host's keeps it too.
    fn on_host(self) -> Option<&'a VarlenMeta> {
        match self {
            Self::Host(meta) => Some(meta),
            Self::Device(meta) => meta.on_host(),
        }
    }

    fn on_device(self) -> Option<DeviceSide<'a>> {
        match self {
            Self::Host(_) => None,
            Self::Device(meta) => Some(DeviceSide { info: meta.info(), tables: meta.on_device()? }),
        }
    }
}

/// One side's metadata in tables of a device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceSide<'a> {
    info: DeviceMetaInfo<'a>,
    tables: DeviceTables<'a>,
}

/// An [`AttentionMask`] whose metadata was looked up.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ResolvedMask<'a> {
    None,
    Key(&'a KeyMask),
    Bias(TensorView<'a>),
    Varlen { query: &'a VarlenMeta, key: &'a VarlenMeta },
    DeviceVarlen { query: DeviceSide<'a>, key: DeviceSide<'a> },
}

impl<'a> ResolvedMask<'a> {
    /// What checks and plan need.
    fn info(&self) -> MaskInfo<'_> {
        match *self {
            Self::None => MaskInfo::None,
            Self::Key(mask) => MaskInfo::Key(mask),
            Self::Bias(ref bias) => MaskInfo::Bias(bias.info()),
            Self::Varlen { query, key } => MaskInfo::Varlen { query, key },
            Self::DeviceVarlen { query, key } => MaskInfo::DeviceVarlen { query: query.info, key: key.info },
        }
    }

    /// The rows of a launch on this path. On the dense path masks do the work of metadata, and masks that keep all are left out.
    fn rows(self, problem: &AttentionProblem, path: Path) -> Rows<'a> {
        let (key_mask, zero_rows, bias) = match self {
            Self::Varlen { query, key } if path != Path::Dense => return Rows::Varlen { query, key },
            Self::DeviceVarlen { query, key } => return Rows::DeviceVarlen { query: query.tables, key: key.tables },
            Self::None => (None, None, None),
            Self::Key(mask) => (Some(mask), None, None),
            Self::Bias(bias) => (None, None, problem.bias.map(|layout| bias.with_layout(layout).input())),
            Self::Varlen { query, key } => (Some(key.key_mask()), Some(query.key_mask()), None),
        };
        let unless_full = |mask: &&KeyMask| !mask.is_all_kept();
        Rows::Dense { key_mask: key_mask.filter(unless_full), bias, zero_rows: zero_rows.filter(unless_full) }
    }
}

/// What [`MaskedAttention::forward`] returns.
#[derive(Debug)]
#[non_exhaustive]
pub struct Attended {
    /// `[B, Sq, H, D]`, of the element type of `q`.
    pub out: Tensor,
    /// Path and kernel that were taken, and why.
    pub plan: Plan,
}

/// Scaled dot-product attention over padded batches.
///
/// Tensors are `[B, S, H, D]` views of any strides with the last dimension contiguous. `q` has H heads, `k` and `v` have Hkv,
/// and Hkv divides H (grouped-query attention): query head `h` reads key/value head `h / (H / Hkv)`. D is a multiple of 8 from
/// 8 to 256. Products accumulate in f32, and the softmax is f32.
///
/// ```
/// use varlen_fa::{AttentionMask, Device, DeviceChoice, KeyMask, MaskedAttention, Tensor, VarlenMeta};
///
/// let device = Device::new(DeviceChoice::Cpu)?;
/// let (batch, seq, heads, dim) = (2, 5, 4, 8);
/// let x = Tensor::from_slice(&device, &vec![0.5_f32; batch * seq * heads * dim], &[batch, seq, heads, dim])?;
///
/// // Once per request.
/// let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(seq, &[5, 2])?)?;
///
/// // In every layer and step.
/// let attended = MaskedAttention::new(&device).forward(&x, &x, &x, AttentionMask::varlen(&meta))?;
/// println!("{}", attended.plan);
/// let out = attended.out.to_vec::<f32>()?;
/// assert!((out[0] - 0.5).abs() < 1e-6);
/// assert!(out[(seq + 2) * heads * dim..].iter().all(|&masked| masked == 0.0));
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct MaskedAttention {
    device: Device,
    softmax_scale: Option<f32>,
    forced: Forced,
}

impl MaskedAttention {
    /// A layer on a device, with `softmax_scale` 1/√D.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), softmax_scale: None, forced: Forced::default() }
    }

    /// The factor on `q·kᵀ` before the softmax; any finite number.
    #[must_use]
    pub fn with_softmax_scale(mut self, softmax_scale: f32) -> Self {
        self.softmax_scale = Some(softmax_scale);
        self
    }

    /// Takes this path whatever the plan would be; for tests and comparisons. A call it does not fit fails with
    /// [`Error::NotApplicable`].
    #[must_use]
    pub fn with_path(mut self, path: Path) -> Self {
        self.forced.path = Some(path);
        self
    }

    /// Runs this kernel whatever the plan would be; for tests and comparisons. A device that does not run it fails with
    /// [`Error::NotApplicable`].
    #[must_use]
    pub fn with_kernel(mut self, kernel: Kernel) -> Self {
        self.forced.kernel = Some(kernel);
        self
    }

    /// The layer's device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Attention into a new `[B, Sq, H, D]` tensor.
    ///
    /// # Errors
    /// Any of [`Error`] that names an argument, if the arguments do not fit one another or the device; nothing is
    /// launched then. [`Error::OutOfMemory`] and the device's own failures otherwise.
    pub fn forward<'a>(
        &self,
        q: impl Into<TensorView<'a>>,
        k: impl Into<TensorView<'a>>,
        v: impl Into<TensorView<'a>>,
        mask: AttentionMask<'_>,
    ) -> Result<Attended> {
        let (q, k, v) = (q.into(), k.into(), v.into());
        // Checked against an output that has yet to be made, so that a call that does not fit allocates nothing.
        let future_out = ViewInfo {
            layout: Layout::contiguous(q.shape())?,
            dtype: q.dtype(),
            device: self.device.info().id,
            device_name: self.device.name(),
            memory_bytes: u64::MAX,
            space: u64::MAX,
            touched: 0..0,
        };
        let (problem, plan, mask) = self.prepare(&q, &k, &v, mask, &future_out)?;
        let mut out = Tensor::uninit(&self.device, q.dtype(), q.shape())?;
        self.launch(problem, plan, [q, k, v], mask, out.view_mut(), |op| self.device.backend().execute(op))?;
        Ok(Attended { out, plan })
    }

    /// Attention into memory of the caller: `out` is a `[B, Sq, H, D]` view that shares no memory with the inputs. Every element
    /// of the view is written, and nothing else.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::Overlap`] if `out` shares memory with an input.
    pub fn forward_into<'a, 'o>(
        &self,
        q: impl Into<TensorView<'a>>,
        k: impl Into<TensorView<'a>>,
        v: impl Into<TensorView<'a>>,
        mask: AttentionMask<'_>,
        out: impl Into<TensorViewMut<'o>>,
    ) -> Result<Plan> {
        let (q, k, v, out) = (q.into(), k.into(), v.into(), out.into());
        let (problem, plan, mask) = self.prepare(&q, &k, &v, mask, &out.info())?;
        self.launch(problem, plan, [q, k, v], mask, out, |op| self.device.backend().execute(op))?;
        Ok(plan)
    }

    /// Checks and plans a call. The mask is resolved once, for both and for the launch.
    pub(crate) fn prepare<'m>(
        &self,
        q: &TensorView<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        mask: AttentionMask<'m>,
        out: &ViewInfo<'_>,
    ) -> Result<(AttentionProblem, Plan, ResolvedMask<'m>)> {
        let resolved = mask.resolve()?;
        let (q, k, v, mask) = (q.info(), k.info(), v.info(), resolved.info());
        let views = AttentionViews { q: &q, k: &k, v: &v, out };
        let problem = AttentionProblem::padded(self.device.info(), &views, &mask, self.softmax_scale)?;
        let plan = plan_padded(&problem, &mask, self.device.capabilities(), &self.device.config(), self.forced)?;
        log::debug!("{} {:?}: {plan}", problem.dtype, problem.shape);
        Ok((problem, plan, resolved))
    }

    /// Hands the operation of a checked call to `execute`, unless there is nothing to write.
    pub(crate) fn launch(
        &self,
        problem: AttentionProblem,
        plan: Plan,
        [q, k, v]: [TensorView<'_>; 3],
        mask: ResolvedMask<'_>,
        out: TensorViewMut<'_>,
        execute: impl FnOnce(Op<'_>) -> Result<()>,
    ) -> Result<()> {
        let out = out.output();
        if out.layout.numel() == 0 {
            return Ok(());
        }
        if plan.path == Path::Zero {
            return execute(Op::Zero(out));
        }
        let rows = mask.rows(&problem, plan.path);
        let (q, k, v) = (q.input(), k.input(), v.input());
        execute(Op::Attention(Attention { problem: &problem, plan, q, k, v, out, lse: None, rows }))
    }
}

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
    pack_all(device, [("padded", padded.into(), "packed", packed.into())], meta, |op| device.backend().execute(op))
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
    pack_all(device, copies, meta, |op| device.backend().execute(op))
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
    scatter(device, packed.into(), meta, padded.into(), |op| device.backend().execute(op))
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
    /// `[H, total_q]` f32: the natural logarithm of the sum of `exp(score)` of each row, −∞ for a row with no key.
    pub lse: Option<Tensor>,
}

/// Options of [`varlen_attention`].
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct VarlenOptions {
    /// The factor on `q·kᵀ`; 1/√D if there is none.
    pub softmax_scale: Option<f32>,
    /// Whether to return the log-sum-exp of every row.
    pub return_lse: bool,
    /// The kernel to run; the device's preferred one if there is none.
    pub kernel: Option<Kernel>,
}

impl VarlenOptions {
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
/// As [`MaskedAttention::forward`]; [`Error::CuSeqlens`] if the sequences do not fit the tensors.
pub fn varlen_attention<'a>(
    device: &Device,
    [q, k, v]: [impl Into<TensorView<'a>>; 3],
    cu_seqlens_q: &CuSeqlens,
    cu_seqlens_k: &CuSeqlens,
    options: VarlenOptions,
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
    options: VarlenOptions,
    out: impl Into<TensorViewMut<'o>>,
    lse: Option<impl Into<TensorViewMut<'l>>>,
) -> Result<Plan> {
    let (q, k, v, out, lse) = (q.into(), k.into(), v.into(), out.into(), lse.map(Into::into));
    let (problem, plan) = {
        let (q, k, v, out) = (q.info(), k.info(), v.info(), out.info());
        let lse = lse.as_ref().map(TensorViewMut::info);
        let views = AttentionViews { q: &q, k: &k, v: &v, out: &out };
        let cu_seqlens = (cu_seqlens_q, cu_seqlens_k);
        let problem = AttentionProblem::packed(device.info(), &views, lse.as_ref(), cu_seqlens, options.softmax_scale)?;
        let plan = plan_packed(&problem, device.capabilities(), Forced { path: None, kernel: options.kernel })?;
        log::debug!("{} {:?}: {plan}", problem.dtype, problem.shape);
        (problem, plan)
    };
    let (out, lse) = (out.output(), lse.map(TensorViewMut::output));
    if out.layout.numel() > 0 {
        let rows = Rows::Packed { query: cu_seqlens_q, key: cu_seqlens_k };
        let (q, k, v) = (q.input(), k.input(), v.input());
        let attention = Attention { problem: &problem, plan, q, k, v, out, lse, rows };
        device.backend().execute(Op::Attention(attention))?;
    }
    Ok(plan)
}
