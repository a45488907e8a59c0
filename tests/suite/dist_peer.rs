//! Sequence parallelism among CUDA devices of this process, which copy from one another: on as many GPUs as there are, and on one
//! GPU otherwise, which several ranks then share.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use varlen_fa::dist::{Communicator, Heads, Mode, PeerCommunicator, SequenceParallel, ShardedMeta, Shards};
use varlen_fa::{
    AttentionMask, DType, Device, DeviceChoice, DeviceMemory, Error, Kernel, KeyMask, Layout, MaskedAttention, Tensor,
};

use super::dist;
use super::trials::Trials;

pub fn register(trials: &mut Trials) {
    trials.each_dtype("dist/peer/modes", |device, dtype| dist::modes_on(device, dtype, peers));
    trials.each_dtype("dist/peer/heads", |device, dtype| dist::heads_on(device, dtype, peers));
    trials.each_dtype("dist/peer/random", |device, dtype| dist::random_cases_on(device, dtype, peers));
    trials.once("dist/peer/repeats", |device| dist::repeats_on(device, peers));
    trials.once("dist/peer/many_calls", many_calls);
    trials.once("dist/peer/long_shards", long_shards);
    trials.once("dist/peer/uneven_batch_rows", uneven_batch_rows);
    trials.once("dist/peer/a_rank_that_fails", a_rank_that_fails);
    trials.once("dist/peer/a_rank_that_is_silent", a_rank_that_is_silent);
    trials.once("dist/peer/memory_of_another_device", memory_of_another_device);
}

/// The device of each rank: GPUs in turn, of which the device under test is the first.
fn devices(device: &Device, ranks: usize) -> Result<Vec<Device>> {
    let mut gpus = vec![device.clone()];
    for choice in Device::choices() {
        if matches!(choice, DeviceChoice::Cuda(_)) && choice != device.config().device {
            gpus.extend(Device::new(choice).ok());
        }
    }
    Ok((0..ranks).map(|rank| gpus[rank % gpus.len()].clone()).collect())
}

fn communicators(device: &Device, ranks: usize) -> Result<Vec<(PeerCommunicator, Device)>> {
    let devices = devices(device, ranks)?;
    Ok(PeerCommunicator::of_devices(&devices)?.into_iter().zip(devices).collect())
}

fn peers(device: &Device, ranks: usize) -> Result<Vec<(Box<dyn Communicator>, Device)>> {
    let ranks = communicators(device, ranks)?;
    Ok(ranks.into_iter().map(|(rank, device)| (Box::new(rank) as Box<dyn Communicator>, device)).collect())
}

const HEADS: Heads = Heads { num_heads: 8, num_kv_heads: 8, head_dim: 64, dtype: DType::Bf16 };
const SEQ: usize = 600;

/// A rank's metadata and tensors, of a sequence with masked tokens at its end.
fn inputs(device: &Device, rank: usize, ranks: usize) -> Result<(ShardedMeta, [Tensor; 3])> {
    inputs_of(device, (rank, ranks), (SEQ, SEQ - 5))
}

/// The same of so many tokens, of which so many are valid.
fn inputs_of(
    device: &Device,
    (rank, ranks): (usize, usize),
    (seq, valid): (usize, usize),
) -> Result<(ShardedMeta, [Tensor; 3])> {
    let shards = Shards::equal(seq, ranks)?;
    let meta = ShardedMeta::new(&KeyMask::from_lengths(seq, &[valid])?, &shards, rank)?;
    let shape = [1, meta.query().seq(), HEADS.num_heads, HEADS.head_dim];
    let zeros = || Tensor::zeros(device, HEADS.dtype, &shape);
    Ok((meta, [zeros()?, zeros()?, zeros()?]))
}

/// Calls follow one another without a wait on the host, and memory of one is reused by the next: each gives the same bits. Where all
/// tokens are valid, attention begins before all keys have come, or by a kernel that cannot wait itself after a copy that takes long.
fn many_calls(device: &Device) -> Result<()> {
    for (kernel, tokens) in [(None, (SEQ, SEQ - 5)), (None, (SEQ, SEQ)), (Some(Kernel::CudaSm80), (8192, 8192))] {
        many_calls_of(device, kernel, tokens).with_context(|| format!("{kernel:?}, {tokens:?} tokens"))?;
    }
    Ok(())
}

