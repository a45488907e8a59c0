//! burn's `TransformerEncoder`, layer by layer, but for its attention.

use anyhow::Result;
use burn_nn::Linear;
use burn_nn::attention::MultiHeadAttention;
use burn_nn::transformer::TransformerEncoder;
use burn_tensor::Tensor;

/// As `TransformerEncoder::forward` without `norm_first` and dropout; `attend` takes q, k and v, `[B, H, S, D]`.
pub fn forward(
    encoder: &TransformerEncoder,
    x: Tensor<3>,
    attend: impl Fn([Tensor<4>; 3]) -> Result<Tensor<4>>,
) -> Result<Tensor<3>> {
    encoder.layers.iter().try_fold(x, |x, layer| {
        let x = layer.norm_1.forward(x.clone() + context(&layer.mha, x, &attend)?);
        Ok(layer.norm_2.forward(x.clone() + layer.pwff.forward(x)))
    })
}

fn context(
    layer: &MultiHeadAttention,
    x: Tensor<3>,
    attend: impl Fn([Tensor<4>; 3]) -> Result<Tensor<4>>,
) -> Result<Tensor<3>> {
    let shape @ [batch, seq, _] = x.dims();
    let project =
        |linear: &Linear| linear.forward(x.clone()).reshape([batch, seq, layer.n_heads, layer.d_k]).swap_dims(1, 2);
    let out = attend([project(&layer.query), project(&layer.key), project(&layer.value)])?;
    Ok(layer.output.forward(out.swap_dims(1, 2).reshape(shape)))
}
