//! Attention on burn's tensors, whichever backend they are of.

use burn_tensor::Tensor;
use varlen_fa::{AttentionMask, CuSeqlens, VarlenOptions};

use crate::call::Call;
use crate::error::{Error, Result};

/// What tensors may be, with the features that this crate was built with.
const BACKENDS: &str = match (cfg!(feature = "flex"), cfg!(feature = "wgpu")) {
    (true, true) => "a float tensor of burn's Flex or wgpu backend without autodiff",
    (true, false) => {
        "a float tensor of burn's Flex backend without autodiff (other backends need this crate's features)"
    }
    (false, true) => "a float tensor of burn's wgpu backend without autodiff (Flex needs this crate's feature `flex`)",
    (false, false) => "a tensor of a backend that is a feature of this crate: `flex`, `wgpu`",
};

/// Attention of a padded batch, in burn's order: `q` `[B, H, Sq, D]`, `k` and `v` `[B, Hkv, Sk, D]`, with Hkv a divisor of H; f32,
/// f16 or bf16. Gives `[B, H, Sq, D]`. The factor on `q·kᵀ` is 1/√D if there is none.
///
/// What `mask` is decides on the rows of masked queries. Under
/// [`AttentionMask::varlen`](varlen_fa::AttentionMask::varlen) they are zeros, and what they held never matters: this costs what
/// the valid tokens cost. Under [`AttentionMask::key`](varlen_fa::AttentionMask::key) they are computed like any other, as by
/// burn's own attention. It also takes ranges of keys (causal, windows) and score modifiers.
///
/// The result lies in memory as `[B, Sq, H, D]`: `swap_dims(1, 2)` and `reshape([B, Sq, H·D])`, which layers do next, move
/// nothing.
///
/// ```
/// use burn_tensor::{Device, Distribution, Tensor};
/// use varlen_fa_burn::masked_attention;
/// use varlen_fa_burn::varlen_fa::{AttentionMask, KeyMask, VarlenMeta};
///
/// let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(4, &[2, 4])?)?;
/// let q = Tensor::<4>::random([2, 8, 4, 32], Distribution::Default, &Device::flex());
/// let out = masked_attention(q.clone(), q.clone(), q, AttentionMask::varlen(&meta), None)?;
/// assert_eq!(out.dims(), [2, 8, 4, 32]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Tensor`] for a backend, device or element type that this crate does not have, and [`Error::Attention`] with what
/// [`varlen_fa::Error`] names: shapes that do not fit one another or the mask. Autodiff tensors are refused: there are no
/// gradients.
pub fn masked_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    mask: AttentionMask<'_>,
    softmax_scale: Option<f32>,
) -> Result<Tensor<4>> {
    attend(&Call::Padded { mask, softmax_scale }, [q, k, v])
}

/// Attention of packed rows: `q` `[total_q, H, D]`, `k` and `v` `[total_k, Hkv, D]`; sequence b of the queries attends to sequence
/// b of the keys. Gives `[total_q, H, D]`. [`VarlenOptions`] has the scale, ranges of keys and score modifiers; its log-sum-exp
/// is not returned.
///
/// # Errors
/// As [`masked_attention`].
pub fn varlen_attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    query: &CuSeqlens,
    key: &CuSeqlens,
    options: VarlenOptions<'_>,
) -> Result<Tensor<3>> {
    attend(&Call::Packed { query, key, options }, [q, k, v])
}

/// Computes on the backend of `q`.
fn attend<const D: usize>(call: &Call<'_>, [q, k, v]: [Tensor<D>; 3]) -> Result<Tensor<D>> {
    #[cfg(feature = "flex")]
    if let Ok(q) = q.clone().try_into_primitive::<burn_flex::Flex>() {
        let [k, v] = [("k", k), ("v", v)].map(|(argument, tensor)| {
            let refused = of_another_backend(argument, &tensor);
            tensor.try_into_primitive::<burn_flex::Flex>().map_err(|_| refused)
        });
        return Ok(Tensor::from_primitive::<burn_flex::Flex>(crate::flex::attend(call, [q, k?, v?])?));
    }
    #[cfg(feature = "wgpu")]
    if let Ok(q) = q.clone().try_into_primitive::<burn_cubecl::Cube>() {
        let [k, v] = [("k", k), ("v", v)].map(|(argument, tensor)| {
            let refused = of_another_backend(argument, &tensor);
            tensor.try_into_primitive::<burn_cubecl::Cube>().map_err(|_| refused)
        });
        return Ok(Tensor::from_primitive::<burn_cubecl::Cube>(crate::wgpu::attend(call, [q, k?, v?])?));
    }
    let _ = (k, v);
    Err(Error::Tensor { argument: "q", expected: BACKENDS.to_owned(), got: described(&q) })
}

#[cfg(any(feature = "flex", feature = "wgpu"))]
fn of_another_backend<const D: usize>(argument: &'static str, tensor: &Tensor<D>) -> Error {
    let expected = "a float tensor of the backend of q, without autodiff".to_owned();
    Error::Tensor { argument, expected, got: described(tensor) }
}

fn described<const D: usize>(tensor: &Tensor<D>) -> String {
    format!("a tensor of {:?} on {:?}", tensor.dtype(), tensor.device())
}
