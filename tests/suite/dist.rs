//! Sequence parallelism: every mode, on threads of one process, against the oracle and against one device.

use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use varlen_fa::dist::{
    Communicator, Heads, HostCommunicator, Machine, Mode, ModeReason, ParallelNeeds, ParallelPlan, SequenceParallel,
    ShardedMeta, Shards,
};
use varlen_fa::{BackendKind, DType, Device, KeyMask, RangesOf, Tensor};
use varlen_fa_testkit::OracleShape;

use super::call::{Call, Mask, tensor_shapes};
use super::check::Rules;
use super::memory::{download, narrow, poison, upload};
use super::rule::Rule;
use super::trials::{Trials, Variant, is_emulated_gpu};

pub fn register(trials: &mut Trials) {
    trials.each_dtype("dist/modes", modes);
    trials.each_dtype("dist/heads", heads);
    trials.each_dtype("dist/ranges", ranges);
    trials.each_dtype("dist/random", random_cases);
    trials.once("dist/repeats", repeats);
    trials.once("dist/kept_memory", kept_memory);
    trials.once("dist/strided", strided);
    trials.once("dist/plans", plans);
}

/// A masked sequence that is divided among ranks.
struct Case {
    name: &'static str,
    batch: usize,
    prefix: usize,
    lengths: &'static [usize],
    suffix: usize,
    /// Of batch row and global position.
    keep: fn(usize, usize) -> bool,
}

const CASES: &[Case] = &[
    Case { name: "all valid", batch: 2, prefix: 0, lengths: &[40, 40], suffix: 0, keep: |_, _| true },
    Case {
        name: "valid shards beside text",
        batch: 3,
        prefix: 20,
        lengths: &[150, 90],
        suffix: 9,
        keep: |b, at| (20..260).contains(&at) || (at + b) % 3 == 0,
    },
    Case { name: "nothing valid", batch: 1, prefix: 3, lengths: &[4, 4], suffix: 0, keep: |_, _| false },
    Case { name: "seven tokens", batch: 1, prefix: 0, lengths: &[4, 3], suffix: 0, keep: |_, at| at != 5 },
    Case { name: "a shard of padding", batch: 2, prefix: 0, lengths: &[33, 20, 33], suffix: 0, keep: |_, at| at < 33 },
    Case { name: "one valid token", batch: 2, prefix: 2, lengths: &[5, 6], suffix: 1, keep: |b, at| b == 1 && at == 9 },
    Case {
        name: "one valid token of the prefix",
        batch: 1,
        prefix: 4,
        lengths: &[5, 6],
        suffix: 0,
        keep: |_, at| at == 2,
    },
    Case {
        name: "text on every rank",
        batch: 3,
        prefix: 64,
        lengths: &[50, 50, 50, 50],
        suffix: 0,
        keep: |b, at| at < [10, 64, 0][b] || at >= 64,
    },
    Case {
        name: "text on no rank",
        batch: 2,
        prefix: 16,
        lengths: &[40, 41],
        suffix: 0,
        keep: |b, at| at >= 16 && b * 7 + at < 80,
    },
    Case { name: "uneven shards", batch: 2, prefix: 0, lengths: &[9, 0, 130, 2], suffix: 0, keep: |b, at| at % 5 != b },
    Case { name: "698 tokens", batch: 1, prefix: 0, lengths: &[175, 175, 174, 174], suffix: 0, keep: |_, at| at < 690 },
    Case {
        name: "holes across borders",
        batch: 2,
        prefix: 10,
        lengths: &[30, 30, 30, 30],
        suffix: 12,
        keep: |b, at| !matches!(at, 5..=12 | 38..=43 | 60..=101 | 126..=133) || b == 1 && at % 3 == 0,
    },
    Case {
        name: "prefix and suffix, and a batch row of padding",
        batch: 3,
        prefix: 7,
        lengths: &[20, 21],
        suffix: 9,
        keep: |b, at| b != 1 && at % 11 != 4,
    },
];

