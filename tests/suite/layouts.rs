//! Strided inputs and outputs: nothing is copied first, nothing outside the view is read or written.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Completion;
use varlen_fa::{AttentionMask, DType, Device, Error, KeyMask, Layout, VarlenMeta, pack, scatter_to_padded};
use varlen_fa_testkit::{Case, OracleShape, random};

use super::call::{Call, Inputs, Mask};
use super::memory::{download, narrow, precision, upload};
use super::placement::Placement;
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    trials.each_path("layouts/heads_outside_sequence", heads_outside_sequence);
    trials.each_path("layouts/fused_qkv", fused_qkv);
    trials.each_path("layouts/inputs_with_room_around", inputs_with_room_around);
    trials.each_path("layouts/output_with_room_around", output_with_room_around);
    trials.each_path("layouts/every_tensor_its_own", every_tensor_its_own);
    trials.each_path("layouts/output_of_zeros_with_room_around", output_of_zeros_with_room_around);
    trials.each_path("layouts/inputs_at_odd_places", inputs_at_odd_places);
    trials.each_path("layouts/output_at_odd_places", output_at_odd_places);
    trials.each_dtype("layouts/pack_and_scatter_at_odd_places", pack_and_scatter_at_odd_places);
    trials.each_path("layouts/inputs_that_repeat", inputs_that_repeat);
    trials.each_path("layouts/sizes_of_one", sizes_of_one);
    trials.each_kernel("layouts/dense_calls", dense_calls);
}

/// `[2, 4, 192, 64]` seen as `[B, S, H, D]`, the named case `small_c2`.
fn heads_outside_sequence(variant: &Variant) -> Result<()> {
    let case = Case::named("small_c2").context("no case small_c2")?;
    let shape = OracleShape::self_attention(case.batch, case.seq(), case.heads, case.head_dim);
    let mut call = Call::random(shape, Mask::Varlen(case.mask()), variant.dtype, 1);
    call.inputs = Inputs::Apart([Placement::HEADS_OUTSIDE; 3]);
    call.check(variant).context("row-major output")?;
    call.output = Placement::HEADS_OUTSIDE;
    call.check(variant).context("output like the inputs")
}

fn small(variant: &Variant, seed: u64) -> Result<Call> {
    let shape = OracleShape { batch: 3, seq_q: 45, seq_k: 45, heads: 6, kv_heads: 2, head_dim: 40 };
    let keep = random::bernoulli_mask(seed, 3 * 45, 0.7)?;
    Ok(Call::random(shape, Mask::Varlen(keep), variant.dtype, seed))
}

fn fused_qkv(variant: &Variant) -> Result<()> {
    let mut call = small(variant, 2)?;
    call.inputs = Inputs::FusedQkv;
    call.check(variant).context("6 heads on 2")?;
    let shape = OracleShape { kv_heads: 6, ..call.shape };
    let mut call = Call::random(shape, call.mask, variant.dtype, 2);
    call.inputs = Inputs::FusedQkv;
    call.check(variant).context("[B, S, 3H, D]")
}

fn inputs_with_room_around(variant: &Variant) -> Result<()> {
    let mut call = small(variant, 3)?;
    call.inputs = Inputs::Apart([Placement::ROOM_AROUND; 3]);
    call.check(variant)
}

fn output_with_room_around(variant: &Variant) -> Result<()> {
    let mut call = small(variant, 4)?;
    for placement in [Placement::ROOM_AROUND, Placement::TURNED, Placement::among_heads(3, 1)] {
        call.output = placement;
        call.check(variant).with_context(|| format!("{placement:?}"))?;
    }
    Ok(())
}

fn every_tensor_its_own(variant: &Variant) -> Result<()> {
    let places = [Placement::CONTIGUOUS, Placement::HEADS_OUTSIDE, Placement::ROOM_AROUND, Placement::TURNED];
    for turn in 0..places.len() {
        let at = |tensor: usize| places[(turn + tensor) % places.len()];
        let mut call = small(variant, 5)?;
        call.inputs = Inputs::Apart([at(0), at(1), at(2)]);
        call.output = at(3);
        call.check(variant).with_context(|| format!("turn {turn}"))?;
    }
    Ok(())
}

fn output_of_zeros_with_room_around(variant: &Variant) -> Result<()> {
    let mut call = small(variant, 6)?;
    call.mask = Mask::Varlen(vec![false; 3 * 45]);
    for placement in [Placement::ROOM_AROUND, Placement::TURNED] {
        call.output = placement;
        call.check(variant)?;
    }
    Ok(())
}

/// Strides of dimensions with one element do not matter.
fn sizes_of_one(variant: &Variant) -> Result<()> {
    let shape = OracleShape::self_attention(1, 1, 1, 8);
    let mut call = Call::random(shape, Mask::Varlen(vec![true]), variant.dtype, 7);
    call.inputs = Inputs::Apart([Placement::TURNED, Placement::ROOM_AROUND, Placement::HEADS_OUTSIDE]);
    call.output = Placement::TURNED;
    call.check(variant)
}

fn dense_calls(variant: &Variant) -> Result<()> {
    let keep = random::bernoulli_mask(8, 3 * 45, 0.7)?;
    for mask in [Mask::None, Mask::Key(keep)] {
        let mut call = Call { mask, ..small(variant, 8)? };
        call.inputs = Inputs::FusedQkv;
        call.output = Placement::ROOM_AROUND;
        call.check(variant)?;
        call.inputs = Inputs::Apart([Placement::TURNED, Placement::HEADS_OUTSIDE, Placement::ROOM_AROUND]);
        call.check(variant)?;
    }
    Ok(())
}

