//! The same call gives the same bits: again, into other memory, and beside other threads.

use std::thread;

use anyhow::{Result, anyhow, ensure};
use varlen_fa::{AttentionMask, DType, Device, Kernel, KeyMask, Path, Tensor, VarlenMeta};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask, tensor_shapes};
use super::memory::{download, narrow, sentinel, upload};
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    trials.each_path("repeats/same_bits_every_time", same_bits_every_time);
    trials.each_path("repeats/same_bits_for_many_tiles", same_bits_for_many_tiles);
    trials.each_path("repeats/same_bits_with_metadata_uploaded_before", same_bits_with_metadata_uploaded_before);
    trials.each_path("repeats/same_bits_beside_other_threads", same_bits_beside_other_threads);
    if trials.device().capabilities().kernels.contains(&Kernel::CudaSm80) {
        trials.each_dtype("repeats/same_bits_in_place_and_packed", same_bits_in_place_and_packed);
    }
}

/// A call's tensors, its metadata, and the bits of one run.
struct Stage {
    tensors: [Tensor; 3],
    meta: VarlenMeta,
}

impl Stage {
    fn new(variant: &Variant, shape: OracleShape, p: f64) -> Result<Self> {
        let keep = random::bernoulli_mask(1, shape.batch * shape.seq_k, p)?;
        let call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 1);
        let [q, k, v] = [0, 1, 2].map(|input| {
            let bits: Vec<u32> = call.values[input].iter().map(|&value| narrow(value, variant.dtype)).collect();
            upload(&variant.device, variant.dtype, &bits, &tensor_shapes(shape)[input])
        });
        let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(shape.batch, shape.seq_k, &keep)?)?;
        Ok(Self { tensors: [q?, k?, v?], meta })
    }

    fn run(&self, variant: &Variant) -> Result<Vec<u32>> {
        let [q, k, v] = &self.tensors;
        download(&variant.layer().forward(q, k, v, AttentionMask::varlen(&self.meta))?.out)
    }

    fn run_into(&self, variant: &Variant) -> Result<Vec<u32>> {
        let [q, k, v] = &self.tensors;
        let noise = vec![sentinel(variant.dtype); q.shape().iter().product()];
        let mut out = upload(&variant.device, variant.dtype, &noise, q.shape())?;
        variant.layer().forward_into(q, k, v, AttentionMask::varlen(&self.meta), &mut out)?;
        download(&out)
    }
}

fn check(variant: &Variant, stage: &Stage, runs: usize) -> Result<()> {
    let first = stage.run(variant)?;
    ensure!(first.iter().any(|&bits| bits != 0), "the output is all zeros: nothing was tested");
    for run in 1..runs {
        ensure!(stage.run(variant)? == first, "run {run} of forward gave other bits than the first");
        ensure!(stage.run_into(variant)? == first, "run {run}: forward_into gave other bits than forward");
    }
    // Metadata that was never used before, and a clone, which makes its own copies on the device.
    let clone = Stage { tensors: Stage::copies(variant, stage)?, meta: stage.meta.clone() };
    ensure!(clone.run(variant)? == first, "other tensors of the same values gave other bits");
    Ok(())
}

impl Stage {
    fn copies(variant: &Variant, stage: &Self) -> Result<[Tensor; 3]> {
        let [q, k, v] = stage.tensors.each_ref().map(|tensor| {
            let bits = download(tensor)?;
            upload(&variant.device, variant.dtype, &bits, tensor.shape())
        });
        Ok([q?, k?, v?])
    }
}

fn same_bits_every_time(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 2, seq_q: 100, seq_k: 100, heads: 4, kv_heads: 2, head_dim: 64 };
    // A race shows itself once in many runs, and hardware is where it does; software devices take too long for as many.
    let runs = if variant.device.capabilities().is_software { 10 } else { 100 };
    check(variant, &Stage::new(variant, shape, 0.6)?, runs)
}

fn same_bits_for_many_tiles(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 2, seq_q: 700, seq_k: 700, heads: 2, kv_heads: 1, head_dim: 128 };
    check(variant, &Stage::new(variant, shape, 0.9)?, 3)
}

fn same_bits_with_metadata_uploaded_before(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 2, seq_q: 70, seq_k: 70, heads: 2, kv_heads: 2, head_dim: 32 };
    let at_first_use = Stage::new(variant, shape, 0.6)?.run(variant)?;
    let stage = Stage::new(variant, shape, 0.6)?;
    stage.meta.upload_to(&variant.device)?;
    // Twice changes nothing.
    stage.meta.upload_to(&variant.device)?;
    ensure!(stage.run(variant)? == at_first_use, "metadata that was uploaded before gave other bits");
    Ok(())
}

/// The sm80 kernel meets the same rows in the same order on both paths.
fn same_bits_in_place_and_packed(device: &Device, dtype: DType) -> Result<()> {
    for (head_dim, p) in [(32, 0.5), (64, 0.7), (72, 0.9), (128, 0.3), (160, 0.6), (256, 0.8)] {
        let shape = OracleShape { batch: 3, seq_q: 400, seq_k: 400, heads: 4, kv_heads: 2, head_dim };
        let on = |path| Variant {
            device: device.clone(),
            kernel: Kernel::CudaSm80,
            path: Some(path),
            dtype,
            tile_keys: None,
        };
        let stage = Stage::new(&on(Path::Packed), shape, p)?;
        let packed = stage.run_into(&on(Path::Packed))?;
        ensure!(stage.run_into(&on(Path::Fused))? == packed, "head dimension {head_dim}: the paths gave other bits");
    }
    Ok(())
}

/// Threads that share one device, one layer and metadata whose copy on the device is not made yet.
fn same_bits_beside_other_threads(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 3, seq_q: 77, seq_k: 77, heads: 4, kv_heads: 4, head_dim: 32 };
    let alone = Stage::new(variant, shape, 0.7)?.run(variant)?;
    let stage = Stage::new(variant, shape, 0.7)?;
    let start = std::sync::Barrier::new(4);
    let results = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    (0..5).map(|_| stage.run_into(variant)).collect::<Result<Vec<_>>>()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join()).collect::<Vec<_>>()
    });
    for result in results {
        for bits in result.map_err(|_| anyhow!("a thread panicked"))?? {
            ensure!(bits == alone, "a thread beside others got other bits than one alone");
        }
    }
    Ok(())
}
