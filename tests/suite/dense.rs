//! Dense calls: key masks with SDPA's semantics, and metadata under forced dense attention (`VARLEN_FA=0`).

use anyhow::{Context, Result, ensure};
use varlen_fa::{AttentionMask, Config, DeviceChoice, KeyMask, MaskedAttention, Path, Reason, VarlenMeta};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask};
use super::check::Rules;
use super::limits;
use super::masks::mask;
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    trials.each_kernel("key_mask/dropped_queries_are_computed", dropped_queries_are_computed);
    trials.each_path("key_mask/dropped_queries_are_computed", dropped_queries_are_computed);
    trials.each_kernel("key_mask/rows_without_keys", rows_without_keys);
    trials.each_path("key_mask/rows_without_keys", rows_without_keys);
    trials.each_kernel("key_mask/cross_attention", cross_attention);
    trials.each_kernel("key_mask/holes_and_single_keys", holes_and_single_keys);
    trials.each_kernel("key_mask/few_of_many_keys", few_of_many_keys);
    trials.each_path("key_mask/few_of_many_keys", few_of_many_keys);
    trials.each_kernel("key_mask/keeps_all", keeps_all);
    trials.each_kernel("forced_dense/keeps_the_contract", forced_dense_keeps_the_contract);
}

/// Queries at masked places attend like any other; only keys and values there are poisoned.
fn dropped_queries_are_computed(variant: &Variant) -> Result<()> {
    for (seed, p) in [(1, 0.05), (2, 0.5), (3, 0.9)] {
        let keep = random::bernoulli_mask(seed, 2 * 150, p)?;
        let shape = OracleShape { batch: 2, seq_q: 150, seq_k: 150, heads: 4, kv_heads: 2, head_dim: 64 };
        let call = Call::random(shape, Mask::Key(keep), variant.dtype, seed);
        call.check(variant).with_context(|| format!("p = {p}"))?;
    }
    Ok(())
}

fn rows_without_keys(variant: &Variant) -> Result<()> {
    let shape = OracleShape::self_attention(3, 70, 2, 32);
    let keep = mask(3, 70, |row, token| row == 1 && token > 30);
    Call::random(shape, Mask::Key(keep), variant.dtype, 4).check(variant)?;
    Call::random(shape, Mask::Key(vec![false; 3 * 70]), variant.dtype, 4).check(variant).context("no key at all")
}

fn cross_attention(variant: &Variant) -> Result<()> {
    for (seq_q, seq_k) in [(1, 130), (130, 1), (200, 77), (64, 64)] {
        let shape = OracleShape { batch: 3, seq_q, seq_k, heads: 6, kv_heads: 3, head_dim: 72 };
        let keep = mask(3, seq_k, |row, token| token < (seq_k * (row + 1)).div_ceil(3));
        let call = Call::random(shape, Mask::Key(keep), variant.dtype, 5);
        call.check(variant).with_context(|| format!("{seq_q} queries, {seq_k} keys"))?;
    }
    Ok(())
}

fn holes_and_single_keys(variant: &Variant) -> Result<()> {
    let shape = OracleShape::self_attention(9, 129, 2, 16);
    let places = [0, 1, 31, 32, 63, 64, 65, 127, 128];
    for is_kept in [true, false] {
        let keep = mask(9, 129, |row, token| (token == places[row]) == is_kept);
        Call::random(shape, Mask::Key(keep), variant.dtype, 6).check(variant)?;
    }
    Ok(())
}

/// Kept keys on both sides of the borders that key tiles have, far from each other, in rows of which one keeps none and one begins with
/// tiles that keep none: kernels that skip what is dropped must find the keys, their values and no others.
fn few_of_many_keys(variant: &Variant) -> Result<()> {
    const KEYS: usize = 3000;
    let rows: [&[usize]; 4] = [&[0, 63, 64, 127, 128, 129, 2047, 2999], &[], &[2559, 2560], &[1500]];
    let shape = OracleShape { batch: 4, seq_q: 37, seq_k: KEYS, heads: 2, kv_heads: 1, head_dim: 64 };
    let keep = mask(4, KEYS, |row, token| rows[row].contains(&token));
    Call::random(shape, Mask::Key(keep), variant.dtype, 11).check(variant)?;
    // A prefix of each row, the second of which ends where a tile does.
    let keep = mask(4, KEYS, |row, token| token < [64, 256, 1, 700][row]);
    Call::random(shape, Mask::Key(keep), variant.dtype, 12).check(variant).context("prefixes")
}