/// Every mode of so many ranks.
fn all_modes(ranks: usize) -> Vec<Mode> {
    let mut modes = vec![Mode::Gather, Mode::Ulysses, Mode::Ring];
    if ranks == 4 {
        modes.extend([Mode::UlyssesGather { ulysses: 2 }, Mode::UlyssesRing { ulysses: 2 }]);
    }
    modes
}

impl Case {
    fn shards(&self) -> Result<Shards> {
        Ok(Shards::from_lengths(self.lengths)?.with_prefix(self.prefix)?.with_suffix(self.suffix)?)
    }

    /// The call of one device, on 12 query heads.
    fn call(&self, kv_heads: usize, head_dim: usize, dtype: DType) -> Result<Call> {
        let (batch, seq) = (self.batch, self.shards()?.seq());
        let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 12, kv_heads, head_dim };
        let keep = super::masks::mask(batch, seq, self.keep);
        Ok(Call::random(shape, Mask::Varlen(keep), dtype, 91))
    }
}

/// Positions of a rank's local tensor.
pub fn local(shards: &Shards, rank: usize) -> Vec<usize> {
    let seq = shards.seq();
    (0..shards.prefix()).chain(shards.shard(rank)).chain(seq - shards.suffix()..seq).collect()
}

/// Ranks and their devices, given how many, and the device under test.
pub type Ranks = fn(&Device, usize) -> Result<Vec<(Box<dyn Communicator>, Device)>>;

/// Ranks that exchange host memory.
fn host(device: &Device, ranks: usize) -> Result<Vec<(Box<dyn Communicator>, Device)>> {
    let ranks = HostCommunicator::threads(ranks)?;
    Ok(ranks.into_iter().map(|rank| (Box::new(rank) as Box<dyn Communicator>, device.clone())).collect())
}

/// Runs a thread for each rank.
pub fn on_ranks<C: Send, T: Send>(ranks: Vec<C>, run: impl Fn(C) -> Result<T> + Sync) -> Result<Vec<Result<T>>> {
    thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a rank panicked"))).collect()
    })
}

/// One rank's q, k and v: bits of the global ones, and poison in the rows of masked tokens.
pub fn local_inputs(call: &Call, device: &Device, positions: &[usize]) -> Result<[Tensor; 3]> {
    let shapes = tensor_shapes(call.shape);
    let keep = call.mask.query_keep().context("the mask is of metadata")?;
    let mut tensors = Vec::new();
    for (values, [batch, seq, heads, dim]) in call.values.iter().zip(shapes) {
        let mut bits = Vec::new();
        for row in (0..batch).flat_map(|b| positions.iter().map(move |at| b * seq + at)) {
            let values = &values[row * heads * dim..][..heads * dim];
            bits.extend(values.iter().enumerate().map(|(place, &value)| match keep[row] {
                true => narrow(value, call.dtype),
                false => poison(place, call.dtype),
            }));
        }
        tensors.push(upload(device, call.dtype, &bits, &[batch, positions.len(), heads, dim])?);
    }
    tensors.try_into().map_err(|_| anyhow!("three tensors"))
}

