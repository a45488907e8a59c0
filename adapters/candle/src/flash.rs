//! The functions of candle-flash-attn, with the same arguments and results, on every device that [`Attention`] has.
//!
//! Windows and causal masks line up the last query of a sequence with its last key, and distances of ALiBi count from there, as in
//! flash-attention. A query that sees no key gives zeros.

use candle_core::{DType, Error, Result, Tensor};
use varlen_fa::{CuSeqlens, KeyRanges, RangesOf, ScoreModifiers};

use crate::attention::Attention;

/// What these functions say of scores.
#[derive(Clone, Copy)]
struct Scores<'a> {
    scale: f32,
    /// Keys before and after a query's own place that it sees; `None` is no limit.
    window: [Option<usize>; 2],
    alibi_slopes: Option<&'a Tensor>,
    softcap: Option<f32>,
}

impl<'a> Scores<'a> {
    fn windowed(scale: f32, left: Option<usize>, right: Option<usize>) -> Self {
        Self { scale, window: [left, right], alibi_slopes: None, softcap: None }
    }

    fn causal(scale: f32, causal: bool) -> Self {
        Self::windowed(scale, None, causal.then_some(0))
    }

    fn alibi(self, slopes: Option<&'a Tensor>) -> Self {
        Self { alibi_slopes: slopes, ..self }
    }

    fn apply(self, attention: Attention, of: RangesOf) -> Result<Attention> {
        let mut attention = attention.with_softmax_scale(self.scale);
        if self.window != [None, None] {
            let [left, right] = self.window;
            attention = attention.with_ranges(&KeyRanges::window(of, left, right).map_err(Error::wrap)?);
        }
        if self.alibi_slopes.is_some() || self.softcap.is_some() {
            let mut modifiers = ScoreModifiers::new().with_softcap(self.softcap.unwrap_or(0.0));
            if let Some(slopes) = self.alibi_slopes {
                // Some models keep them in the type of their weights.
                modifiers = modifiers.with_alibi(slopes.to_dtype(DType::F32)?.to_vec1::<f32>()?);
            }
            attention = attention.with_modifiers(&modifiers);
        }
        Ok(attention)
    }
}

/// Of padded tensors without a mask.
fn dense(q: &Tensor, k: &Tensor, v: &Tensor, scores: Scores<'_>) -> Result<Tensor> {
    let (batch, seq_q, _, _) = q.dims4()?;
    let (_, seq_k, _, _) = k.dims4()?;
    scores.apply(Attention::dense(), RangesOf::from([batch, seq_q, seq_k]))?.forward(q, k, v)
}

/// Of packed rows.
fn packed(
    [q, k, v]: [&Tensor; 3],
    [seqlens_q, seqlens_k]: [&Tensor; 2],
    [max_seqlen_q, max_seqlen_k]: [usize; 2],
    scores: Scores<'_>,
) -> Result<Tensor> {
    let query = cu_seqlens("seqlens_q", seqlens_q, "max_seqlen_q", max_seqlen_q)?;
    let key = cu_seqlens("seqlens_k", seqlens_k, "max_seqlen_k", max_seqlen_k)?;
    let of = RangesOf::from((&query, &key));
    scores.apply(Attention::packed(&query, &key), of)?.forward(q, k, v)
}

fn cu_seqlens(argument: &str, values: &Tensor, most_argument: &str, most: usize) -> Result<CuSeqlens> {
    if values.dtype() != DType::U32 {
        candle_core::bail!("`{argument}`: expected elements of type u32, got {}", values.dtype().as_str());
    }
    let values = values.to_vec1::<u32>()?;
    let fits = |&value: &u32| match i32::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => candle_core::bail!("`{argument}`: expected values that fit an i32, got {value}"),
    };
    let values = values.iter().map(fits).collect::<Result<Vec<i32>>>()?;
    let seqlens = CuSeqlens::new(&values).map_err(|error| Error::wrap(error).context(argument.to_owned()))?;
    if seqlens.max_seqlen() > most {
        let longest = seqlens.max_seqlen();
        candle_core::bail!(
            "`{most_argument}`: expected at least {longest}, the longest sequence of {argument}, got {most}"
        );
    }
    Ok(seqlens)
}