fn keeps_all(variant: &Variant) -> Result<()> {
    let shape = OracleShape::self_attention(2, 65, 2, 32);
    let call = Call::random(shape, Mask::Key(vec![true; 2 * 65]), variant.dtype, 7);
    let mask = KeyMask::all(2, 65)?;
    let (plan, bits) = call.run_as(variant, AttentionMask::key(&mask))?;
    ensure!((plan.path, plan.reason) == (Path::Dense, Reason::KeyMaskKeepsAll), "got {plan}");
    call.judge(&bits, &call.reference(usize::MAX)?, Rules::standard(variant.dtype))?;
    let (plan, unmasked) = call.run_as(variant, AttentionMask::none())?;
    ensure!((plan.path, plan.reason) == (Path::Dense, Reason::NoMask), "got {plan}");
    ensure!(bits == unmasked, "a mask that keeps every key changed the output");
    Ok(())
}

/// What `VARLEN_FA=0` sets: dense attention whose masked rows are zero all the same.
fn forced_dense_keeps_the_contract(variant: &Variant) -> Result<()> {
    let choice: DeviceChoice = variant.device.capabilities().backend.into();
    let device = limits::open(Config::default().with_device(choice).with_force_dense(true))?;
    ensure!(device.config().force_dense, "the device forgot its setting");
    let variant = Variant { device, ..variant.clone() };

    let shape = OracleShape { batch: 3, seq_q: 90, seq_k: 90, heads: 4, kv_heads: 2, head_dim: 32 };
    let keep = mask(3, 90, |row, token| row != 1 && token % 5 != row);
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(3, 90, &keep)?)?;
    let call = Call::random(shape, Mask::Varlen(keep), variant.dtype, 8);
    let (plan, bits) = call.run_as(&variant, AttentionMask::varlen(&meta))?;
    ensure!((plan.path, plan.reason) == (Path::Dense, Reason::DenseForced), "got {plan}");
    call.judge(&bits, &call.reference(usize::MAX)?, Rules::standard(variant.dtype))?;

    // Separate query and key metadata.
    let shape = OracleShape { seq_k: 41, ..shape };
    let (query, key) = (mask(3, 90, |row, token| token > 20 * row), mask(3, 41, |row, token| row != 2 && token < 33));
    let [query_meta, key_meta] = [(90, &query), (41, &key)]
        .map(|(seq, keep)| KeyMask::from_bool(3, seq, keep).and_then(|mask| VarlenMeta::from_key_mask(&mask)));
    let call = Call::random(shape, Mask::Cross { query, key }, variant.dtype, 9);
    let (query_meta, key_meta) = (query_meta?, key_meta?);
    let mask = AttentionMask::varlen_cross(&query_meta, &key_meta);
    let (plan, bits) = call.run_as(&variant, mask)?;
    ensure!((plan.path, plan.reason) == (Path::Dense, Reason::DenseForced), "got {plan}");
    call.judge(&bits, &call.reference(usize::MAX)?, Rules::standard(variant.dtype))?;

    // A caller who forces a path in tests still gets it.
    let layer = MaskedAttention::new(&variant.device).with_kernel(variant.kernel).with_path(Path::Packed);
    let small = varlen_fa::Tensor::zeros(&variant.device, variant.dtype, &[3, 90, 4, 32])?;
    let plan = layer.forward(&small, &small, &small, AttentionMask::varlen(&meta))?.plan;
    ensure!((plan.path, plan.reason) == (Path::Packed, Reason::PathForced), "got {plan}");
    Ok(())
}
