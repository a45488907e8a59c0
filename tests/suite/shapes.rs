//! Head counts, head dimensions, and sizes of nothing.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Completion;
use varlen_fa::{
    AttentionMask, CuSeqlens, DType, KeyMask, Layout, MaskedAttention, Path, Tensor, VarlenMeta, VarlenOptions,
    varlen_attention_into,
};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask};
use super::head_dims::{explain, few, or_narrow};
use super::masks::mask;
use super::memory::upload;
use super::trials::{Trials, Variant, is_emulated_gpu};

pub fn register(trials: &mut Trials) {
    register_head_dims(trials);
    trials.each_path("shapes/grouped_heads", grouped_heads);
    trials.each_path("shapes/heads_times_dim_not_a_power_of_two", heads_times_dim_not_a_power_of_two);
    trials.each_path("shapes/sizes_of_nothing", sizes_of_nothing);
    // Grids do not depend on the element type.
    trials.each_path_of(&[DType::F16], "shapes/more_batch_rows_than_workgroups", |variant| {
        unless_slow(variant, Path::Fused, more_batch_rows_than_workgroups)
    });
    trials.each_path_of(&[DType::F16], "shapes/more_heads_than_workgroups", |variant| {
        unless_slow(variant, Path::Packed, more_heads_than_workgroups)
    });
    trials.each_path_of(&[DType::F16], "shapes/more_heads_than_a_grid", |variant| {
        unless_slow(variant, Path::Dense, more_heads_than_a_grid)
    });
    trials.each_kernel("shapes/no_mask", no_mask);
    trials.each_kernel("shapes/packed_rows_of_nothing", packed_rows_of_nothing);
    trials.each_kernel("shapes/sizes_of_nothing_without_metadata", sizes_of_nothing_without_metadata);
}

/// A GPU compiles a shader for each head dimension and element type, which takes an emulated one a second: there f16 and bf16,
/// whose shaders are those of f32 but for the conversion, run every fourth, and so do other paths than the fused one.
fn register_head_dims(trials: &mut Trials) {
    let capabilities = trials.device().capabilities().clone();
    if !is_emulated_gpu(trials.device()) {
        trials.each_path("shapes/every_head_dim", |variant| head_dims(variant, 8));
        return;
    }
    eprintln!("shapes/every_head_dim: every fourth but in f32 on the fused path, since {capabilities} is emulated");
    explain(trials.device(), "shapes/every_head_dim");
    let step = |variant: &Variant| if variant.path == Some(Path::Fused) { 8 } else { 32 };
    trials.each_path_of(&[DType::F32], "shapes/every_head_dim", move |variant| head_dims(variant, step(variant)));
    let halves: Vec<_> = capabilities.dtypes.iter().copied().filter(|&dtype| dtype != DType::F32).collect();
    trials.each_path_of(&halves, "shapes/every_fourth_head_dim", |variant| {
        unless_slow(variant, Path::Fused, |variant| head_dims(variant, 32))
    });
}

/// On an emulated GPU, which takes 10 seconds for this, on one path alone.
fn unless_slow(variant: &Variant, path: Path, run: fn(&Variant) -> Result<()>) -> Result<Completion> {
    if is_emulated_gpu(&variant.device) && variant.path != Some(path) {
        return Ok(Completion::ignored_with(format!("an emulated GPU takes 10 seconds: the {path} path runs this")));
    }
    run(variant).map(|()| Completion::Completed)
}

fn head_dims(variant: &Variant, step: usize) -> Result<()> {
    let dims: Vec<usize> = match few(&variant.device, variant.kernel) {
        Some(few) => few.to_vec(),
        // Up to 256; any_head_dim.rs has some of the others.
        None => (8..=variant.kernel.max_head_dim().min(256)).rev().step_by(step).collect(),
    };
    for head_dim in dims {
        let shape = OracleShape { batch: 2, seq_q: 35, seq_k: 35, heads: 2, kv_heads: 1, head_dim };
        let keep = random::bernoulli_mask(head_dim as u64, 70, 0.7)?;
        let call = Call::random(shape, Mask::Varlen(keep), variant.dtype, 1);
        call.check(variant).with_context(|| format!("head_dim {head_dim}"))?;
    }
    Ok(())
}

fn grouped_heads(variant: &Variant) -> Result<()> {
    for (heads, kv_heads) in [(1, 1), (2, 1), (8, 1), (6, 2), (12, 3), (24, 8), (5, 5), (7, 7)] {
        let head_dim = or_narrow(variant, 24);
        let shape = OracleShape { batch: 2, seq_q: 40, seq_k: 40, heads, kv_heads, head_dim };
        let keep = random::bernoulli_mask(heads as u64, 80, 0.7)?;
        let call = Call::random(shape, Mask::Varlen(keep), variant.dtype, 2);
        call.check(variant).with_context(|| format!("{heads} heads on {kv_heads}"))?;
    }
    Ok(())
}

fn heads_times_dim_not_a_power_of_two(variant: &Variant) -> Result<()> {
    for (heads, head_dim) in [(3, 8), (3, 40), (5, 72), (7, 24), (9, 56), (16, 72)] {
        let shape = OracleShape::self_attention(2, 37, heads, head_dim);
        let keep = random::bernoulli_mask(heads as u64, 74, 0.6)?;
        let call = Call::random(shape, Mask::Varlen(keep), variant.dtype, 3);
        call.check(variant).with_context(|| format!("{heads} heads of {head_dim}"))?;
    }
    Ok(())
}

/// `[batch, seq_q, seq_k]` of which some are 0.
const EMPTY_SIZES: [[usize; 3]; 5] = [[0, 5, 5], [2, 0, 5], [2, 5, 0], [2, 0, 0], [0, 0, 0]];

