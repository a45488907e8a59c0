//! Work that takes long, which wgpu devices split into several dispatches and submissions.

use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use varlen_fa::{
    AttentionMask, BackendKind, Config, CuSeqlens, DType, Device, DeviceChoice, Kernel, KeyMask, MaskedAttention, Path,
    VarlenMeta, VarlenOptions, varlen_attention,
};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Inputs, Mask};
use super::dispatches::{Dispatches, count};
use super::limits;
use super::long_keys::{self, MANY_HEADS};
use super::masks::mask;
use super::memory::{download, narrow, sentinel, upload};
use super::placement::Placement;
use super::trials::{Trials, Variant};

/// Three tiles of queries in a batch row.
const SHAPE: OracleShape = OracleShape { batch: 3, seq_q: 150, seq_k: 150, heads: 4, kv_heads: 2, head_dim: 32 };

/// Operations of a dispatch: one workgroup whatever it has; two and five workgroups with all keys.
const LIMITS: [u64; 3] = [1, 2 * 4 * 64 * 150 * 32, 5 * 4 * 64 * 150 * 32];

pub fn register(trials: &mut Trials) {
    if trials.device().capabilities().backend != BackendKind::Wgpu {
        return;
    }
    trials.each_path("long_work/padded_calls_are_split", padded_calls_are_split);
    trials.each_path_of(&[DType::F16], "long_work/shared_keys_are_split", shared_keys_are_split);
    trials.each_kernel("long_work/dense_calls_are_split", dense_calls_are_split);
    trials.each_kernel("long_work/packed_rows_are_split", packed_rows_are_split);
    trials.each_kernel("long_work/beside_other_threads", beside_other_threads);
    trials.each_path_of(&[DType::F16], "long_work/recorded_calls_are_split", recorded_calls_are_split);
    trials.each_path_of(&[DType::F16], "long_work/short_work_is_one_submission", short_work_is_one_submission);
}

/// A device of the same adapter on which everything takes long.
fn limited(config: Config, limit: u64) -> Result<Device> {
    limits::open(config.with_device(DeviceChoice::Wgpu).with_max_dispatch_operations(limit))
}

fn on_limited(variant: &Variant, limit: u64) -> Result<Variant> {
    Ok(Variant { device: limited(Config::default(), limit)?, ..variant.clone() })
}

fn keep() -> Vec<bool> {
    mask(SHAPE.batch, SHAPE.seq_q, |row, token| row != 1 && (token + row) % 4 != 1 || token == 77)
}

/// Workgroups of all query tiles of a call, of so many rows each.
fn workgroups(tile_rows: usize, path: Option<Path>, keep: &[bool]) -> usize {
    let tiles = keep.chunks(SHAPE.seq_q).map(|row| {
        let kept = row.iter().filter(|&&keep| keep).count();
        match path {
            Some(Path::Fused) => kept.div_ceil(tile_rows) + (row.len() - kept).div_ceil(tile_rows),
            Some(Path::Packed) => kept.div_ceil(tile_rows),
            _ => row.len().div_ceil(tile_rows),
        }
    });
    tiles.sum::<usize>() * SHAPE.heads
}

/// The bits are those of a device that splits nothing, whose calls were held against the oracle.
fn padded_calls_are_split(variant: &Variant) -> Result<()> {
    let mut call = Call::random(SHAPE, Mask::Varlen(keep()), variant.dtype, 1);
    for inputs in [Inputs::Apart([Placement::CONTIGUOUS; 3]), Inputs::FusedQkv, odd_inputs()] {
        (call.inputs, call.output) = (inputs, Placement::ROOM_AROUND);
        let (whole, unsplit) = count(|| call.run(variant))?;
        let unsplit = only(&unsplit)?;
        ensure!(unsplit.command_buffers == Some(1), "got {unsplit:?}");
        // Pack, copies of what lies at odd places, and scatter stay as they are.
        let others = unsplit.dispatches - 1;
        for limit in LIMITS {
            let limited = on_limited(variant, limit)?;
            let (split, counts) = count(|| call.run(&limited))?;
            ensure!(split == whole, "limit {limit}: other bits");
            let Dispatches { dispatches, command_buffers } = only(&counts)?;
            ensure!(dispatches > unsplit.dispatches, "limit {limit}: {dispatches} dispatches");
            ensure!(command_buffers > Some(1), "limit {limit}: {command_buffers:?} command buffers");
            // How many rows a tile on cooperative matrices has depends on the adapter.
            let tile_rows: &[usize] = if variant.kernel == Kernel::WgslPortable { &[64] } else { &[16, 32, 64, 128] };
            let all: Vec<_> = tile_rows.iter().map(|&rows| workgroups(rows, variant.path, &keep())).collect();
            let is_each = all.iter().any(|all| dispatches == others + all);
            ensure!(limit > 1 || is_each, "{dispatches} dispatches, {others} others, {all:?} workgroups");
        }
    }
    Ok(())
}