/// The output of all ranks as that of one device: bits, row-major. Rows that several ranks have are the same on each but on a GPU,
/// which shares out work by its size: one output more then for each rank whose rows differ.
fn run(
    call: &Call,
    (device, ranks): (&Device, Ranks),
    shards: &Shards,
    (mode, chunks): (Mode, Option<usize>),
) -> Result<Vec<Vec<u32>>> {
    let OracleShape { batch, seq_q: seq, heads, kv_heads, head_dim, .. } = call.shape;
    let keep = call.mask.query_keep().context("the mask is of metadata")?;
    let mask = KeyMask::from_bool(batch, seq, keep)?;
    let of = RangesOf::from([batch, seq, seq]);
    let ranges = call.rule.as_ref().map(|rule| rule.ranges(&of)).transpose()?;
    let sizes = Heads { num_heads: heads, num_kv_heads: kv_heads, head_dim, dtype: call.dtype };
    let outputs = on_ranks(ranks(device, shards.ranks())?, |(mut communicator, device)| {
        let rank = communicator.rank();
        let [q, k, v] = local_inputs(call, &device, &local(shards, rank))?;
        let meta = ShardedMeta::new(&mask, shards, rank)?;
        let meta = match &ranges {
            Some(ranges) => meta.with_ranges(ranges)?,
            None => meta,
        };
        let parallel = SequenceParallel::new(&device).with_mode(mode);
        let parallel = chunks.into_iter().fold(parallel, SequenceParallel::with_chunks);
        let request = parallel.prepare(&mut *communicator, &meta, &sizes)?;
        ensure!((request.plan().mode, request.plan().reason) == (mode, ModeReason::Forced), "{}", request.plan());
        let out = parallel.forward(&mut *communicator, &request, &q, &k, &v)?;
        let bits = download(&out)?;
        // No rank gives its device up while another one may still copy from it.
        communicator.barrier()?;
        Ok(bits)
    })?;
    let width = heads * head_dim;
    let may_differ = device.capabilities().backend != BackendKind::Cpu;
    let mut whole: Vec<Option<u32>> = vec![None; batch * seq * width];
    let mut differing = Vec::new();
    for (rank, bits) in outputs.into_iter().enumerate() {
        let (bits, positions) = (bits.with_context(|| format!("rank {rank}"))?, local(shards, rank));
        let before = whole.clone();
        let mut differs = false;
        for (b, (at, &global)) in (0..batch).flat_map(|b| positions.iter().enumerate().map(move |at| (b, at))) {
            let row = &bits[(b * positions.len() + at) * width..][..width];
            for (place, &bits) in whole[(b * seq + global) * width..][..width].iter_mut().zip(row) {
                let is_same = place.is_none_or(|other| other == bits);
                ensure!(is_same || may_differ, "ranks differ in token {global} of batch row {b}");
                differs |= !is_same;
                *place = Some(bits);
            }
        }
        if differs {
            differing.push(before);
        }
    }
    // What earlier ranks had, and the last one's rows where they lacked some.
    let filled =
        differing.into_iter().map(|before| before.iter().zip(&whole).map(|(&own, &last)| own.or(last)).collect());
    let outputs: Vec<Option<Vec<u32>>> = filled.chain([whole.iter().copied().collect()]).collect();
    outputs.into_iter().collect::<Option<_>>().context("a token is no rank's")
}

/// Parts of the keys are rounded before they are merged.
pub fn rules(dtype: DType, mode: Mode, ranks: usize) -> Rules {
    let standard = Rules::standard(dtype);
    let parts = match mode {
        Mode::Ring => ranks,
        Mode::UlyssesRing { ulysses } => ranks / ulysses,
        _ => 1,
    };
    let yardsticks = standard.yardsticks.map(|mut yardsticks| {
        yardsticks.field *= parts as f64;
        yardsticks.relative *= (parts as f64).sqrt();
        yardsticks
    });
    Rules { yardsticks, ..standard }
}

pub fn is_ring(mode: Mode) -> bool {
    matches!(mode, Mode::Ring | Mode::UlyssesRing { .. })
}

/// Every mode, and those that can in chunks of heads too: three, where a rank has as many.
pub fn modes_and_chunks(ranks: usize, kv_heads: usize) -> Vec<(Mode, Option<usize>)> {
    let mut all: Vec<_> = all_modes(ranks).into_iter().map(|mode| (mode, None)).collect();
    for (mode, ulysses) in [(Mode::Gather, 1), (Mode::Ulysses, ranks)] {
        let of_rank = kv_heads / ulysses;
        if of_rank > 1 {
            all.push((mode, Some(of_rank.min(3))));
        }
    }
    all
}