fn sizes_of_nothing(variant: &Variant) -> Result<()> {
    for [batch, seq_q, seq_k] in EMPTY_SIZES {
        let shape = OracleShape { batch, seq_q, seq_k, heads: 4, kv_heads: 2, head_dim: 16 };
        let (query, key) = (vec![true; batch * seq_q], vec![true; batch * seq_k]);
        let call = Call::random(shape, Mask::Cross { query, key }, variant.dtype, 4);
        call.check(variant).with_context(|| format!("{shape:?}"))?;
    }
    Ok(())
}

fn sizes_of_nothing_without_metadata(variant: &Variant) -> Result<()> {
    for [batch, seq_q, seq_k] in EMPTY_SIZES {
        let shape = OracleShape { batch, seq_q, seq_k, heads: 4, kv_heads: 2, head_dim: 16 };
        for mask in [Mask::None, Mask::Key(vec![true; batch * seq_k])] {
            let call = Call::random(shape, mask, variant.dtype, 5);
            call.check(variant).with_context(|| format!("{shape:?}"))?;
        }
    }
    // And through the call that makes its own output.
    let q = upload(&variant.device, variant.dtype, &[0; 2 * 3 * 2 * 8], &[2, 3, 2, 8])?;
    let k = Tensor::zeros(&variant.device, variant.dtype, &[2, 0, 2, 8])?;
    let attended = variant.layer().forward(&q, &k, &k, AttentionMask::none())?;
    ensure!(attended.plan.path == Path::Zero, "no keys: got {}", attended.plan);
    ensure!(super::memory::download(&attended.out)? == [0; 2 * 3 * 2 * 8], "no keys: expected zeros");
    let meta = VarlenMeta::from_key_mask(&KeyMask::all(0, 7)?)?;
    let nothing = Tensor::zeros(&variant.device, variant.dtype, &[0, 7, 2, 8])?;
    let layer = MaskedAttention::new(&variant.device);
    let attended = layer.forward(&nothing, &nothing, &nothing, AttentionMask::varlen(&meta))?;
    ensure!(attended.out.shape() == [0, 7, 2, 8], "got shape {:?}", attended.out.shape());
    // Strides of tensors without elements do not count; NumPy's are 0.
    let flat = Layout::strided(&[0, 7, 2, 8], &[0; 4], 0)?;
    let (view, mut out) = (nothing.view().with_layout(flat), Tensor::zeros(&variant.device, variant.dtype, &[0])?);
    layer.forward_into(view, view, view, AttentionMask::varlen(&meta), out.view_mut().with_layout(flat))?;
    Ok(())
}

/// WebGPU launches at most 65,535 workgroups in one dimension.
fn more_batch_rows_than_workgroups(variant: &Variant) -> Result<()> {
    let shape = OracleShape::self_attention(66_000, 2, 1, 8);
    let keep = mask(66_000, 2, |row, token| (row + token) % 3 != 0);
    Call::random(shape, Mask::Varlen(keep), variant.dtype, 6).check(variant)
}

/// As many pairs of batch row and head.
fn more_heads_than_workgroups(variant: &Variant) -> Result<()> {
    let shape = OracleShape::self_attention(1000, 2, 66, 8);
    let keep = mask(1000, 2, |row, token| (row + token) % 3 != 0);
    Call::random(shape, Mask::Varlen(keep), variant.dtype, 6).check(variant)
}

/// More heads than WebGPU and CUDA launch in one dimension of a grid: on a few key heads, on as many, and on one. An emulated
/// GPU computes the first, where both parts start inside a tensor.
fn more_heads_than_a_grid(variant: &Variant) -> Result<()> {
    let kv_heads: &[usize] = if is_emulated_gpu(&variant.device) { &[2] } else { &[2, 65_538, 1] };
    for &kv_heads in kv_heads {
        let shape = OracleShape { batch: 1, seq_q: 4, seq_k: 4, heads: 65_538, kv_heads, head_dim: 8 };
        let call = Call::random(shape, Mask::Varlen(vec![true, false, true, true]), variant.dtype, 8);
        call.check(variant).with_context(|| format!("{kv_heads} key heads"))?;
    }
    Ok(())
}

/// Sequences without rows, in views whose strides are 0; the sums of no scores have no elements either.
fn packed_rows_of_nothing(variant: &Variant) -> Result<()> {
    let Variant { device, dtype, .. } = variant;
    let mut nothing = [Tensor::zeros(device, *dtype, &[0])?, Tensor::zeros(device, DType::F32, &[0])?];
    let x = Tensor::zeros(device, *dtype, &[0, 2, 8])?;
    let rows = Layout::strided(&[0, 2, 8], &[0; 3], 0)?;
    let view = x.view().with_layout(rows);
    let [out, lse] = &mut nothing;
    let lse = lse.view_mut().with_layout(Layout::strided(&[2, 0], &[0; 2], 0)?);
    let cu_seqlens = CuSeqlens::new(&[0, 0, 0])?;
    let options = VarlenOptions::default().with_kernel(variant.kernel);
    let out = out.view_mut().with_layout(rows);
    varlen_attention_into(device, [view; 3], &cu_seqlens, &cu_seqlens, options, out, Some(lse))?;
    Ok(())
}

fn no_mask(variant: &Variant) -> Result<()> {
    for (seq_q, seq_k) in [(1, 1), (1, 200), (200, 1), (65, 130), (128, 128)] {
        let shape = OracleShape { batch: 2, seq_q, seq_k, heads: 4, kv_heads: 2, head_dim: 64 };
        let call = Call::random(shape, Mask::None, variant.dtype, 7);
        call.check(variant).with_context(|| format!("{seq_q} queries, {seq_k} keys"))?;
    }
    Ok(())
}