/// Of many tiles with many keys, which a kernel may have several workgroups share.
fn shared_keys_are_split(variant: &Variant) -> Result<()> {
    let Some(head_dim) = long_keys::head_dims(variant).first().copied() else { return Ok(()) };
    let shape = OracleShape { head_dim, ..MANY_HEADS };
    let OracleShape { seq_q, seq_k, heads, .. } = shape;
    let query = long_keys::keep(seq_q, &[seq_q], true);
    let key = long_keys::keep(seq_k, &[seq_k], true);
    let call = Call::random(shape, Mask::Cross { query, key }, variant.dtype, 2);
    let (whole, unsplit) = count(|| call.run(variant))?;
    let limited = on_limited(variant, (4 * heads * seq_q * seq_k * head_dim / 7) as u64)?;
    let (split, counts) = count(|| call.run(&limited))?;
    ensure!(split == whole, "other bits");
    let (unsplit, split) = (only(&unsplit)?, only(&counts)?);
    ensure!(
        split.dispatches > unsplit.dispatches + 3,
        "{} dispatches, not split {}",
        split.dispatches,
        unsplit.dispatches
    );
    Ok(())
}

/// Rows that do not start at 16-byte words, so that they are copied to scratch.
fn odd_inputs() -> Inputs {
    let odd = Placement { margin: [(0, 0), (0, 0), (0, 0), (1, 2)], ..Placement::CONTIGUOUS };
    Inputs::Apart([odd, Placement::CONTIGUOUS, odd])
}

fn only(counts: &[Dispatches]) -> Result<Dispatches> {
    match counts {
        [only] => Ok(*only),
        _ => Err(anyhow!("expected one submission or recording, got {counts:?}")),
    }
}

fn dense_calls_are_split(variant: &Variant) -> Result<()> {
    let shape = [SHAPE.batch, SHAPE.heads, SHAPE.seq_q, SHAPE.seq_k];
    let bias = random::normal(2, shape.iter().product());
    let bits: Vec<u32> = bias.iter().map(|&value| narrow(value, variant.dtype)).collect();
    let run = |variant: &Variant| -> Result<Vec<Vec<u32>>> {
        let of = |mask: Mask| Call::random(SHAPE, mask, variant.dtype, 3).run(variant);
        let call = Call::random(SHAPE, Mask::None, variant.dtype, 4);
        let tensor = upload(&variant.device, variant.dtype, &bits, &shape)?;
        let (_, biased) = call.run_as(variant, AttentionMask::bias(tensor.view()))?;
        Ok(vec![of(Mask::None)?, of(Mask::Key(keep()))?, biased])
    };
    let whole = run(variant)?;
    for limit in LIMITS {
        let limited = on_limited(variant, limit)?;
        let (split, counts) = count(|| run(&limited))?;
        ensure!(split == whole, "limit {limit}: other bits");
        ensure!(counts.len() == 3 && counts.iter().all(|call| call.dispatches > 1), "limit {limit}: {counts:?}");
    }
    Ok(())
}

fn packed_rows_are_split(variant: &Variant) -> Result<()> {
    let cu = CuSeqlens::from_lengths(&[150, 0, 3, 70, 64])?;
    let values = random::normal(5, cu.total() * 4 * 32);
    let bits: Vec<u32> = values.iter().map(|&value| narrow(value, variant.dtype)).collect();
    let options = VarlenOptions::default().with_kernel(variant.kernel).with_lse();
    let run = |device: &Device| -> Result<(Vec<u32>, Vec<u32>)> {
        let x = upload(device, variant.dtype, &bits, &[cu.total(), 4, 32])?;
        let attended = varlen_attention(device, [&x, &x, &x], &cu, &cu, options)?;
        Ok((download(&attended.out)?, download(&attended.lse.context("lse was asked for")?)?))
    };
    let whole = run(&variant.device)?;
    for limit in LIMITS {
        let device = limited(Config::default(), limit)?;
        let (split, counts) = count(|| run(&device))?;
        ensure!(split == whole, "limit {limit}: other bits");
        ensure!(only(&counts)?.command_buffers > Some(1), "limit {limit}: {counts:?}");
    }
    Ok(())
}

