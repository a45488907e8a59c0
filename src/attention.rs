//! The layer: [`MaskedAttention`].

use crate::attention_mask::{AttentionMask, ResolvedMask};
use crate::call::op::{Attention, Op};
use crate::call::plan::{Forced, Path, Plan, plan_padded};
use crate::call::problem::{AttentionProblem, AttentionViews, ViewInfo};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::layout::Layout;
use crate::tensor::{Tensor, TensorView, TensorViewMut};

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
    /// [`Error::NotApplicable`](crate::Error::NotApplicable).
    #[must_use]
    pub fn with_path(mut self, path: Path) -> Self {
        self.forced.path = Some(path);
        self
    }

    /// Runs this kernel whatever the plan would be; for tests and comparisons. A device that does not run it fails with
    /// [`Error::NotApplicable`](crate::Error::NotApplicable).
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
    /// Scores are f32. A row is NaN if a score that it keeps is NaN or +∞, or if all of them are −∞; it is zeros only if the mask
    /// leaves it no key.
    ///
    /// # Errors
    /// Any of [`Error`](crate::Error) that names an argument, if the arguments do not fit one another or the device; nothing is
    /// launched then. [`Error::OutOfMemory`](crate::Error::OutOfMemory) and the device's own failures otherwise.
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
        self.launch(problem, plan, [q, k, v], mask, out.view_mut(), |op| self.device.backend()?.execute(op))?;
        Ok(Attended { out, plan })
    }

    /// Makes the device ready for calls of this kind, so that the first of them takes no longer than the others: compiles their
    /// shaders, and uploads the metadata. It runs one call on zeros, `[B, Sq, H, D]` queries and `[B, Sk, Hkv, D]` keys and values
    /// of this element type, with the mask, and waits for it; its memory is free again afterwards.
    ///
    /// On wgpu devices a shader depends on the element type, D and the kind of the mask, not on B, S and the number of heads. A
    /// small batch will do, as long as [`plan`](Attended::plan) is the same: it looks at the metadata.
    ///
    /// # Errors
    /// As [`forward`](Self::forward) and [`Device::synchronize`].
    pub fn warm_up(
        &self,
        dtype: DType,
        q_shape: &[usize],
        kv_shape: &[usize],
        mask: AttentionMask<'_>,
    ) -> Result<Plan> {
        let attended = self.run_on_zeros(dtype, q_shape, kv_shape, mask)?;
        self.device.synchronize()?;
        Ok(attended.plan)
    }

    /// [`warm_up`](Self::warm_up) for code that also runs in a browser: there it gives the thread back until the shaders are
    /// compiled, elsewhere it waits.
    ///
    /// # Errors
    /// As [`warm_up`](Self::warm_up).
    pub async fn warm_up_async(
        &self,
        dtype: DType,
        q_shape: &[usize],
        kv_shape: &[usize],
        mask: AttentionMask<'_>,
    ) -> Result<Plan> {
        let attended = self.run_on_zeros(dtype, q_shape, kv_shape, mask)?;
        self.device.synchronize_async().await?;
        Ok(attended.plan)
    }

    fn run_on_zeros(
        &self,
        dtype: DType,
        q_shape: &[usize],
        kv_shape: &[usize],
        mask: AttentionMask<'_>,
    ) -> Result<Attended> {
        let q = Tensor::zeros(&self.device, dtype, q_shape)?;
        let [k, v] = [Tensor::zeros(&self.device, dtype, kv_shape)?, Tensor::zeros(&self.device, dtype, kv_shape)?];
        self.forward(&q, &k, &v, mask)
    }

    /// Attention into memory of the caller: `out` is a `[B, Sq, H, D]` view that shares no memory with the inputs. Every element
    /// of the view is written, and nothing else.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::Overlap`](crate::Error::Overlap) if `out` shares memory with an input.
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
        self.launch(problem, plan, [q, k, v], mask, out, |op| self.device.backend()?.execute(op))?;
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
        log::debug!("{} {:?}: {}", problem.dtype, problem.shape, plan.with_estimate());
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
        let (rows, ranges, bias) = (mask.rows(plan.path), mask.ranges(), mask.bias(&problem));
        let modifiers = mask.modifiers();
        let (q, k, v) = (q.input(), k.input(), v.input());
        let lse = None;
        execute(Op::Attention(Attention { problem: &problem, plan, q, k, v, out, lse, rows, ranges, modifiers, bias }))
    }
}