/// Attention of `q` `[B, Sq, H, D]` with `k` and `v` `[B, Sk, Hkv, D]`, without a key mask. `causal` hides later keys.
///
/// # Errors
/// As [`Attention::forward`].
pub fn flash_attn(q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f32, causal: bool) -> Result<Tensor> {
    dense(q, k, v, Scores::causal(softmax_scale, causal))
}

/// [`flash_attn`] in a window: a query sees that many keys before and after its own place; `None` is no limit.
///
/// # Errors
/// As [`Attention::forward`].
pub fn flash_attn_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    dense(q, k, v, Scores::windowed(softmax_scale, window_size_left, window_size_right))
}

/// [`flash_attn`] with ALiBi: `alibi_slopes` `[H]`.
///
/// # Errors
/// As [`Attention::forward`].
pub fn flash_attn_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    dense(q, k, v, Scores::causal(softmax_scale, causal).alibi(Some(alibi_slopes)))
}

/// [`flash_attn_windowed`] with ALiBi.
///
/// # Errors
/// As [`Attention::forward`].
pub fn flash_attn_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    dense(q, k, v, Scores::windowed(softmax_scale, window_size_left, window_size_right).alibi(Some(alibi_slopes)))
}

/// [`flash_attn_windowed`] with ALiBi, if there are slopes, and a soft cap of the scores.
///
/// # Errors
/// As [`Attention::forward`].
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let scores = Scores::windowed(softmax_scale, window_size_left, window_size_right).alibi(alibi_slopes);
    dense(q, k, v, Scores { softcap: Some(softcap), ..scores })
}

/// Attention of packed rows: `q` `[total_q, H, D]`, `k` and `v` `[total_k, Hkv, D]`. Sequence b is rows
/// `seqlens[b]..seqlens[b + 1]` of either; `seqlens_q` and `seqlens_k` are `[B + 1]`, u32, start at 0 and never fall.
///
/// They are read on the host: on a GPU that waits for the stream. [`Attention::packed`], built once per request, does not.
///
/// # Errors
/// As [`Attention::forward`]; a sequence that is longer than `max_seqlen_q` or `max_seqlen_k`.
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    packed([q, k, v], [seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k], Scores::causal(softmax_scale, causal))
}

/// [`flash_attn_varlen`] in a window: a query sees that many keys before and after its own place; `None` is no limit.
///
/// # Errors
/// As [`flash_attn_varlen`].
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    packed(
        [q, k, v],
        [seqlens_q, seqlens_k],
        [max_seqlen_q, max_seqlen_k],
        Scores::windowed(softmax_scale, window_size_left, window_size_right),
    )
}

/// [`flash_attn_varlen`] with ALiBi: `alibi_slopes` `[H]`.
///
/// # Errors
/// As [`flash_attn_varlen`].
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    packed(
        [q, k, v],
        [seqlens_q, seqlens_k],
        [max_seqlen_q, max_seqlen_k],
        Scores::causal(softmax_scale, causal).alibi(Some(alibi_slopes)),
    )
}

/// [`flash_attn_varlen_windowed`] with ALiBi.
///
/// # Errors
/// As [`flash_attn_varlen`].
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let scores = Scores::windowed(softmax_scale, window_size_left, window_size_right);
    packed([q, k, v], [seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k], scores.alibi(Some(alibi_slopes)))
}

/// [`flash_attn_varlen_windowed`] with ALiBi, if there are slopes, and a soft cap of the scores.
///
/// # Errors
/// As [`flash_attn_varlen`].
#[expect(clippy::too_many_arguments, reason = "candle-flash-attn's signature")]
pub fn flash_attn_varlen_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let scores = Scores::windowed(softmax_scale, window_size_left, window_size_right).alibi(alibi_slopes);
    packed([q, k, v], [seqlens_q, seqlens_k], [max_seqlen_q, max_seqlen_k], Scores { softcap: Some(softcap), ..scores })
}
