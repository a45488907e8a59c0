//! Sequence parallelism by NCCL, on as many GPUs as there are: the same bits as rows through host memory give, and an error where a
//! rank is silent.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use libtest_mimic::Completion;
use varlen_fa::dist::{
    Communicator, Heads, HostCommunicator, Mode, NcclCommunicator, SequenceParallel, ShardedMeta, Shards,
};
use varlen_fa::{DType, Device, DeviceChoice, Error, KeyMask, Tensor, bf16};

use super::dist::on_ranks;
use super::external_cuda::{Application, LOCAL};
use super::trials::Trials;

pub fn register(trials: &mut Trials) {
    trials.alone("dist/nccl/modes", modes);
    trials.alone("dist/nccl/captured", captured);
    trials.alone("dist/nccl/a_rank_that_is_silent", a_rank_that_is_silent);
    trials.alone("dist/nccl/refusals", refusals);
}

const HEADS: Heads = Heads { num_heads: 8, num_kv_heads: 8, head_dim: 64, dtype: DType::Bf16 };
const SEQ: usize = 300;

/// Every GPU, of which that under test is the first.
fn gpus(device: &Device) -> Result<Vec<Device>> {
    let others = Device::choices().into_iter().filter(|choice| matches!(choice, DeviceChoice::Cuda(_)));
    let others = others.filter(|choice| *choice != device.config().device).map(Device::new);
    Ok([Ok(device.clone())].into_iter().chain(others).collect::<Result<_, _>>()?)
}

/// Why NCCL cannot be used, if it cannot.
fn absence(device: &Device) -> Result<Option<String>> {
    let control = HostCommunicator::threads(1)?.remove(0);
    match NcclCommunicator::new(control, device) {
        Ok(_) => Ok(None),
        Err(Error::DeviceUnavailable { why, .. }) => {
            ensure!(why.contains("libnccl2"), "it does not say what to install: {why}");
            Ok(Some(why))
        }
        Err(error) => Err(error.into()),
    }
}

/// The output of a rank in each mode.
fn outputs(mut communicator: Box<dyn Communicator>, device: &Device) -> Result<Vec<Vec<bf16>>> {
    let (rank, world) = (communicator.rank(), communicator.world_size());
    let shards = Shards::equal(SEQ, world)?.with_prefix(20)?;
    let meta = ShardedMeta::new(&KeyMask::from_lengths(SEQ + 20, &[SEQ + 20, SEQ - 3])?, &shards, rank)?;
    let shape = [2, meta.query().seq(), HEADS.num_heads, HEADS.head_dim];
    let tensor = |seed: usize| {
        let value = |at: usize| ((at * 37 + seed * 11 + rank * 5) % 61) as f32 / 61.0 - 0.5;
        let values: Vec<bf16> = (0..shape.iter().product()).map(|at| bf16::from_f32(value(at))).collect();
        Tensor::from_slice(device, &values, &shape)
    };
    let (q, k, v) = (tensor(0)?, tensor(1)?, tensor(2)?);
    let mut outputs = Vec::new();
    for (mode, chunks) in
        [(Mode::Gather, 1), (Mode::Gather, 2), (Mode::Ulysses, 1), (Mode::Ulysses, 2), (Mode::Ring, 1)]
    {
        let parallel = SequenceParallel::new(device).with_mode(mode).with_chunks(chunks);
        let request = parallel.prepare(&mut *communicator, &meta, &HEADS)?;
        for _ in 0..3 {
            outputs.push(parallel.forward(&mut *communicator, &request, &q, &k, &v)?.to_vec()?);
        }
    }
    communicator.barrier()?;
    Ok(outputs)
}

fn modes(device: &Device) -> Result<Completion> {
    if let Some(why) = absence(device)? {
        return Ok(Completion::ignored_with(why));
    }
    let gpus = gpus(device)?;
    for world in [1, 2, 4].into_iter().filter(|&world| world <= gpus.len()) {
        let ranks = || -> Result<Vec<_>> { Ok(HostCommunicator::threads(world)?.into_iter().zip(&gpus).collect()) };
        let expected = on_ranks(ranks()?, |(rank, device)| outputs(Box::new(rank), device))?;
        let got = on_ranks(ranks()?, |(rank, device)| outputs(Box::new(NcclCommunicator::new(rank, device)?), device))?;
        for (rank, (got, expected)) in got.into_iter().zip(expected).enumerate() {
            let same = got.with_context(|| format!("rank {rank} of {world}"))? == expected?;
            ensure!(same, "rank {rank} of {world} has other bits by NCCL");
        }
    }
    Ok(Completion::Completed)
}