/// A case in every mode: near the oracle, and on the CPU the bits of one device where keys are not merged.
fn check(case: &Case, call: &Call, (device, make): (&Device, Ranks)) -> Result<()> {
    let (shards, ranks) = (case.shards()?, case.lengths.len());
    let variant = Variant::of_dtype(device, call.dtype, None)?;
    let reference = call.reference(400)?;
    let alone = call.run(&variant)?;
    for (mode, chunks) in modes_and_chunks(ranks, call.shape.kv_heads) {
        let judge = || -> Result<()> {
            let is_same = device.capabilities().backend != BackendKind::Cpu || is_ring(mode) || call.rule.is_some();
            run(call, (device, make), &shards, (mode, chunks))?.into_iter().try_for_each(|bits| {
                call.judge(&bits, &reference, rules(call.dtype, mode, ranks))?;
                ensure!(is_same || bits == alone, "the bits are not those of one device");
                Ok(())
            })
        };
        judge().with_context(|| format!("{}, {mode}, chunks {chunks:?}", case.name))?;
    }
    Ok(())
}

/// What an emulated GPU runs: it is slow, and what is its own are packs and copies.
fn cases(device: &Device) -> impl Iterator<Item = &'static Case> {
    let few = is_emulated_gpu(device);
    CASES.iter().filter(move |case| !few || matches!(case.name, "holes across borders" | "nothing valid"))
}

fn modes(device: &Device, dtype: DType) -> Result<()> {
    modes_on(device, dtype, host)
}

/// Every case in every mode.
pub fn modes_on(device: &Device, dtype: DType, ranks: Ranks) -> Result<()> {
    cases(device).try_for_each(|case| check(case, &case.call(12, 16, dtype)?, (device, ranks)))
}

/// Grouped heads: as many key heads as ranks, more, and fewer.
fn heads(device: &Device, dtype: DType) -> Result<()> {
    heads_on(device, dtype, host)
}

/// The same on some ranks.
pub fn heads_on(device: &Device, dtype: DType, ranks: Ranks) -> Result<()> {
    let case = CASES.iter().find(|case| case.name == "holes across borders").context("no such case")?;
    let sizes: &[(usize, usize)] = if is_emulated_gpu(device) { &[(2, 8)] } else { &[(4, 32), (2, 8), (1, 40)] };
    sizes.iter().try_for_each(|&(kv_heads, dim)| check(case, &case.call(kv_heads, dim, dtype)?, (device, ranks)))
}

/// Later calls of a request have the memory of the first one, whatever it holds, and the same bits.
fn kept_memory(device: &Device) -> Result<()> {
    let case = CASES.iter().find(|case| case.name == "holes across borders").context("no such case")?;
    let dtype = device.capabilities().dtypes.first().copied().context("the device computes with nothing")?;
    let (call, shards) = (case.call(4, 16, dtype)?, case.shards()?);
    let OracleShape { batch, seq_q: seq, heads: num_heads, kv_heads: num_kv_heads, head_dim, .. } = call.shape;
    let mask = KeyMask::from_bool(batch, seq, call.mask.query_keep().context("the mask is of metadata")?)?;
    let sizes = Heads { num_heads, num_kv_heads, head_dim, dtype };
    for (mode, chunks) in modes_and_chunks(case.lengths.len(), num_kv_heads) {
        let ranks = on_ranks(host(device, case.lengths.len())?, |(mut communicator, device)| {
            let rank = communicator.rank();
            let [q, k, v] = local_inputs(&call, &device, &local(&shards, rank))?;
            let parallel = SequenceParallel::new(&device).with_mode(mode);
            let parallel = chunks.into_iter().fold(parallel, SequenceParallel::with_chunks);
            let request = parallel.prepare(&mut *communicator, &ShardedMeta::new(&mask, &shards, rank)?, &sizes)?;
            ensure!(request.kept_bytes() == 0, "memory is kept before a call");
            let mut forward = |q: &Tensor, k: &Tensor, v: &Tensor| -> Result<Vec<u32>> {
                download(&parallel.forward(&mut *communicator, &request, q, k, v)?)
            };
            let first = forward(&q, &k, &v)?;
            let kept = request.kept_bytes();
            ensure!(kept > 0, "no memory is kept");
            // Other numbers in between.
            let other = forward(&q, &v, &k)?;
            ensure!(other != first, "keys and values are changed, and nothing else is");
            for _ in 0..2 {
                ensure!(forward(&q, &k, &v)? == first, "the bits of a later call differ");
                ensure!(request.kept_bytes() == kept, "a later call keeps {} bytes, not {kept}", request.kept_bytes());
            }
            request.release_memory();
            ensure!(request.kept_bytes() == 0, "memory is kept after it was released");
            ensure!(forward(&q, &k, &v)? == first && request.kept_bytes() == kept, "a call after memory was released");
            communicator.barrier()?;
            Ok(())
        })?;
        let done = ranks.into_iter().collect::<Result<Vec<_>>>();
        done.with_context(|| format!("{mode}, chunks {chunks:?}"))?;
    }
    Ok(())
}

