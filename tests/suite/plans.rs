//! The path and reason that a call reports when nothing is forced.

use anyhow::{Result, ensure};
use varlen_fa::{
    AttentionMask, BackendKind, DType, Device, KeyMask, MaskedAttention, Path, Plan, Reason, Tensor, VarlenMeta,
};
use varlen_fa_testkit::OracleShape;

use super::call::{Call, Mask};
use super::masks::mask;
use super::placement::Placement;
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    trials.once("plans/without_metadata", without_metadata);
    trials.once("plans/with_metadata", with_metadata);
    trials.once("plans/cross_attention", cross_attention);
    trials.once("plans/are_words", are_words);
    trials.each_path("plans/of_warm_up", of_warm_up);
    trials.each_kernel("plans/whatever_path_is_chosen", whatever_path_is_chosen);
}

/// `[2, 6, 2, 8]`.
fn tensor(device: &Device) -> Result<Tensor> {
    Ok(Tensor::from_slice(device, &[varlen_fa::f16::ONE; 2 * 6 * 2 * 8], &[2, 6, 2, 8])?)
}

fn plan(device: &Device, mask: AttentionMask<'_>) -> Result<Plan> {
    let x = tensor(device)?;
    let layer = MaskedAttention::new(device);
    let attended = layer.forward(&x, &x, &x, mask)?;
    ensure!(attended.out.dtype() == DType::F16 && attended.out.shape() == [2, 6, 2, 8], "got {:?}", attended.out);
    let mut out = tensor(device)?;
    let into = layer.forward_into(&x, &x, &x, mask, &mut out)?;
    ensure!(attended.plan == into, "forward: {}, forward_into: {into}", attended.plan);
    // Which of them depends on the head dimension.
    ensure!(device.capabilities().kernels.contains(&into.kernel), "expected a kernel of the device, got {into}");
    Ok(into)
}

fn expect(got: Plan, path: Path, reason: Reason) -> Result<()> {
    ensure!((got.path, got.reason) == (path, reason), "expected {path} since {reason}, got {got}");
    Ok(())
}

fn meta(lengths: &[usize]) -> Result<VarlenMeta> {
    Ok(VarlenMeta::from_key_mask(&KeyMask::from_lengths(6, lengths)?)?)
}

fn without_metadata(device: &Device) -> Result<()> {
    let (some, all) = (KeyMask::from_lengths(6, &[3, 6])?, KeyMask::all(2, 6)?);
    let bias = Tensor::zeros(device, DType::F32, &[6])?;
    expect(plan(device, AttentionMask::none())?, Path::Dense, Reason::NoMask)?;
    let by_mask = plan(device, AttentionMask::key(&some))?;
    match device.capabilities().backend {
        BackendKind::Cpu => expect(by_mask, Path::Dense, Reason::KeyMask)?,
        // By the cost model.
        _ => ensure!(matches!(by_mask.path, Path::Fused | Path::Packed), "some keys dropped: got {by_mask}"),
    }
    expect(plan(device, AttentionMask::key(&KeyMask::from_lengths(6, &[0, 0])?))?, Path::Zero, Reason::NothingValid)?;
    expect(plan(device, AttentionMask::key(&all))?, Path::Dense, Reason::KeyMaskKeepsAll)?;
    expect(plan(device, AttentionMask::bias(bias.view()))?, Path::Dense, Reason::Bias)
}

fn with_metadata(device: &Device) -> Result<()> {
    expect(plan(device, AttentionMask::varlen(&meta(&[6, 6])?))?, Path::Dense, Reason::AllValid)?;
    expect(plan(device, AttentionMask::varlen(&meta(&[0, 0])?))?, Path::Zero, Reason::NothingValid)?;
    let some = plan(device, AttentionMask::varlen(&meta(&[3, 6])?))?;
    ensure!(matches!(some.path, Path::Fused | Path::Packed), "some tokens masked: got {some}");
    Ok(())
}

fn cross_attention(device: &Device) -> Result<()> {
    let (none, some, all) = (meta(&[0, 0])?, meta(&[0, 4])?, meta(&[6, 6])?);
    for (query, key, path, reason) in [
        (&all, &all, Path::Dense, Reason::AllValid),
        (&none, &all, Path::Zero, Reason::NothingValid),
        (&all, &none, Path::Zero, Reason::NothingValid),
        (&none, &none, Path::Zero, Reason::NothingValid),
    ] {
        expect(plan(device, AttentionMask::varlen_cross(query, key))?, path, reason)?;
    }
    for (query, key) in [(&some, &all), (&all, &some), (&some, &some)] {
        let got = plan(device, AttentionMask::varlen_cross(query, key))?;
        ensure!(matches!(got.path, Path::Fused | Path::Packed), "got {got}");
    }
    Ok(())
}

fn are_words(device: &Device) -> Result<()> {
    let plan = plan(device, AttentionMask::varlen(&meta(&[6, 6])?))?;
    ensure!(plan.to_string() == format!("dense by {}: {}", plan.kernel, Reason::AllValid), "got {plan}");
    let listed = Device::list().into_iter().find(|report| report.to_string().contains(&device.capabilities().adapter));
    ensure!(listed.is_some(), "Device::list() does not name {}", device.capabilities().adapter);
    Ok(())
}

/// The other trials force paths; these masks lead to each that the device would choose by itself, zeros alone among them.
fn whatever_path_is_chosen(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 3, seq_q: 70, seq_k: 70, heads: 4, kv_heads: 2, head_dim: 40 };
    let masks = [
        vec![false; 210],
        vec![true; 210],
        mask(3, 70, |row, token| token < 20 * row),
        mask(3, 70, |row, token| (token + row) % 2 == 0),
    ];
    for keep in masks {
        for placement in [Placement::CONTIGUOUS, Placement::ROOM_AROUND, Placement::TURNED] {
            let mut call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 1);
            call.output = placement;
            call.check(variant)?;
        }
    }
    // Queries without a key in the whole batch, and keys without a query.
    let some = mask(3, 70, |row, token| token > 9 * row);
    for (query, key) in [(some.clone(), vec![false; 210]), (vec![false; 210], some)] {
        let mut call = Call::random(shape, Mask::Cross { query, key }, variant.dtype, 2);
        call.output = Placement::ROOM_AROUND;
        call.check(variant)?;
    }
    Ok(())
}

/// Warming up takes what a call takes, whatever the batch is, and refuses what a call refuses.
fn of_warm_up(variant: &Variant) -> Result<()> {
    let layer = variant.layer();
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(70, &[70, 9])?)?;
    let mask = || AttentionMask::varlen(&meta);
    let (q_shape, kv_shape) = ([2, 70, 4, 40], [2, 70, 2, 40]);
    let plan = layer.warm_up(variant.dtype, &q_shape, &kv_shape, mask())?;
    let [q, k] = [q_shape, kv_shape].map(|shape| Tensor::zeros(&variant.device, variant.dtype, &shape));
    let (q, k) = (q?, k?);
    let called = layer.forward(&q, &k, &k, mask())?.plan;
    ensure!(plan == called, "warm_up takes {plan}, forward {called}");
    let refused = layer.warm_up(variant.dtype, &q_shape, &[2, 70, 3, 40], mask());
    ensure!(refused.is_err(), "4 query heads and 3 key/value heads are accepted: {refused:?}");
    Ok(())
}