/// Calls that are captured into a graph give the bits of direct calls each time that it runs, on whatever the tensors hold by then. The
/// first call of a request is a direct one, which takes the memory.
fn captured(device: &Device) -> Result<Completion> {
    if let Some(why) = absence(device)? {
        return Ok(Completion::ignored_with(why));
    }
    let gpus = gpus(device)?.len();
    if gpus < 2 {
        return Ok(Completion::ignored_with("there is one GPU"));
    }
    let applications = (0..2).map(Application::on_gpu).collect::<Result<Vec<_>>>()?;
    let ranks = HostCommunicator::threads(2)?.into_iter().zip(&applications).collect();
    let done = on_ranks(ranks, |(rank, application): (HostCommunicator, &Application)| {
        let device = application.device()?;
        let mut rank = NcclCommunicator::new(rank, &device)?;
        let meta = ShardedMeta::new(&KeyMask::from_lengths(SEQ, &[SEQ - 7])?, &Shards::equal(SEQ, 2)?, rank.rank())?;
        let shape = [1, SEQ / 2, HEADS.num_heads, HEADS.head_dim];
        let values = |seed: usize| -> Vec<bf16> {
            let value = |at: usize| ((at * 37 + seed * 11) % 61) as f32 / 61.0 - 0.5;
            (0..shape.iter().product()).map(|at| bf16::from_f32(value(at))).collect()
        };
        for (mode, chunks) in [(Mode::Gather, 1), (Mode::Gather, 2), (Mode::Ulysses, 1), (Mode::Ring, 1)] {
            let parallel = SequenceParallel::new(&device).with_mode(mode).with_chunks(chunks);
            let request = parallel.prepare(&mut rank, &meta, &HEADS)?;
            let mut x = Tensor::zeros(&device, HEADS.dtype, &shape)?;
            let mut out = Tensor::zeros(&device, HEADS.dtype, &shape)?;
            parallel.forward_into(&mut rank, &request, &x, &x, &x, &mut out)?;
            let graph =
                application.capture(LOCAL, || Ok(parallel.forward_into(&mut rank, &request, &x, &x, &x, &mut out)?))?;
            for seed in [1, 2] {
                x.write(&values(seed + rank.rank()))?;
                parallel.forward_into(&mut rank, &request, &x, &x, &x, &mut out)?;
                let direct = out.to_vec::<bf16>()?;
                ensure!(direct.iter().any(|value| value.to_f32() != 0.0), "{mode}: zeros alone");
                out.write(&vec![bf16::NAN; direct.len()])?;
                rank.barrier()?;
                graph.launch().map_err(|error| anyhow!("{mode}: the graph does not start: {error:?}"))?;
                application.synchronize()?;
                ensure!(out.to_vec::<bf16>()? == direct, "{mode}, {chunks} chunks: other bits");
            }
            rank.barrier()?;
        }
        Ok(())
    })?;
    done.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(Completion::Completed)
}

fn a_rank_that_is_silent(device: &Device) -> Result<Completion> {
    if let Some(why) = absence(device)? {
        return Ok(Completion::ignored_with(why));
    }
    let gpus = gpus(device)?;
    if gpus.len() < 2 {
        return Ok(Completion::ignored_with("there is one GPU"));
    }
    let (started, limit) = (Instant::now(), Duration::from_secs(2));
    let ranks = HostCommunicator::threads(2)?.into_iter().zip(&gpus).collect();
    let errors = on_ranks(ranks, |(rank, device): (HostCommunicator, &Device)| {
        let mut rank = NcclCommunicator::new(rank, device)?;
        let meta = ShardedMeta::new(&KeyMask::all(1, SEQ)?, &Shards::equal(SEQ, 2)?, rank.rank())?;
        let tensor = Tensor::zeros(device, HEADS.dtype, &[1, SEQ / 2, HEADS.num_heads, HEADS.head_dim])?;
        let parallel = SequenceParallel::new(device).with_mode(Mode::Gather);
        let request = parallel.prepare(&mut rank, &meta, &HEADS)?;
        parallel.forward(&mut rank, &request, &tensor, &tensor, &tensor)?;
        let mut rank = rank.with_time_out(limit);
        if rank.rank() == 1 {
            thread::sleep(3 * limit);
            return Ok(None);
        }
        // The call itself does not wait for the GPU; what it started is aborted, and the GPU goes on.
        let first = parallel.forward(&mut rank, &request, &tensor, &tensor, &tensor).err();
        device.synchronize()?;
        Ok(first.or_else(|| parallel.forward(&mut rank, &request, &tensor, &tensor, &tensor).err()))
    })?;
    let first = errors.into_iter().next().ok_or_else(|| anyhow!("there is no rank"))??;
    ensure!(first.is_some(), "rank 0 does not notice");
    ensure!(started.elapsed() < Duration::from_secs(30), "it took {:?}", started.elapsed());
    Ok(Completion::Completed)
}

/// A device that is none of CUDA's, and communicators that cannot be.
fn refusals(device: &Device) -> Result<Completion> {
    let alone = || Ok::<_, Error>(HostCommunicator::threads(1)?.remove(0));
    let cpu = Device::new(DeviceChoice::Cpu)?;
    let refused = NcclCommunicator::new(alone()?, &cpu).err();
    ensure!(matches!(refused, Some(Error::DeviceKind { expected: "cuda", .. })), "{refused:?}");
    // SAFETY: null is refused before it is used.
    let refused = unsafe { NcclCommunicator::from_raw(alone()?, device, std::ptr::null_mut()) }.err();
    ensure!(matches!(refused, Some(Error::Handle { argument: "comm", .. })), "{refused:?}");
    Ok(Completion::Completed)
}