fn many_calls_of(device: &Device, kernel: Option<Kernel>, tokens: (usize, usize)) -> Result<()> {
    let results = dist::on_ranks(communicators(device, 2)?, |(mut communicator, device)| {
        let (meta, mut tensors) = inputs_of(&device, (communicator.rank(), 2), tokens)?;
        for (seed, tensor) in tensors.iter_mut().enumerate() {
            let count: usize = tensor.shape().iter().product();
            let value = |at: usize| ((at * 37 + seed * 11 + communicator.rank() * 5) % 61) as f32 / 61.0 - 0.5;
            let values: Vec<varlen_fa::bf16> = (0..count).map(|at| varlen_fa::bf16::from_f32(value(at))).collect();
            tensor.write(&values)?;
        }
        for (mode, chunks) in
            [(Mode::Gather, 1), (Mode::Gather, 4), (Mode::Ulysses, 1), (Mode::Ulysses, 2), (Mode::Ring, 1)]
        {
            let parallel = SequenceParallel::new(&device).with_mode(mode).with_chunks(chunks);
            let parallel = kernel.into_iter().fold(parallel, SequenceParallel::with_kernel);
            let request = parallel.prepare(&mut communicator, &meta, &HEADS)?;
            let [q, k, v] = &tensors;
            let outputs: Vec<Tensor> =
                (0..40).map(|_| parallel.forward(&mut communicator, &request, q, k, v)).collect::<Result<_, _>>()?;
            let first = outputs[0].to_vec::<varlen_fa::bf16>()?;
            ensure!(first.iter().any(|value| value.to_f32() != 0.0), "{mode}: zeros alone");
            for output in &outputs[1..] {
                ensure!(output.to_vec::<varlen_fa::bf16>()? == first, "{mode}, {chunks} chunks: other bits");
            }
        }
        communicator.barrier()?;
        Ok(())
    })?;
    results.into_iter().collect()
}

/// Long shards, whose keys come while attention is under way: the result is that of a call that finds all keys there, in one chunk its
/// bits, since a rank may compute several in one call each. Calls bring keys and values to the same memory, values of the other sign in
/// turns: one that begins too early computes with those of the call before.
fn long_shards(device: &Device) -> Result<()> {
    let heads = Heads { num_heads: 8, num_kv_heads: 4, head_dim: 128, dtype: DType::Bf16 };
    // A prefix, of which a batch row keeps some tokens, and shards: about as long as each other, around the ends of tiles of keys, very
    // short and empty ones.
    let cases = [
        (0, vec![0], [8192, 8192]),
        (70, vec![70, 3], [9001, 8399]),
        (5, vec![0, 5], [8161, 159]),
        (0, vec![0], [1, 9000]),
        (33, vec![20], [8300, 0]),
        (16, vec![16], [160, 8321]),
        (16, vec![16], [700, 900]),
    ];
    for (prefix, valid, lengths) in cases {
        let shards = Shards::from_lengths(&lengths)?.with_prefix(prefix)?;
        let rows: Vec<_> = valid.iter().map(|&valid| vec![0..valid, prefix..shards.seq()]).collect();
        let mask = KeyMask::from_runs(shards.seq(), &rows)?;
        let results = dist::on_ranks(communicators(device, 2)?, |(mut communicator, device)| {
            let rank = communicator.rank();
            let meta = ShardedMeta::new(&mask, &shards, rank)?;
            let tensor = |seed: usize, seq: usize, heads_of: usize, around: f32| -> Result<Tensor> {
                let shape = [mask.batch(), seq, heads_of, heads.head_dim];
                let value = |at: usize| ((at * 37 + seed * 11 + at / 977) % 61) as f32 / 61.0 - 0.5 + around;
                let count = shape.iter().product();
                let values: Vec<_> = (0..count).map(|at| varlen_fa::bf16::from_f32(value(at))).collect();
                Ok(Tensor::from_slice(&device, &values, &shape)?)
            };
            let q = tensor(rank, meta.query().seq(), heads.num_heads, 0.0)?;
            // Of each call, prefix and shards of all ranks: keys and values.
            let of_call = |call: usize| -> Result<Vec<[Tensor; 2]>> {
                let part = |(at, seq)| -> Result<[Tensor; 2]> {
                    let (seed, around) = (7 * call + 2 * at, if call == 0 { 1.5 } else { -1.5 });
                    let keys = tensor(seed, seq, heads.num_kv_heads, 0.0)?;
                    Ok([keys, tensor(seed + 1, seq, heads.num_kv_heads, around)?])
                };
                [prefix, lengths[0], lengths[1]].into_iter().enumerate().map(part).collect()
            };
            let calls = [of_call(0)?, of_call(1)?];
            let attention = MaskedAttention::new(&device);
            for chunks in 1..=3 {
                let parallel = SequenceParallel::new(&device).with_mode(Mode::Gather).with_chunks(chunks);
                let request = parallel.prepare(&mut communicator, &meta, &heads)?;
                let mut outputs = Vec::new();
                for call in 0..6 {
                    let parts = &calls[call % 2];
                    let own = |which: usize| vec![parts[0][which].view(), parts[1 + rank][which].view()];
                    outputs.push(parallel.forward(&mut communicator, &request, &q, own(0), own(1))?);
                }
                for (call, output) in outputs.iter().enumerate() {
                    let all = |which: usize| calls[call % 2].iter().map(|part| part[which].view()).collect::<Vec<_>>();
                    let mask = AttentionMask::varlen_cross(meta.query(), meta.keys());
                    let expected = attention.forward(&q, all(0), all(1), mask)?.out.to_vec::<varlen_fa::bf16>()?;
                    let bits = output.to_vec::<varlen_fa::bf16>()?;
                    let is_near = |(got, right): (&varlen_fa::bf16, &varlen_fa::bf16)| {
                        (got.to_f32() - right.to_f32()).abs() <= 1.0 / 64.0
                    };
                    let is_right = if chunks == 1 { bits == expected } else { bits.iter().zip(&expected).all(is_near) };
                    ensure!(is_right, "{prefix} + {lengths:?}, {chunks} chunks, call {call}: other values");
                }
            }
            communicator.barrier()?;
            Ok(())
        })?;
        results.into_iter().collect::<Result<Vec<()>>>()?;
    }
    Ok(())
}

