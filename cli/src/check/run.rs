//! A call on a device.

use anyhow::Result;
use varlen_fa::{
    AttentionMask, AttentionOutputs, DType, Device, Element, KeyMask, KeyRanges, MaskedAttention, ScoreModifiers,
    Tensor, TensorView, TensorViewMut, VarlenMeta, bf16, f16,
};
use varlen_fa_testkit::OracleShape;
use varlen_fa_testkit::random::normal_rounded;

use super::call::{Call, Place, Rule, Tokens};
use super::judge::{Values, judge};

/// Computes a call and judges what comes out.
///
/// # Errors
/// [`varlen_fa::Error::NotApplicable`] where the device does not do such calls; whatever else fails;
/// what is wrong with the output.
pub fn run(device: &Device, call: &Call) -> Result<()> {
    let values = Values::of(call);
    let (out, lse) = match call.dtype {
        DType::F16 => attend::<f16>(device, call, &values),
        DType::Bf16 => attend::<bf16>(device, call, &values),
        _ => attend::<f32>(device, call, &values),
    }?;
    judge(call, &values, &out, lse.as_deref())
}

impl Values {
    /// Standard normal values that the call's element type holds exactly.
    fn of(call: &Call) -> Self {
        let OracleShape { batch, seq_q, seq_k, heads, kv_heads, head_dim } = call.shape;
        let values = |stream: u64, len: usize| normal_rounded(call.seed, stream, len, call.precision());
        let kv = batch * seq_k * kv_heads * head_dim;
        let bias = call.bias.map(|shape| values(4, shape.iter().product()));
        Self { q: values(1, batch * seq_q * heads * head_dim), k: values(2, kv), v: values(3, kv), bias }
    }
}