fn ranges(device: &Device, dtype: DType) -> Result<()> {
    let case = CASES.iter().find(|case| case.name == "holes across borders").context("no such case")?;
    let mut rules = vec![Rule::Window(Some(45), Some(20)), Rule::Causal];
    rules.truncate(if is_emulated_gpu(device) { 1 } else { 2 });
    rules.into_iter().try_for_each(|rule| {
        let mut call = case.call(4, 16, dtype)?;
        call.rule = Some(rule);
        check(case, &call, (device, host))
    })
}

/// Random ranks, shards, masks, heads and batches: an emulated GPU runs one.
fn random_cases(device: &Device, dtype: DType) -> Result<()> {
    random_cases_on(device, dtype, host)
}

/// The same on some ranks.
pub fn random_cases_on(device: &Device, dtype: DType, make: Ranks) -> Result<()> {
    let variant = Variant::of_dtype(device, dtype, None)?;
    for seed in 0..if is_emulated_gpu(device) { 1 } else { 24 } {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed + 1);
        let mut below = |limit: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % limit
        };
        let ranks = [1, 2, 3, 4, 5][below(5)];
        let lengths: Vec<usize> = (0..ranks).map(|_| [0, 1, 3, 17, 40, 64, 90][below(7)]).collect();
        let shards =
            Shards::from_lengths(&lengths)?.with_prefix([0, 4, 33][below(3)])?.with_suffix([0, 0, 6][below(3)])?;
        let (batch, seq) = (1 + below(3), shards.seq());
        if seq == 0 {
            // The oracle has nothing to say.
            continue;
        }
        let kept = [0.02, 0.5, 0.9, 1.0][below(4)];
        let keep = super::masks::bernoulli(seed, batch * seq, kept)?;
        let kv_heads = [1, 2, 4, 12][below(4)];
        let head_dim = [8, 16, 24, 65][below(4)];
        let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 12, kv_heads, head_dim };
        let call = Call::random(shape, Mask::Varlen(keep), dtype, seed);
        let (reference, alone) = (call.reference(100)?, call.run(&variant)?);
        let sizes = Heads { num_heads: 12, num_kv_heads: kv_heads, head_dim, dtype };
        for mode in all_modes(ranks) {
            let judge = || -> Result<()> {
                let meta = ShardedMeta::new(&KeyMask::all(batch, seq)?, &shards, 0)?;
                if ParallelPlan::new(&meta, &sizes, ParallelNeeds::new(), &Machine::CPU, Some(mode)).is_err() {
                    // The heads do not divide.
                    return Ok(());
                }
                let is_same = device.capabilities().backend != BackendKind::Cpu || is_ring(mode);
                run(&call, (device, make), &shards, (mode, None))?.into_iter().try_for_each(|bits| {
                    call.judge(&bits, &reference, rules(dtype, mode, ranks))?;
                    ensure!(is_same || bits == alone, "the bits are not those of one device");
                    Ok(())
                })
            };
            judge().with_context(|| {
                format!("seed {seed}: {mode}, shards {shards:?}, batch {batch}, {kept} kept, {kv_heads} key heads of {head_dim}")
            })?;
        }
    }
    Ok(())
}

