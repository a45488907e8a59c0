//! The same block on the host, with attention on the CPU device.

use anyhow::Result;
use rayon::prelude::*;
use varlen_fa::{
    AttentionMask, Config, Device, DeviceChoice, Layout, MaskedAttention, TensorView, TensorViewMut, VarlenMeta,
};

use crate::block::Sizes;

/// The largest sound relative error: f32 sums in another order, over a few steps.
pub const BOUND: f64 = 1e-4;

/// The hidden states after some steps.
pub fn on_cpu(sizes: Sizes, hidden: &[f32], weight: &[f32], meta: &VarlenMeta, steps: usize) -> Result<Vec<f32>> {
    let device = Device::with_config(Config::default().with_device(DeviceChoice::Cpu))?;
    let attention = MaskedAttention::new(&device);
    let (width, heads) = (sizes.width(), sizes.heads);
    let mut hidden = hidden.to_vec();
    let mut qkv = vec![0.0; sizes.tokens() * 3 * width];
    let mut attended = vec![0.0; hidden.len()];
    for _ in 0..steps {
        qkv.par_chunks_mut(3 * width).zip(hidden.par_chunks(width)).for_each(|(row, token)| {
            row.fill(0.0);
            for (value, weights) in token.iter().zip(weight.chunks_exact(3 * width)) {
                row.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += value * weight);
            }
        });
        let fused = TensorView::from_host_strided(&qkv, Layout::contiguous(&sizes.fused_shape())?);
        let [q, k, v] = [0, 1, 2].map(|part| fused.slice(2, part * heads..(part + 1) * heads));
        let out = TensorViewMut::from_host(&mut attended, &sizes.shape())?;
        attention.forward_into(q?, k?, v?, AttentionMask::varlen(meta), out)?;
        hidden.iter_mut().zip(&attended).for_each(|(hidden, attended)| *hidden += attended);
    }
    Ok(hidden)
}

/// `‖got − expected‖ / ‖expected‖`; not a number if an element of either is not.
pub fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    let square = |value: f64| value * value;
    let pairs = got.iter().zip(expected);
    let difference: f64 = pairs.map(|(&got, &expected)| square(f64::from(got) - f64::from(expected))).sum();
    let reference: f64 = expected.iter().map(|&expected| square(f64::from(expected))).sum();
    (difference / reference).sqrt()
}

/// Masked tokens whose hidden states are not, bit for bit, what they were: attention gave them something else than zeros.
pub fn changed_masked_tokens(got: &[f32], before: &[f32], keep: &[bool], width: usize) -> usize {
    let tokens = got.chunks_exact(width).zip(before.chunks_exact(width)).zip(keep);
    tokens.filter(|((got, before), keep)| !**keep && got != before).count()
}
