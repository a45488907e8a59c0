//! The layer: [`MaskedAttention`].

use crate::attention_mask::{AttentionMask, ResolvedMask};
use crate::attention_outputs::AttentionOutputs;
use crate::call::op::{Arrivals, Attention, Op};
use crate::call::path::Path;
use crate::call::plan::{Forced, Plan, plan_padded};
use crate::call::problem::{AttentionProblem, AttentionViews, ViewInfo};
use crate::call::segments::Segmented;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::layout::Layout;
use crate::tensor::{Segments, Tensor, TensorViewMut};

/// What [`MaskedAttention::forward`] returns.
#[derive(Debug)]
#[non_exhaustive]
pub struct Attended {
    /// `[B, Sq, H, D]`, of the element type of `q`.
    pub out: Tensor,
    /// Path and kernel that were taken, and why.
    pub plan: Plan,
    /// `[B, H, Sq]` f32, if [`MaskedAttention::with_lse`] asked for it.
    pub lse: Option<Tensor>,
}

/// Outputs that a call makes.
struct FutureOutputs {
    shape: Vec<usize>,
    dtype: DType,
    lse_shape: Option<[usize; 3]>,
}

/// Scaled dot-product attention over padded batches.
///
/// Tensors are `[B, S, H, D]` views of any strides with the last dimension contiguous. `q` has H heads, `k` and `v` have Hkv,
/// and Hkv divides H (grouped-query attention): query head `h` reads key/value head `h / (H / Hkv)`. D is any number
/// from 1 to 512; [`Kernel::max_head_dim`] says what each kernel takes. Where D is no multiple of 8, GPUs work on copies whose
/// rows zeros fill up. Products accumulate in f32, and the softmax is f32.
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
    return_lse: bool,
}

