//! Few queries and many keys: a device may share the keys of a query out, and add up what becomes of the parts.

use anyhow::{Context, Result, ensure};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask};
use super::check::Rules;
use super::head_dims::{explain, few};
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    explain(trials.device(), "long_keys/few_queries");
    trials.each_path("long_keys/few_queries", few_queries);
    trials.each_path("long_keys/many_heads", many_heads);
    trials.each_kernel("long_keys/no_mask", no_mask);
    trials.each_path("long_keys/parts_of_unequal_scores", parts_of_unequal_scores);
    trials.each_path("long_keys/same_bits_each_time", same_bits_each_time);
}

const KEYS: usize = 2500;

/// More tiles than those whose keys are shared out, on any device.
pub const MANY_HEADS: OracleShape =
    OracleShape { batch: 1, seq_q: 33, seq_k: KEYS, heads: 36, kv_heads: 2, head_dim: 64 };

pub fn head_dims(variant: &Variant) -> Vec<usize> {
    let dims = match few(&variant.device, variant.kernel) {
        Some(few) => few[..1].to_vec(),
        None if variant.device.capabilities().is_software => vec![64],
        None => vec![64, 96, 128, 192, 256],
    };
    dims.into_iter().filter(|&dim| dim <= variant.kernel.max_head_dim()).collect()
}

fn shape(batch: usize, head_dim: usize) -> OracleShape {
    OracleShape { batch, seq_q: 70, seq_k: KEYS, heads: 2, kv_heads: 1, head_dim }
}

/// Every token of a row, up to a length, but for every seventh if there are holes.
pub fn keep(seq: usize, lengths: &[usize], has_holes: bool) -> Vec<bool> {
    let row = |length: usize| (0..seq).map(move |token| token < length && !(has_holes && token % 7 == 3));
    lengths.iter().flat_map(|&length| row(length)).collect()
}

fn few_queries(variant: &Variant) -> Result<()> {
    for head_dim in head_dims(variant) {
        for (key_lengths, has_holes) in
            [(&[KEYS][..], false), (&[KEYS], true), (&[1601], false), (&[KEYS, 700], true), (&[2000, 0], false)]
        {
            let shape = shape(key_lengths.len(), head_dim);
            let query = keep(shape.seq_q, &[65, 40][..shape.batch], has_holes);
            let key = keep(KEYS, key_lengths, has_holes);
            Call::random(shape, Mask::Cross { query, key }, variant.dtype, 9)
                .check(variant)
                .with_context(|| format!("head_dim {head_dim}, keys {key_lengths:?}, holes {has_holes}"))?;
        }
    }
    Ok(())
}

/// Whole tensors, and each of them in two segments.
fn many_heads(variant: &Variant) -> Result<()> {
    for head_dim in head_dims(variant) {
        let shape = OracleShape { head_dim, ..MANY_HEADS };
        let mask = Mask::Cross { query: keep(shape.seq_q, &[31], true), key: keep(KEYS, &[2400], true) };
        Call::random(shape, mask, variant.dtype, 13)
            .check_segments(variant, &[2])
            .with_context(|| format!("head_dim {head_dim}"))?;
    }
    Ok(())
}

/// Of two batch rows and grouped heads, every key.
fn no_mask(variant: &Variant) -> Result<()> {
    for head_dim in head_dims(variant) {
        let shape = OracleShape { heads: 4, kv_heads: 2, ..shape(2, head_dim) };
        Call::random(shape, Mask::None, variant.dtype, 12)
            .check(variant)
            .with_context(|| format!("head_dim {head_dim}"))?;
    }
    Ok(())
}

/// Keys that grow with their position: all but the last part weigh next to nothing for some queries, and all but the first for others.
/// Whole numbers times a power of two, so that scores are exact.
fn parts_of_unequal_scores(variant: &Variant) -> Result<()> {
    for head_dim in head_dims(variant) {
        let shape = shape(1, head_dim);
        let mask = Mask::Cross { query: keep(shape.seq_q, &[70], true), key: keep(KEYS, &[KEYS], true) };
        let mut call = Call::random(shape, mask, variant.dtype, 10);
        for (at, value) in call.values[1].iter_mut().enumerate() {
            let key = at / head_dim;
            *value = if at % head_dim == 0 { (key / 10) as f32 } else { (*value * 4.0).round() / 64.0 };
        }
        for (at, value) in call.values[0].iter_mut().enumerate() {
            let query = at / (shape.heads * head_dim);
            *value = if at % head_dim == 0 { [4.0, 0.0, -1.0][query % 3] } else { (*value * 4.0).round() / 16.0 };
        }
        call.scale = Some(0.25);
        // Scores reach 250, where an f32 is off by 2^-16.
        call.check_by(variant, Rules::fixed_only(variant.dtype, 1e-3))
            .with_context(|| format!("head_dim {head_dim}"))?;
    }
    Ok(())
}

/// Whichever part is done last.
fn same_bits_each_time(variant: &Variant) -> Result<()> {
    let shape = shape(1, head_dims(variant)[0]);
    let mask = Mask::Cross { query: keep(shape.seq_q, &[70], false), key: random::bernoulli_mask(11, KEYS, 0.9)? };
    let call = Call::random(shape, mask, variant.dtype, 11);
    let first = call.run(variant)?;
    for run in 1..10 {
        ensure!(call.run(variant)? == first, "run {run} gave other bits than the first");
    }
    Ok(())
}