/// Long and short calls of several threads, all of which need scratch, between whose submissions the others' come.
fn beside_other_threads(variant: &Variant) -> Result<()> {
    let short = OracleShape { batch: 1, seq_q: 40, seq_k: 40, ..SHAPE };
    let limited = on_limited(variant, LIMITS[1])?;
    let calls: Vec<Call> = (0..4)
        .map(|index| {
            let (shape, keep) = if index % 2 == 0 { (SHAPE, keep()) } else { (short, vec![true; 40]) };
            let keep = keep.into_iter().enumerate().map(|(at, keep)| keep && at % 40 != index).collect();
            Call::random(shape, Mask::Varlen(keep), variant.dtype, 10 + index as u64)
        })
        .collect();
    let packed = |of: &Variant| Variant { path: Some(Path::Packed), ..of.clone() };
    let expected = calls.iter().map(|call| call.run(&packed(variant))).collect::<Result<Vec<_>>>()?;
    thread::scope(|scope| {
        let threads: Vec<_> = calls
            .iter()
            .zip(&expected)
            .map(|(call, expected)| {
                let variant = packed(&limited);
                scope.spawn(move || -> Result<()> {
                    for round in 0..6 {
                        ensure!(call.run(&variant)? == *expected, "round {round}: other bits");
                    }
                    Ok(())
                })
            })
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<()>>| thread.join().map_err(|_| anyhow!("a panic"))?;
        threads.into_iter().try_for_each(join)
    })
}

/// The application submits, so only the dispatches are split.
fn recorded_calls_are_split(variant: &Variant) -> Result<()> {
    let (whole, counts) = record(variant)?;
    let unsplit = only(&counts)?;
    // One dispatch does all of it in place.
    ensure!(variant.path != Some(Path::Fused) || unsplit.dispatches == 1, "got {unsplit:?}");
    for limit in LIMITS {
        let (split, counts) = record(&on_limited(variant, limit)?)?;
        ensure!(split == whole, "limit {limit}: other bits");
        let got = only(&counts)?;
        ensure!(got.dispatches > unsplit.dispatches && got.command_buffers.is_none(), "limit {limit}: {got:?}");
    }
    Ok(())
}

fn record(variant: &Variant) -> Result<(Vec<u32>, Vec<Dispatches>)> {
    let (device, dtype) = (&variant.device, variant.dtype);
    let keep = keep();
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(SHAPE.batch, SHAPE.seq_q, &keep)?)?;
    let shape = [SHAPE.batch, SHAPE.seq_q, SHAPE.heads, SHAPE.head_dim];
    let bits: Vec<u32> = random::normal(6, shape.iter().product()).iter().map(|&x| narrow(x, dtype)).collect();
    let x = upload(device, dtype, &bits, &shape)?;
    let mut out = upload(device, dtype, &vec![sentinel(dtype); bits.len()], &shape)?;
    let (wgpu, queue) = device.wgpu().context("no handles")?;
    let mut encoder = wgpu.create_command_encoder(&Default::default());
    let layer: MaskedAttention = variant.layer();
    let (_, counts) =
        count(|| Ok(layer.encode_into(&mut encoder, &x, &x, &x, AttentionMask::varlen(&meta), &mut out)?))?;
    queue.submit([encoder.finish()]);
    Ok((download(&out)?, counts))
}

/// In place one dispatch, packed one for each step.
fn short_work_is_one_submission(variant: &Variant) -> Result<()> {
    let call = Call::random(SHAPE, Mask::Varlen(keep()), variant.dtype, 7);
    let (_, counts) = count(|| call.run(variant))?;
    let dispatches = if variant.path == Some(Path::Packed) { 5 } else { 1 };
    let expected = Dispatches { dispatches, command_buffers: Some(1) };
    ensure!(only(&counts)? == expected, "expected {expected:?}, got {counts:?}");
    Ok(())
}
