//! Attention as one of candle's custom operations.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Error, Layout, MetalStorage, Result, Shape, Tensor};
use varlen_fa::{
    AttentionMask, CuSeqlens, Device, KeyRanges, MaskedAttention, ScoreModifiers, TensorView, TensorViewMut,
    VarlenMeta, VarlenOptions, bf16, f16, varlen_attention_into,
};

use crate::cpu::{self, Shared};

/// Attention of a padded batch: `q` `[B, Sq, H, D]`, `k` and `v` `[B, Sk, Hkv, D]`, with Hkv a divisor of H; f32, f16 or bf16, of
/// any strides but the last dimension's, which is 1. Gives `[B, Sq, H, D]`. Valid queries attend to the valid keys of their batch
/// row, scaled by 1/√D; rows of masked tokens are zeros, and what they hold in the inputs never matters.
///
/// Build `meta` once per request: every layer uses it again.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use varlen_fa_candle::masked_attention;
/// use varlen_fa_candle::varlen_fa::{KeyMask, VarlenMeta};
///
/// let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(4, &[2, 4])?)?;
/// let q = Tensor::randn(0_f32, 1.0, (2, 4, 8, 32), &Device::Cpu)?;
/// let out = masked_attention(&q, &q, &q, &meta)?;
/// assert_eq!(out.dims(), [2, 4, 8, 32]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`Attention::forward`].
pub fn masked_attention(q: &Tensor, k: &Tensor, v: &Tensor, meta: &VarlenMeta) -> Result<Tensor> {
    Attention::masked(meta).forward(q, k, v)
}

/// Which rows of the tensors there are.
#[derive(Debug, Clone)]
enum Rows {
    Dense,
    /// Metadata of the queries and of the keys.
    Padded(Arc<[VarlenMeta; 2]>),
    Packed {
        query: CuSeqlens,
        key: CuSeqlens,
    },
}

/// Attention, and all that is said of it but its tensors. Cheap to clone: clones share what was built.
#[derive(Debug, Clone)]
pub struct Attention {
    rows: Rows,
    softmax_scale: Option<f32>,
    ranges: Option<KeyRanges>,
    modifiers: Option<ScoreModifiers>,
}

impl Attention {
    /// Of `[B, S, H, D]` tensors, every token valid.
    #[must_use]
    pub fn dense() -> Self {
        Self::of(Rows::Dense)
    }

    /// Of `[B, S, H, D]` tensors: queries and keys are valid where the metadata says so.
    #[must_use]
    pub fn masked(meta: &VarlenMeta) -> Self {
        Self::masked_cross(meta, meta)
    }

    /// Of `[B, S, H, D]` tensors, with metadata of the queries and of the keys.
    #[must_use]
    pub fn masked_cross(query: &VarlenMeta, key: &VarlenMeta) -> Self {
        Self::of(Rows::Padded(Arc::new([query.clone(), key.clone()])))
    }

    /// Of packed rows, `[total, H, D]`: sequence b of the queries attends to sequence b of the keys.
    #[must_use]
    pub fn packed(query: &CuSeqlens, key: &CuSeqlens) -> Self {
        Self::of(Rows::Packed { query: query.clone(), key: key.clone() })
    }

    fn of(rows: Rows) -> Self {
        Self { rows, softmax_scale: None, ranges: None, modifiers: None }
    }

    /// With this factor on `q·kᵀ`; it is 1/√D without.
    #[must_use]
    pub fn with_softmax_scale(mut self, softmax_scale: f32) -> Self {
        self.softmax_scale = Some(softmax_scale);
        self
    }

    /// With these ranges of keys, made for the same rows: causal masks, windows, documents.
    #[must_use]
    pub fn with_ranges(mut self, ranges: &KeyRanges) -> Self {
        self.ranges = Some(ranges.clone());
        self
    }

    /// With these score modifiers: soft cap, ALiBi, sinks.
    #[must_use]
    pub fn with_modifiers(mut self, modifiers: &ScoreModifiers) -> Self {
        self.modifiers = Some(modifiers.clone());
        self
    }

