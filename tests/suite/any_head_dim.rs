//! Head dimensions that are no multiple of 8, and those above 256: what a kernel works on then may be a copy.

use anyhow::{Context, Result};
use varlen_fa::{DType, Device, Kernel, Path};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Inputs, Mask};
use super::head_dims::{explain, few};
use super::packed::Packed;
use super::placement::Placement;
use super::rule::Rule;
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    explain_what_is_left_out(trials.device());
    // Rows of an odd number of 16-bit elements begin in the middle of a word.
    trials.in_every_dtype(|trials| trials.each_path("any_head_dim/metadata", metadata));
    trials.each_kernel("any_head_dim/every_query", every_query);
    trials.each_kernel("any_head_dim/packed_rows", packed_rows);
    trials.each_path_with_ranges("any_head_dim/ranges", ranges);
    trials.each_kernel("any_head_dim/zeros", zeros);
}

/// One element, less than a word of every type, two of flash-attention's own tests, and three that no power of two is near.
const ALL: [usize; 7] = [1, 3, 59, 111, 257, 320, 512];
/// Where each takes a second to compile: of f32 on the fused path all, of others these.
const SOME: [usize; 2] = [59, 257];
/// Where each takes many: dimensions whose copies are as wide as those that other trials compile for.
const FEW: [usize; 2] = [3, 69];

fn explain_what_is_left_out(device: &Device) {
    explain(device, "any_head_dim");
    if device.capabilities().is_software && device.capabilities().kernels.contains(&Kernel::WgslPortable) {
        eprintln!("any_head_dim: {SOME:?} alone but in f32 on the fused path, since {} is emulated", device.name());
    }
}

fn head_dims(variant: &Variant) -> impl Iterator<Item = usize> {
    let is_slow = variant.device.capabilities().is_software && variant.kernel != Kernel::CpuTiled;
    let is_fused = variant.path == Some(Path::Fused);
    let all: &[usize] = match few(&variant.device, variant.kernel) {
        Some(_) => &FEW,
        None if is_slow && !(is_fused && variant.dtype == DType::F32) => &SOME,
        None => &ALL,
    };
    let widest = variant.kernel.max_head_dim();
    all.iter().copied().filter(move |&head_dim| head_dim <= widest)
}

fn shape(head_dim: usize) -> OracleShape {
    OracleShape { batch: 2, seq_q: 39, seq_k: 39, heads: 4, kv_heads: 2, head_dim }
}

fn metadata(variant: &Variant) -> Result<()> {
    for head_dim in head_dims(variant) {
        let keep = random::bernoulli_mask(head_dim as u64, 78, 0.7)?;
        let mut call = Call::random(shape(head_dim), Mask::Varlen(keep), variant.dtype, 1);
        call.check(variant).with_context(|| format!("head_dim {head_dim}"))?;
        // The rows of a fused projection, and an output among other memory, which must stay as it is.
        (call.inputs, call.output) = (Inputs::FusedQkv, Placement::TURNED);
        call.check(variant).with_context(|| format!("head_dim {head_dim} of a fused projection"))?;
        let placements = [Placement::ROOM_AROUND, Placement::HEADS_OUTSIDE, Placement::TURNED];
        (call.inputs, call.output) = (Inputs::Apart(placements), Placement::ROOM_AROUND);
        call.check(variant).with_context(|| format!("head_dim {head_dim}, turned"))?;
    }
    Ok(())
}

fn every_query(variant: &Variant) -> Result<()> {
    for head_dim in head_dims(variant) {
        let keep = random::bernoulli_mask(head_dim as u64, 78, 0.6)?;
        for mask in [Mask::None, Mask::Key(keep)] {
            let mut call = Call::random(shape(head_dim), mask, variant.dtype, 2);
            call.output = Placement::HEADS_OUTSIDE;
            call.check(variant).with_context(|| format!("head_dim {head_dim}"))?;
        }
    }
    Ok(())
}

fn packed_rows(variant: &Variant) -> Result<()> {
    for head_dim in head_dims(variant) {
        let call = Packed::random(variant.dtype, [4, 2, head_dim], &[5, 0, 40], &[17, 3, 33]);
        call.check(variant).with_context(|| format!("head_dim {head_dim}"))?;
    }
    Ok(())
}

fn ranges(variant: &Variant) -> Result<()> {
    for head_dim in head_dims(variant).filter(|head_dim| [59, 69, 257].contains(head_dim)) {
        let keep = random::bernoulli_mask(head_dim as u64, 78, 0.8)?;
        let mut call = Call::random(shape(head_dim), Mask::Varlen(keep), variant.dtype, 3);
        call.rule = Some(Rule::Causal);
        call.check(variant).with_context(|| format!("head_dim {head_dim}"))?;
    }
    Ok(())
}

/// No valid token: zeros alone are written, and nothing between the rows.
fn zeros(variant: &Variant) -> Result<()> {
    for head_dim in head_dims(variant) {
        for output in [Placement::CONTIGUOUS, Placement::TURNED] {
            let mut call = Call::random(shape(head_dim), Mask::Varlen(vec![false; 78]), variant.dtype, 4);
            call.output = output;
            call.check(variant).with_context(|| format!("head_dim {head_dim}"))?;
        }
    }
    Ok(())
}