/// The output `[B, Sq, H, D]` and the log-sum-exp, where it is asked for.
fn attend<T: Element>(device: &Device, call: &Call, values: &Values) -> Result<(Vec<f32>, Option<Vec<f32>>)> {
    let OracleShape { batch, seq_q, seq_k, heads, kv_heads, head_dim } = call.shape;
    let (shape, kv_shape) = ([batch, seq_q, heads, head_dim], [batch, seq_k, kv_heads, head_dim]);

    let key_mask = |seq: usize, keep: &[bool]| KeyMask::from_bool(batch, seq, keep);
    let meta = |seq: usize, keep: &[bool]| VarlenMeta::from_key_mask(&key_mask(seq, keep)?);
    let (mut keys, mut metas) = (None, None);
    match &call.tokens {
        Tokens::All => {}
        Tokens::Key(keep) => keys = Some(key_mask(seq_k, keep)?),
        Tokens::Varlen(keep) => metas = Some((meta(seq_q, keep)?, None)),
        Tokens::Cross(query, key) => metas = Some((meta(seq_q, query)?, Some(meta(seq_k, key)?))),
    }
    let mut mask = match (&keys, &metas) {
        (Some(keys), _) => AttentionMask::key(keys),
        (None, Some((query, Some(key)))) => AttentionMask::varlen_cross(query, key),
        (None, Some((meta, None))) => AttentionMask::varlen(meta),
        (None, None) => AttentionMask::none(),
    };
    let of = [batch, seq_q, seq_k];
    let ranges = call.rule.map(|rule| match rule {
        Rule::Causal => KeyRanges::causal(of),
        Rule::Window(left, right) => KeyRanges::window(of, Some(left), Some(right)),
        Rule::Prefix(count) => KeyRanges::prefix(of, count),
    });
    let ranges = ranges.transpose()?;
    if let Some(ranges) = &ranges {
        mask = mask.with_ranges(ranges);
    }
    let modifiers = modifiers(call);
    if let Some(modifiers) = &modifiers {
        mask = mask.with_modifiers(modifiers);
    }
    let bias = values.bias.as_ref().zip(call.bias).map(|(values, shape)| tensor::<T>(device, values, &shape));
    let bias = bias.transpose()?;
    if let Some(bias) = &bias {
        mask = mask.with_bias(bias);
    }

    let mut layer = MaskedAttention::new(device);
    if let Some(scale) = call.scale {
        layer = layer.with_softmax_scale(scale);
    }
    if let Some(kernel) = call.kernel {
        layer = layer.with_kernel(kernel);
    }
    if let Some(path) = call.path {
        layer = layer.with_path(path);
    }

    // What must not matter is NaN: masked tokens, and the output before it is written.
    let nan = f32::NAN;
    let q = hidden(&values.q, call.tokens.query_keep(), heads * head_dim);
    let [k, v] = [&values.k, &values.v].map(|values| hidden(values, call.tokens.key_keep(), kv_heads * head_dim));
    let inputs = match call.place {
        Place::Rows => {
            let kv = |values: &[f32]| tensor::<T>(device, values, &kv_shape);
            vec![tensor::<T>(device, &q, &shape)?, kv(&k)?, kv(&v)?]
        }
        Place::Heads => {
            let by_heads = |values: &[f32], [batch, seq, heads, dim]: [usize; 4]| {
                tensor::<T>(device, &swapped(values, [batch, seq, heads, dim]), &[batch, heads, seq, dim])
            };
            vec![by_heads(&q, shape)?, by_heads(&k, kv_shape)?, by_heads(&v, kv_shape)?]
        }
        Place::Fused => {
            let rows = [(&q, heads), (&k, kv_heads), (&v, kv_heads)];
            let token = |at: usize| {
                rows.into_iter()
                    .flat_map(move |(values, heads)| values[at * heads * head_dim..][..heads * head_dim].iter())
            };
            let fused: Vec<f32> = (0..batch * seq_q).flat_map(token).copied().collect();
            vec![tensor::<T>(device, &fused, &[batch, seq_q, heads + 2 * kv_heads, head_dim])?]
        }
    };
    let views: Vec<TensorView<'_>> = match (call.place, &inputs[..]) {
        (Place::Fused, [fused]) => {
            let ends = [0, heads, heads + kv_heads, heads + 2 * kv_heads];
            ends.windows(2).map(|part| fused.view().slice(2, part[0]..part[1])).collect::<Result<_, _>>()?
        }
        (Place::Heads, each) => each.iter().map(|x| x.view().permute(&[0, 2, 1, 3])).collect::<Result<_, _>>()?,
        (_, each) => each.iter().map(Tensor::view).collect(),
    };
    let [q, k, v] = &views[..] else { anyhow::bail!("expected three tensors, got {}", views.len()) };

    let is_by_heads = call.place == Place::Heads;
    let out_shape = if is_by_heads { [batch, heads, seq_q, head_dim] } else { shape };
    let mut out = tensor::<T>(device, &vec![nan; shape.iter().product()], &out_shape)?;
    let mut lse = tensor::<f32>(device, &vec![nan; batch * heads * seq_q], &[batch, heads, seq_q])?;
    let into: TensorViewMut<'_> = if is_by_heads { out.view_mut().permute(&[0, 2, 1, 3])? } else { out.view_mut() };
    let mut outputs = AttentionOutputs::new(into);
    if call.lse {
        outputs = outputs.with_lse(&mut lse);
    }
    layer.forward_into(*q, *k, *v, mask, outputs)?;
    let out: Vec<f32> = out.to_vec::<T>()?.into_iter().map(T::to_f32).collect();
    let out = if is_by_heads { swapped(&out, out_shape) } else { out };
    Ok((out, if call.lse { Some(lse.to_vec()?) } else { None }))
}

fn modifiers(call: &Call) -> Option<ScoreModifiers> {
    if call.softcap == 0.0 && call.slopes.is_none() && call.sinks.is_none() {
        return None;
    }
    let mut modifiers = ScoreModifiers::new().with_softcap(call.softcap);
    if let Some(slopes) = &call.slopes {
        modifiers = modifiers.with_alibi(slopes.as_slice());
    }
    if let Some(sinks) = &call.sinks {
        modifiers = modifiers.with_sinks(sinks.as_slice());
    }
    Some(modifiers)
}

fn tensor<T: Element>(device: &Device, values: &[f32], shape: &[usize]) -> varlen_fa::Result<Tensor> {
    let values: Vec<T> = values.iter().map(|&value| T::from_f32(value)).collect();
    Tensor::from_slice(device, &values, shape)
}

/// The values with NaN in the rows of masked tokens.
fn hidden(values: &[f32], keep: Option<&[bool]>, row: usize) -> Vec<f32> {
    let is_kept = |at: usize| keep.is_none_or(|keep| keep[at / row]);
    values.iter().enumerate().map(|(at, &value)| if is_kept(at) { value } else { f32::NAN }).collect()
}

/// `[A, B, C, D]` as `[A, C, B, D]`.
fn swapped(values: &[f32], [a, b, c, d]: [usize; 4]) -> Vec<f32> {
    let mut to = Vec::with_capacity(values.len());
    for i in 0..a {
        for k in 0..c {
            for j in 0..b {
                to.extend_from_slice(&values[((i * b + j) * c + k) * d..][..d]);
            }
        }
    }
    to
}