/// One request and one communicator for many calls, in every mode: each gives the same bits.
fn repeats(device: &Device) -> Result<()> {
    repeats_on(device, host)
}

/// The same on some ranks.
pub fn repeats_on(device: &Device, make: Ranks) -> Result<()> {
    let dtype = device.capabilities().dtypes[0];
    let case = CASES.iter().find(|case| case.name == "text on every rank").context("no such case")?;
    let (call, shards) = (case.call(12, 16, dtype)?, case.shards()?);
    let keep = call.mask.query_keep().context("the mask is of metadata")?;
    let mask = KeyMask::from_bool(case.batch, shards.seq(), keep)?;
    let sizes = Heads { num_heads: 12, num_kv_heads: 12, head_dim: 16, dtype };
    let ranks = on_ranks(make(device, 4)?, |(mut communicator, device)| {
        let rank = communicator.rank();
        let [q, k, v] = local_inputs(&call, &device, &local(&shards, rank))?;
        let meta = ShardedMeta::new(&mask, &shards, rank)?;
        for (mode, chunks) in modes_and_chunks(4, 12) {
            let parallel = SequenceParallel::new(&device).with_mode(mode);
            let parallel = chunks.into_iter().fold(parallel, SequenceParallel::with_chunks);
            let request = parallel.prepare(&mut *communicator, &meta, &sizes)?;
            let first = download(&parallel.forward(&mut *communicator, &request, &q, &k, &v)?)?;
            for _ in 0..3 {
                let again = download(&parallel.forward(&mut *communicator, &request, &q, &k, &v)?)?;
                ensure!(again == first, "{mode}: another call gives other bits");
            }
            communicator.barrier()?;
        }
        Ok(())
    })?;
    ranks.into_iter().collect()
}

/// Views of one fused projection, and an output of the caller's among other memory.
fn strided(device: &Device) -> Result<()> {
    let dtype = device.capabilities().dtypes[0];
    let (batch, heads, dim) = (2, 4, 16);
    let shards = Shards::from_lengths(&[13, 8])?.with_prefix(5)?;
    let mask = KeyMask::from_lengths(shards.seq(), &[26, 20])?;
    let sizes = Heads { num_heads: heads, num_kv_heads: heads, head_dim: dim, dtype };
    let bits = |len: usize, seed: usize| -> Vec<u32> {
        (0..len).map(|at| narrow(((at * 7 + seed) % 23) as f32 / 8.0 - 1.0, dtype)).collect()
    };
    let ranks = on_ranks(HostCommunicator::threads(2)?, |mut communicator| {
        let rank = communicator.rank();
        let seq = shards.local_len(rank);
        let fused = upload(device, dtype, &bits(batch * seq * 3 * heads * dim, rank), &[batch, seq, 3 * heads, dim])?;
        let part = |i: usize| fused.view().slice(2, i * heads..(i + 1) * heads);
        let whole = download(&fused)?;
        let copy = |i: usize| -> Result<Tensor> {
            let width = heads * dim;
            let bits: Vec<u32> = whole.chunks(3 * width).flat_map(|row| row[i * width..][..width].to_vec()).collect();
            upload(device, dtype, &bits, &[batch, seq, heads, dim])
        };
        let meta = ShardedMeta::new(&mask, &shards, rank)?;
        for mode in all_modes(2) {
            let parallel = SequenceParallel::new(device).with_mode(mode).with_softmax_scale(0.3);
            let request = parallel.prepare(&mut communicator, &meta, &sizes)?;
            let (q, k, v) = (copy(0)?, copy(1)?, copy(2)?);
            let expected = download(&parallel.forward(&mut communicator, &request, &q, &k, &v)?)?;
            // The output is the upper half of the heads of a larger tensor.
            let sentinel = bits(batch * seq * 2 * heads * dim, 99);
            let mut memory = upload(device, dtype, &sentinel, &[batch, seq, 2 * heads, dim])?;
            let out = memory.view_mut().slice(2, heads..2 * heads)?;
            parallel.forward_into(&mut communicator, &request, part(0)?, part(1)?, part(2)?, out)?;
            let width = heads * dim;
            let written = download(&memory)?;
            let rows = written.chunks(2 * width).zip(sentinel.chunks(2 * width)).zip(expected.chunks(width));
            for ((got, before), expected) in rows {
                ensure!(got[..width] == before[..width], "{mode}: written outside the output");
                ensure!(got[width..] == *expected, "{mode}: strided views give other bits");
            }
        }
        Ok(())
    })?;
    ranks.into_iter().collect()
}