/// Batch rows that lie apart by no whole number of tokens cannot be copied from where they lie: they are packed, and the bits are
/// those of batch rows that can. Nothing between them is looked at.
fn uneven_batch_rows(device: &Device) -> Result<()> {
    const BATCH: usize = 2;
    let results = dist::on_ranks(communicators(device, 2)?, |(mut communicator, device)| {
        let shards = Shards::equal(SEQ, 2)?;
        let meta = ShardedMeta::new(&KeyMask::all(BATCH, SEQ)?, &shards, communicator.rank())?;
        let Heads { num_heads, head_dim, .. } = HEADS;
        let shape = [BATCH, meta.query().seq(), num_heads, head_dim];
        let row = shape[1] * num_heads * head_dim;
        let uneven = Layout::strided(
            &shape,
            &[row + head_dim, num_heads * head_dim, head_dim, 1].map(|stride| stride as u64),
            0,
        )?;
        let (mut even, mut apart) = (Vec::new(), Vec::new());
        for seed in 0..3 {
            let value = |at: usize| ((at * 37 + seed * 11 + communicator.rank() * 5) % 61) as f32 / 61.0 - 0.5;
            let values: Vec<varlen_fa::bf16> =
                (0..BATCH * row).map(|at| varlen_fa::bf16::from_f32(value(at))).collect();
            even.push(Tensor::from_slice(&device, &values, &shape)?);
            let between = vec![varlen_fa::bf16::NAN; head_dim];
            let values = [&values[..row], &between, &values[row..]].concat();
            let mut memory = DeviceMemory::alloc(&device, 2 * values.len() as u64)?;
            memory.write(&values)?;
            apart.push(memory);
        }
        for chunks in [1, 3] {
            let parallel = SequenceParallel::new(&device).with_mode(Mode::Gather).with_chunks(chunks);
            let request = parallel.prepare(&mut communicator, &meta, &HEADS)?;
            let expected = parallel.forward(&mut communicator, &request, &even[0], &even[1], &even[2])?;
            let expected = expected.to_vec::<varlen_fa::bf16>()?;
            // The second and the third call repeat what the first one described.
            for call in 0..4 {
                let view = |which: usize| apart[which].view(HEADS.dtype, uneven);
                let out = parallel.forward(&mut communicator, &request, view(0), view(1), view(2))?;
                ensure!(out.to_vec::<varlen_fa::bf16>()? == expected, "{chunks} chunks, call {call}: other bits");
            }
        }
        communicator.barrier()?;
        Ok(())
    })?;
    results.into_iter().collect()
}

