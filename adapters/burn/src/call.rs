//! A call, but for its tensors.

use varlen_fa::{
    AttentionMask, CuSeqlens, Device, MaskedAttention, TensorView, TensorViewMut, VarlenOptions, varlen_attention_into,
};

/// What to compute.
pub enum Call<'a> {
    Padded { mask: AttentionMask<'a>, softmax_scale: Option<f32> },
    Packed { query: &'a CuSeqlens, key: &'a CuSeqlens, options: VarlenOptions<'a> },
}

impl Call<'_> {
    /// Launches the attention on views in the library's order. Every element of `out` is written, and nothing else.
    pub fn launch(
        &self,
        device: &Device,
        [q, k, v]: [TensorView<'_>; 3],
        out: TensorViewMut<'_>,
    ) -> varlen_fa::Result<()> {
        match *self {
            Self::Padded { mask, softmax_scale } => {
                let layer = MaskedAttention::new(device);
                let layer = softmax_scale.into_iter().fold(layer, MaskedAttention::with_softmax_scale);
                layer.forward_into(q, k, v, mask, out).map(drop)
            }
            Self::Packed { query, key, options } => {
                varlen_attention_into(device, [q, k, v], query, key, options, out, None::<TensorViewMut<'_>>).map(drop)
            }
        }
    }
}