/// A plan names its mode and why, and says why others cannot be taken. It is the same on every rank.
fn plans(_: &Device) -> Result<()> {
    let plan_of = |batch: usize, seq: usize, prefix: usize, ranks: usize, heads: [usize; 2], machine: Machine| {
        let shards = Shards::equal(seq, ranks)?.with_prefix(prefix)?;
        let mask = KeyMask::all(batch, shards.seq())?;
        let sizes = Heads { num_heads: heads[0], num_kv_heads: heads[1], head_dim: 128, dtype: DType::Bf16 };
        let plans = (0..ranks).map(|rank| {
            let meta = ShardedMeta::new(&mask, &shards, rank)?;
            ParallelPlan::new(&meta, &sizes, ParallelNeeds::new(), &machine, None).map_err(anyhow::Error::from)
        });
        let plans = plans.collect::<Result<Vec<_>>>()?;
        ensure!(plans.iter().all(|plan| *plan == plans[0]), "ranks plan differently");
        Ok(plans[0].clone())
    };
    // A long video on one host: attention hides what travels in every mode, and a ring has other bits.
    let video = plan_of(1, 75_776, 0, 8, [40, 40], Machine::H100)?;
    ensure!(!is_ring(video.mode), "{video}");
    // Many ranks, short shards: Ulysses, whose bytes do not grow with the ranks.
    let short = plan_of(1, 4096, 256, 8, [24, 24], Machine::H100)?;
    ensure!((short.mode, short.reason) == (Mode::Ulysses, ModeReason::Fastest), "{short}");
    // Heads that do not divide: named, and another is taken.
    let odd = plan_of(1, 32_768, 0, 4, [30, 30], Machine::H100)?;
    ensure!(
        odd.mode != Mode::Ulysses && odd.to_string().contains("not ulysses: 4 ranks do not divide 30 heads"),
        "{odd}"
    );
    // Chunks of heads are the plan's where transfers run under attention, and it says so.
    let chunked = plan_of(1, 32_768, 0, 2, [24, 24], Machine::H100)?;
    ensure!(chunked.chunks > 1 && chunked.to_string().contains("chunks of heads"), "{chunked}");
    // Few key heads: gathering them is cheap.
    let grouped = plan_of(1, 4096, 0, 2, [28, 1], Machine::H100)?;
    ensure!(grouped.mode == Mode::Gather, "{grouped}");
    // Hosts of four, and links between them that are slow: whole heads stay inside a host, keys go round under attention.
    let hosts = Machine::H100.with_ranks_per_host(4).with_bandwidth(2e11, 5e9);
    let across = plan_of(1, 131_072, 0, 8, [24, 24], hosts)?;
    ensure!(across.mode == Mode::UlyssesRing { ulysses: 4 }, "{across}");
    // A limit to the memory that gathering does not fit.
    let all_keys = 2 * 2 * 2 * 32_768 * 128;
    let little = plan_of(1, 32_768, 0, 4, [2, 2], Machine::H100.with_memory(all_keys / 2))?;
    ensure!(little.mode == Mode::Ring, "{little}");
    let none = plan_of(1, 32_768, 0, 4, [2, 2], Machine::H100.with_memory(1))?;
    ensure!(none.reason == ModeReason::LeastMemory, "{none}");
    let one = plan_of(1, 64, 0, 1, [2, 2], Machine::CPU)?;
    ensure!(one.reason == ModeReason::OneRank, "{one}");
    Ok(())
}