/// The others get an error, and the GPUs compute on.
fn a_rank_that_fails(device: &Device) -> Result<()> {
    for mode in [Mode::Gather, Mode::Ulysses, Mode::Ring] {
        let started = Instant::now();
        let errors = dist::on_ranks(communicators(device, 3)?, |(mut communicator, device)| {
            let heads = Heads { num_heads: 6, num_kv_heads: 6, ..HEADS };
            let (meta, _) = inputs(&device, communicator.rank(), 3)?;
            let shape = [1, meta.query().seq(), 6, HEADS.head_dim];
            let tensor = Tensor::zeros(&device, HEADS.dtype, &shape)?;
            let parallel = SequenceParallel::new(&device).with_mode(mode);
            let request = parallel.prepare(&mut communicator, &meta, &heads)?;
            let first = parallel.forward(&mut communicator, &request, &tensor, &tensor, &tensor);
            if communicator.rank() == 1 {
                first?;
                let other = Tensor::zeros(&device, HEADS.dtype, &[1, 3, 6, HEADS.head_dim])?;
                return Ok(parallel.forward(&mut communicator, &request, &tensor, &other, &tensor).err());
            }
            // Rank 1 may give up before the others have all they wait for in the first call.
            let second = first.and_then(|_| parallel.forward(&mut communicator, &request, &tensor, &tensor, &tensor));
            Ok(second.err())
        })?;
        for (rank, error) in errors.into_iter().enumerate() {
            let error = error?;
            let is_right = match rank {
                1 => matches!(error, Some(Error::Shape { argument: "k", .. })),
                _ => matches!(error, Some(Error::RankLost { rank: 1, .. })),
            };
            ensure!(is_right, "{mode}, rank {rank}: {error:?}");
        }
        ensure!(started.elapsed() < Duration::from_secs(20), "{mode}: errors took {:?}", started.elapsed());
    }
    many_calls(device)
}

fn a_rank_that_is_silent(device: &Device) -> Result<()> {
    let limit = Duration::from_millis(300);
    let errors = dist::on_ranks(communicators(device, 2)?, |(mut communicator, device)| {
        let (meta, [q, k, v]) = inputs(&device, communicator.rank(), 2)?;
        let parallel = SequenceParallel::new(&device).with_mode(Mode::Gather);
        let request = parallel.prepare(&mut communicator, &meta, &HEADS)?;
        let mut communicator = communicator.with_time_out(limit);
        if communicator.rank() == 1 {
            thread::sleep(4 * limit);
        }
        Ok(parallel.forward(&mut communicator, &request, &q, &k, &v).err())
    })?;
    let errors = errors.into_iter().collect::<Result<Vec<_>>>()?;
    ensure!(matches!(errors[0], Some(Error::RankTimedOut { rank: 1, .. })), "{errors:?}");
    ensure!(matches!(errors[1], Some(Error::RankLost { rank: 0, .. })), "{errors:?}");
    device.synchronize()?;
    many_calls(device)
}

/// Tensors of a device that the communicator does not know go through host memory, and the result is the same.
fn memory_of_another_device(device: &Device) -> Result<()> {
    let results = dist::on_ranks(communicators(device, 2)?, |(mut communicator, own)| {
        let cpu = Device::new(DeviceChoice::Cpu)?;
        ensure!(communicator.moves_memory_of(&own) && !communicator.moves_memory_of(&cpu));
        let (meta, [q, k, v]) = inputs(&cpu, communicator.rank(), 2)?;
        let parallel = SequenceParallel::new(&cpu).with_mode(Mode::Gather);
        let request = parallel.prepare(&mut communicator, &meta, &HEADS)?;
        let out = parallel.forward(&mut communicator, &request, &q, &k, &v)?.to_vec::<varlen_fa::bf16>()?;
        ensure!(out.iter().all(|value| value.to_f32() == 0.0), "values of zero come to something else");
        Ok(())
    })?;
    results.into_iter().collect()
}