/// Views whose rows start in the middle of a word, each row at another place in it: an odd offset, odd strides.
pub const ODD: [Placement; 3] = [
    Placement { order: [0, 1, 2, 3], margin: [(0, 0), (1, 0), (0, 0), (1, 2)] },
    Placement { order: [0, 2, 1, 3], margin: [(0, 1), (0, 0), (1, 1), (3, 0)] },
    Placement { order: [1, 0, 2, 3], margin: [(1, 0), (0, 0), (0, 1), (2, 5)] },
];

/// Strides of 0: queries that all batch rows share, keys that all heads share, values that both do, against tensors that hold the
/// same rows as often as they are read.
fn inputs_that_repeat(variant: &Variant) -> Result<()> {
    const SHAPE: [usize; 4] = [3, 45, 4, 40];
    let device = &variant.device;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(3, 45, &random::bernoulli_mask(12, 135, 0.7)?)?)?;
    let (mut repeating, mut whole) = (vec![], vec![]);
    for (stream, strides, count) in
        [(0, [0, 160, 40, 1], 45 * 160), (1, [45 * 40, 40, 0, 1], 3 * 45 * 40), (2, [0, 40, 0, 1], 45 * 40)]
    {
        let values = random::normal_rounded(12, stream, count, precision(variant.dtype));
        let bits: Vec<u32> = values.iter().map(|&value| narrow(value, variant.dtype)).collect();
        let layout = Layout::strided(&SHAPE, &strides, 0)?;
        repeating.push((upload(device, variant.dtype, &bits, &[count])?, layout));
        let place = |at: usize| {
            let index = [at / (45 * 160), at / 160 % 45, at / 40 % 4, at % 40];
            index.iter().zip(strides).map(|(&index, stride)| index * stride as usize).sum::<usize>()
        };
        let all: Vec<u32> = (0..SHAPE.iter().product()).map(|at| bits[place(at)]).collect();
        whole.push(upload(device, variant.dtype, &all, &SHAPE)?);
    }
    let view = |input: usize| repeating[input].0.view().with_layout(repeating[input].1);
    let mask = AttentionMask::varlen(&meta);
    let got = download(&variant.layer().forward(view(0), view(1), view(2), mask)?.out)?;
    let expected = download(&variant.layer().forward(&whole[0], &whole[1], &whole[2], mask)?.out)?;
    ensure!(
        expected.iter().any(|&bits| bits != 0) && got == expected,
        "repeated rows gave other bits than rows of their own"
    );
    Ok(())
}

/// A device may refuse such views, by name; then the trial says so.
fn unless_misaligned(result: Result<()>, argument: &str) -> Result<Completion> {
    match result {
        Ok(()) => Ok(Completion::Completed),
        Err(error) => match error.downcast_ref::<Error>() {
            Some(misaligned @ Error::Misaligned { argument: got, .. }) if *got == argument => {
                Ok(Completion::ignored_with(misaligned))
            }
            _ => Err(error),
        },
    }
}

fn inputs_at_odd_places(variant: &Variant) -> Result<Completion> {
    let mut call = small(variant, 9)?;
    call.inputs = Inputs::Apart(ODD);
    let result = call.check(variant).and_then(|()| {
        call.mask = Mask::Cross { query: vec![true; 135], key: random::bernoulli_mask(9, 135, 0.5)? };
        call.inputs = Inputs::Apart([ODD[2], ODD[0], Placement::CONTIGUOUS]);
        call.check(variant)
    });
    unless_misaligned(result, "q")
}

fn output_at_odd_places(variant: &Variant) -> Result<Completion> {
    let mut call = small(variant, 10)?;
    let result = ODD.into_iter().try_for_each(|placement| {
        call.output = placement;
        call.check(variant)
    });
    unless_misaligned(result, "out")
}

fn pack_and_scatter_at_odd_places(device: &Device, dtype: DType) -> Result<Completion> {
    let (shape, keep) = ([3, 45, 2, 24], random::bernoulli_mask(11, 135, 0.6)?);
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(3, 45, &keep)?)?;
    let bits: Vec<u32> = (0..135 * 48).map(|at| at as u32 * 40_503 % 65_521).collect();
    let expected: Vec<u32> =
        bits.chunks(48).zip(&keep).filter(|(_, keep)| **keep).flat_map(|(row, _)| row).copied().collect();
    let result = ODD.into_iter().try_for_each(|placement| {
        let mut memory = vec![0; placement.memory_len(shape)];
        for (row, start) in placement.rows(shape).into_iter().enumerate() {
            memory[start..start + 24].copy_from_slice(&bits[row * 24..][..24]);
        }
        let holder = upload(device, dtype, &memory, &placement.memory_shape(shape))?;
        let packed = pack(device, placement.view(holder.view(), shape)?, &meta)?;
        ensure!(download(&packed)? == expected, "pack, {placement:?}");

        // The packed rows one element into a tensor.
        let flat: Vec<u32> = [7].into_iter().chain(expected.iter().copied()).collect();
        let holder = upload(device, dtype, &flat, &[flat.len()])?;
        let layout = Layout::strided(&[meta.total_valid(), 2, 24], &[48, 24, 1], 1)?;
        let padded = download(&scatter_to_padded(device, holder.view().with_layout(layout), &meta)?)?;
        for ((got, row), &keep) in padded.chunks(48).zip(bits.chunks(48)).zip(&keep) {
            ensure!(if keep { got == row } else { got == [0; 48] }, "scatter");
        }
        Ok(())
    });
    unless_misaligned(result, "padded")
}