impl MaskedAttention {
    /// A layer on a device, with `softmax_scale` 1/√D.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), softmax_scale: None, forced: Forced::default(), return_lse: false }
    }

    /// The factor on `q·kᵀ` before the softmax; any finite number.
    #[must_use]
    pub fn with_softmax_scale(mut self, softmax_scale: f32) -> Self {
        self.softmax_scale = Some(softmax_scale);
        self
    }

    /// [`forward`](Self::forward) returns the log-sum-exp of every row too: the natural logarithm of the sum of `exp(score)`, −∞
    /// for a query that sees no key or is masked, NaN where the row of the output is.
    #[must_use]
    pub fn with_lse(mut self) -> Self {
        self.return_lse = true;
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

    /// Takes the kernel's tiles of so many keys whatever the plan would, for calls without key ranges and segments; for tests and
    /// comparisons. Where the kernel has no such tiles for the head dimension it takes its longest.
    /// [`Capabilities::tilings`](crate::Capabilities::tilings) has what there are.
    #[must_use]
    pub fn with_tile_keys(mut self, keys: usize) -> Self {
        self.forced.tile_keys = Some(keys);
        self
    }

    /// The layer's device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Attention into a new `[B, Sq, H, D]` tensor. `q`, `k` and `v` are tensors, or [`Segments`] of them, each cut as it likes; the
    /// mask is over all segments, one after another.
    ///
    /// Scores are f32. A row is NaN if a score that it keeps is NaN or +∞, or if all of them are −∞; it is zeros only if the mask
    /// leaves it no key.
    ///
    /// # Errors
    /// Any of [`Error`](crate::Error) that names an argument, if the arguments do not fit one another or the device; nothing is
    /// launched then. [`Error::OutOfMemory`](crate::Error::OutOfMemory) and the device's own failures otherwise.
    pub fn forward<'a>(
        &self,
        q: impl Into<Segments<'a>>,
        k: impl Into<Segments<'a>>,
        v: impl Into<Segments<'a>>,
        mask: AttentionMask<'_>,
    ) -> Result<Attended> {
        let inputs = [q.into(), k.into(), v.into()];
        // Checked first, so that a call that does not fit allocates nothing.
        let (future, (problem, plan, mask)) = self.prepare_future(&inputs, mask)?;
        let mut out = Tensor::uninit(&self.device, future.dtype, &future.shape)?;
        let lse_shape = future.lse_shape;
        let mut lse = lse_shape.map(|shape| Tensor::uninit(&self.device, DType::F32, &shape)).transpose()?;
        let outputs = AttentionOutputs { out: (&mut out).into(), lse: lse.as_mut().map(Tensor::view_mut) };
        self.launch(problem, plan, inputs, mask, outputs, |op| self.device.backend()?.execute(op))?;
        Ok(Attended { out, plan, lse })
    }

    /// What [`forward`](Self::forward) would run with these arguments, and why. Everything is checked; nothing is launched, and no
    /// memory of the device is taken.
    ///
    /// ```
    /// use varlen_fa::{AttentionMask, DType, Device, DeviceChoice, KeyMask, MaskedAttention, Path, Tensor, VarlenMeta};
    ///
    /// let device = Device::new(DeviceChoice::Cpu)?;
    /// let x = Tensor::zeros(&device, DType::F32, &[2, 5, 4, 8])?;
    /// let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(5, &[5, 2])?)?;
    /// let plan = MaskedAttention::new(&device).plan(&x, &x, &x, AttentionMask::varlen(&meta))?;
    /// assert_eq!(plan.path, Path::Fused);
    /// # Ok::<(), varlen_fa::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`forward`](Self::forward), but for the device's own.
    pub fn plan<'a>(
        &self,
        q: impl Into<Segments<'a>>,
        k: impl Into<Segments<'a>>,
        v: impl Into<Segments<'a>>,
        mask: AttentionMask<'_>,
    ) -> Result<Plan> {
        let (_, (_, plan, _)) = self.prepare_future(&[q.into(), k.into(), v.into()], mask)?;
        Ok(plan)
    }

    /// Checks and plans a call whose outputs have yet to be made.
    fn prepare_future<'m>(
        &self,
        inputs: &[Segments<'_>; 3],
        mask: AttentionMask<'m>,
    ) -> Result<(FutureOutputs, (AttentionProblem, Plan, ResolvedMask<'m>))> {
        let (shape, dtype) = inputs[0].joint("q")?;
        let out = Segmented::One(self.future_output(dtype, &shape)?);
        let lse_shape = match (self.return_lse, &shape[..]) {
            (true, &[batch, seq, heads, _]) => Some([batch, heads, seq]),
            _ => None,
        };
        let lse = lse_shape.map(|shape| self.future_output(DType::F32, &shape)).transpose()?;
        let prepared = self.prepare(inputs, mask, (&out, lse.as_ref()))?;
        Ok((FutureOutputs { shape: shape.into_owned(), dtype, lse_shape }, prepared))
    }

    /// An output of this device that has yet to be made.
    fn future_output(&self, dtype: DType, shape: &[usize]) -> Result<ViewInfo<'_>> {
        Ok(ViewInfo {
            layout: Layout::contiguous(shape)?,
            dtype,
            device: self.device.info().id,
            device_name: self.device.name(),
            memory_bytes: u64::MAX,
            space: u64::MAX,
            touched: 0..0,
        })
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

    /// Attention into memory of the caller: `out` is a `[B, Sq, H, D]` view, or [`SegmentsMut`](crate::SegmentsMut), that shares no
    /// memory with the inputs. Every element of the view is written, and nothing else. [`AttentionOutputs`] with an `lse`, `[B, H, Sq]` f32, have the log-sum-exp written
    /// too; they alone say so, [`with_lse`](Self::with_lse) does not count here.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::Overlap`](crate::Error::Overlap) if an output shares memory with an input or the
    /// other output.
    pub fn forward_into<'a, 'o>(
        &self,
        q: impl Into<Segments<'a>>,
        k: impl Into<Segments<'a>>,
        v: impl Into<Segments<'a>>,
        mask: AttentionMask<'_>,
        out: impl Into<AttentionOutputs<'o>>,
    ) -> Result<Plan> {
        let (inputs, outputs) = ([q.into(), k.into(), v.into()], out.into());
        let (problem, plan, mask) = {
            let (out, lse) = outputs.infos();
            self.prepare(&inputs, mask, (&out, lse.as_ref()))?
        };
        self.launch(problem, plan, inputs, mask, outputs, |op| self.device.backend()?.execute(op))?;
        Ok(plan)
    }

    /// [`forward_into`](Self::forward_into) with keys and values that come meanwhile.
    pub(crate) fn forward_arriving_into<'a>(
        &self,
        [q, k, v]: [Segments<'a>; 3],
        mask: AttentionMask<'_>,
        outputs: AttentionOutputs<'_>,
        arrivals: Arrivals<'_>,
    ) -> Result<Plan> {
        let inputs = [q, k, v];
        let (problem, plan, mask) = {
            let (out, lse) = outputs.infos();
            self.prepare(&inputs, mask, (&out, lse.as_ref()))?
        };
        let backend = self.device.backend()?;
        self.launch(problem, plan, inputs, mask, outputs, |op| match op {
            Op::Attention(attention) => {
                backend.execute(Op::Attention(Attention { arrivals: Some(arrivals), ..attention }))
            }
            op => backend.execute(op),
        })?;
        Ok(plan)
    }

    /// Checks and plans a call. The mask is resolved once, for both and for the launch.
    pub(crate) fn prepare<'m>(
        &self,
        inputs: &[Segments<'_>; 3],
        mask: AttentionMask<'m>,
        (out, lse): (&Segmented<ViewInfo<'_>>, Option<&ViewInfo<'_>>),
    ) -> Result<(AttentionProblem, Plan, ResolvedMask<'m>)> {
        let resolved = mask.resolve()?;
        let ([q, k, v], mask) = (inputs.each_ref().map(Segments::infos), resolved.info());
        let views = AttentionViews { q: q.as_slice(), k: k.as_slice(), v: v.as_slice(), out: out.as_slice(), lse };
        let problem = AttentionProblem::padded(self.device.info(), &views, &mask, self.softmax_scale)?;
        let plan = plan_padded(&problem, &mask, self.device.capabilities(), &self.device.config(), self.forced)?;
        log::debug!("{} {:?}: {}", problem.dtype, problem.shape, plan.with_estimate());
        Ok((problem, plan, resolved))
    }

    /// Hands the operations of a checked call to `execute`, unless there is nothing to write.
    pub(crate) fn launch(
        &self,
        problem: AttentionProblem,
        plan: Plan,
        inputs: [Segments<'_>; 3],
        mask: ResolvedMask<'_>,
        AttentionOutputs { out, lse }: AttentionOutputs<'_>,
        mut execute: impl FnMut(Op<'_>) -> Result<()>,
    ) -> Result<()> {
        let (out, lse) = (out.outputs(), lse.map(TensorViewMut::output));
        if out.iter().all(|segment| segment.layout.numel() == 0) {
            return Ok(());
        }
        if plan.path == Path::Zero {
            out.try_for_each(|segment| match segment.layout.numel() {
                0 => Ok(()),
                _ => execute(Op::Zero(segment)),
            })?;
            return lse.map_or(Ok(()), |lse| execute(Op::NoKeys(lse)));
        }
        let every_query = mask.every_query(plan.path, problem.shape.seq_q)?;
        let (rows, ranges, bias) = (mask.rows(plan.path, every_query.as_deref()), mask.ranges(), mask.bias(&problem));
        let modifiers = mask.modifiers();
        let [q, k, v] = inputs.map(Segments::inputs);
        let (problem, arrivals) = (&problem, None);
        execute(Op::Attention(Attention { problem, plan, q, k, v, out, lse, rows, ranges, modifiers, bias, arrivals }))
    }
}