    /// Computes. The output is new, contiguous, and of the shape and element type of `q`.
    ///
    /// # Errors
    /// An element type that the device has not, tensors of different devices or types, and what [`varlen_fa::Error`] names:
    /// shapes that do not fit one another, the metadata or the ranges, and a last dimension that is not contiguous. Metal tensors.
    /// A backward pass through the result.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        q.apply_op3(k, v, self.clone())
    }

    /// Launches the attention. Every element of `out` is written, and nothing else.
    pub(crate) fn launch(
        &self,
        device: &Device,
        [q, k, v]: [TensorView<'_>; 3],
        out: TensorViewMut<'_>,
    ) -> varlen_fa::Result<()> {
        let mask = match &self.rows {
            Rows::Packed { query, key } => {
                let mut options = VarlenOptions::default();
                options.softmax_scale = self.softmax_scale;
                options.ranges = self.ranges.as_ref();
                options.modifiers = self.modifiers.as_ref();
                return varlen_attention_into(device, [q, k, v], query, key, options, out, None::<TensorViewMut<'_>>)
                    .map(drop);
            }
            Rows::Dense => AttentionMask::none(),
            Rows::Padded(meta) => AttentionMask::varlen_cross(&meta[0], &meta[1]),
        };
        let mask = self.ranges.iter().fold(mask, AttentionMask::with_ranges);
        let mask = self.modifiers.iter().fold(mask, AttentionMask::with_modifiers);
        let layer = MaskedAttention::new(device);
        let layer = self.softmax_scale.into_iter().fold(layer, MaskedAttention::with_softmax_scale);
        layer.forward_into(q, k, v, mask, out).map(drop)
    }

    fn on_cpu<T: Shared>(&self, inputs: [(&CpuStorage, &Layout); 3]) -> Result<(CpuStorage, Shape)> {
        let [(q, q_layout), (k, k_layout), (v, v_layout)] = inputs;
        let views =
            [cpu::view::<T>("q", q, q_layout)?, cpu::view::<T>("k", k, k_layout)?, cpu::view::<T>("v", v, v_layout)?];
        let shape = q_layout.shape();
        let mut out = bytemuck::zeroed_vec::<T>(shape.elem_count());
        let sink = TensorViewMut::from_host(&mut out, shape.dims()).map_err(Error::wrap)?;
        self.launch(&cpu::device()?, views, sink).map_err(Error::wrap)?;
        Ok((T::storage(out), shape.clone()))
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "varlen-fa"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let inputs = [(q, q_layout), (k, k_layout), (v, v_layout)];
        match q.dtype() {
            DType::F32 => self.on_cpu::<f32>(inputs),
            DType::F16 => self.on_cpu::<f16>(inputs),
            DType::BF16 => self.on_cpu::<bf16>(inputs),
            other => candle_core::bail!("`q`: expected elements of type f32, f16 or bf16, got {}", other.as_str()),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let inputs = [(q, q_layout), (k, k_layout), (v, v_layout)];
        let launch =
            |device: &Device, views: [TensorView<'_>; 3], out: TensorViewMut<'_>| self.launch(device, views, out);
        match q.dtype() {
            // The library's error says which types its CUDA kernels have.
            DType::F32 => crate::cuda::forward::<f32>(inputs, launch),
            DType::F16 => crate::cuda::forward::<f16>(inputs, launch),
            DType::BF16 => crate::cuda::forward::<bf16>(inputs, launch),
            other => candle_core::bail!("`q`: expected elements of type f16 or bf16, got {}", other.as_str()),
        }
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        candle_core::bail!("varlen-fa-candle was built without its feature cuda")
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        candle_core::bail!(
            "varlen-fa has no attention on candle's Metal tensors: it reaches Metal through wgpu, which has buffers of its own, so \
             each call would copy its tensors through the host. Move them to the CPU device for that"
        )
    }
}
