//! What a call of sequence parallelism carries beside one tensor each: segments, a log-sum-exp, a bias, score modifiers; and what modes
//! refuse of it.

use anyhow::{Context, Result, ensure};
use varlen_fa::dist::{
    Communicator, Heads, HostCommunicator, Machine, Mode, ModeReason, ParallelCall, ParallelNeeds, ParallelPlan,
    ParallelRequest, SequenceParallel, ShardedMeta, Shards,
};
use varlen_fa::{
    AttentionOutputs, BackendKind, DType, Device, Error, KeyMask, KeyRanges, ScoreModifiers, Tensor, alibi_slopes,
};
use varlen_fa_testkit::{OracleShape, random};

use super::bias::broadcast;
use super::call::{Call, Mask};
use super::dist::{is_ring, local, local_inputs, modes_and_chunks, on_ranks, rules};
use super::lse;
use super::memory::{download, narrow, precision, sentinel, upload};
use super::modifying::Modifying;
use super::trials::{Trials, Variant, is_emulated_gpu};

pub fn register(trials: &mut Trials) {
    trials.each_dtype("dist/segments", segments);
    trials.each_dtype("dist/lse", log_sum_exp);
    trials.each_kernel_with_bias("dist/bias", bias);
    trials.each_kernel_with_modifiers("dist/modifiers", modifiers);
    trials.once("dist/what_a_mode_cannot", what_a_mode_cannot);
    trials.once("dist/plans_for_needs", plans_for_needs);
    trials.once("dist/requests_for_needs", requests_for_needs);
    trials.once("dist/plans_for_ranges", plans_for_ranges);
    trials.once("dist/scores_that_differ", scores_that_differ);
    trials.once("dist/segments_that_do_not_fit", segments_that_do_not_fit);
}

const RANKS: usize = 4;
/// Text before and after an image.
const PREFIX: usize = 10;
const LENGTHS: [usize; RANKS] = [30, 9, 0, 41];
const SUFFIX: usize = 6;
const BATCH: usize = 2;
const KV_HEADS: usize = 4;

fn shards() -> Result<Shards> {
    Ok(Shards::from_lengths(&LENGTHS)?.with_prefix(PREFIX)?.with_suffix(SUFFIX)?)
}

/// 8 query heads on 4 of keys, with holes in text and image.
fn call(dtype: DType) -> Result<Call> {
    let seq = shards()?.seq();
    let shape = OracleShape { batch: BATCH, seq_q: seq, seq_k: seq, heads: 8, kv_heads: KV_HEADS, head_dim: 16 };
    let keep = super::masks::mask(BATCH, seq, |b, at| !matches!(at, 6..=12 | 36..=44) || b == 1 && at % 3 == 0);
    Ok(Call::random(shape, Mask::Varlen(keep), dtype, 17))
}

/// How the ranks compute.
#[derive(Debug, Clone, Copy)]
struct How {
    mode: Mode,
    chunks: Option<usize>,
}

fn every_way(device: &Device) -> Vec<How> {
    let all = modes_and_chunks(RANKS, KV_HEADS).into_iter().map(|(mode, chunks)| How { mode, chunks });
    // An emulated GPU is slow.
    all.filter(|how| {
        !is_emulated_gpu(device) || how.chunks.is_none() && matches!(how.mode, Mode::Gather | Mode::Ulysses)
    })
    .collect()
}

/// What a call does to the scores.
#[derive(Debug, Clone, Copy)]
enum Scores<'a> {
    AsTheyAre,
    Bias(&'a Tensor),
    Modifiers(&'a ScoreModifiers),
}

/// One rank, before its call.
struct Rank<'a> {
    communicator: HostCommunicator,
    parallel: SequenceParallel,
    request: ParallelRequest,
    call: &'a Call,
    /// Global positions of its tokens.
    positions: Vec<usize>,
}

impl<'a> Rank<'a> {
    fn new(
        device: &Device,
        call: &'a Call,
        How { mode, chunks }: How,
        mut communicator: HostCommunicator,
    ) -> Result<Self> {
        let (shards, rank) = (shards()?, communicator.rank());
        let OracleShape { batch, seq_q: seq, heads: num_heads, kv_heads: num_kv_heads, head_dim, .. } = call.shape;
        let mask = KeyMask::from_bool(batch, seq, call.mask.query_keep().context("the mask is of metadata")?)?;
        let parallel = SequenceParallel::new(device).with_mode(mode);
        let parallel = chunks.into_iter().fold(parallel, SequenceParallel::with_chunks);
        let sizes = Heads { num_heads, num_kv_heads, head_dim, dtype: call.dtype };
        let request = parallel.prepare(&mut communicator, &ShardedMeta::new(&mask, &shards, rank)?, &sizes)?;
        Ok(Self { communicator, parallel, request, call, positions: local(&shards, rank) })
    }

    fn inputs(&self, device: &Device) -> Result<[Tensor; 3]> {
        local_inputs(self.call, device, &self.positions)
    }

    /// The output, as one tensor, and the log-sum-exp.
    fn forward(&mut self, device: &Device, scores: Scores<'_>, with_lse: bool) -> Result<OfRank, Error> {
        let [q, k, v] = self.inputs(device).map_err(unexpected)?;
        let (mut out, mut lse) =
            (self.room(device, self.call.shape).map_err(unexpected)?, self.lse(device).map_err(unexpected)?);
        let outputs = AttentionOutputs::new(&mut out);
        let outputs = if with_lse { outputs.with_lse(&mut lse) } else { outputs };
        let given: ParallelCall<'_> = match scores {
            Scores::AsTheyAre => (&self.request).into(),
            Scores::Bias(bias) => self.request.with_bias(bias),
            Scores::Modifiers(modifiers) => self.request.with_modifiers(modifiers),
        };
        self.parallel.forward_into(&mut self.communicator, given, &q, &k, &v, outputs)?;
        let lse = if with_lse { lse.to_vec::<f32>()? } else { Vec::new() };
        Ok(OfRank { positions: self.positions.clone(), out: download(&out).map_err(unexpected)?, lse })
    }

    fn room(&self, device: &Device, OracleShape { batch, heads, head_dim, .. }: OracleShape) -> Result<Tensor> {
        filled(device, self.call.dtype, &[batch, self.positions.len(), heads, head_dim])
    }

    fn lse(&self, device: &Device) -> Result<Tensor> {
        let OracleShape { batch, heads, .. } = self.call.shape;
        filled(device, DType::F32, &[batch, heads, self.positions.len()])
    }
}

fn unexpected(error: anyhow::Error) -> Error {
    Error::RankLost { operation: "a test", rank: 0, why: format!("{error:#}") }
}

fn filled(device: &Device, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    upload(device, dtype, &vec![sentinel(dtype); shape.iter().product()], shape)
}

/// What one rank came to.
struct OfRank {
    positions: Vec<usize>,
    out: Vec<u32>,
    lse: Vec<f32>,
}

/// The outputs as those of one device, once for each rank: its own rows, and for the others those of the first rank that has them.
fn together(call: &Call, ranks: &[OfRank]) -> Result<Vec<(Vec<u32>, Vec<f32>)>> {
    let OracleShape { batch, seq_q: seq, heads, head_dim, .. } = call.shape;
    let width = heads * head_dim;
    let mut whole = Vec::new();
    for own in ranks {
        let (mut out, mut lse) = (vec![0; batch * seq * width], vec![f32::NAN; batch * heads * seq]);
        let has_lse = !own.lse.is_empty();
        for rank in ranks.iter().rev().chain([own]) {
            let tokens = rank.positions.len();
            for (b, (at, &global)) in (0..batch).flat_map(|b| rank.positions.iter().enumerate().map(move |at| (b, at)))
            {
                let row = &rank.out[(b * tokens + at) * width..][..width];
                out[(b * seq + global) * width..][..width].copy_from_slice(row);
                for head in (0..heads).filter(|_| has_lse) {
                    lse[(b * heads + head) * seq + global] = rank.lse[(b * heads + head) * tokens + at];
                }
            }
        }
        whole.push((out, if has_lse { lse } else { Vec::new() }));
    }
    ensure!(whole.len() == RANKS, "a rank is missing");
    Ok(whole)
}

/// Runs a call on every rank and judges what each came to.
fn check(
    device: &Device,
    call: &Call,
    how: How,
    (with_lse, run): (bool, impl Fn(&mut Rank<'_>) -> Result<OfRank> + Sync),
) -> Result<Vec<Vec<u32>>> {
    let ranks = on_ranks(HostCommunicator::threads(RANKS)?, |communicator| {
        let mut rank = Rank::new(device, call, how, communicator)?;
        let done = run(&mut rank)?;
        rank.communicator.barrier()?;
        Ok(done)
    })?;
    let ranks = ranks.into_iter().collect::<Result<Vec<_>>>()?;
    let (reference, expected_lse) = (call.reference(usize::MAX)?, call.reference_lse()?);
    let mut outputs = Vec::new();
    for (out, lse) in together(call, &ranks)? {
        call.judge(&out, &reference, rules(call.dtype, how.mode, RANKS))?;
        if with_lse {
            lse::judge(&lse, &expected_lse)?;
        }
        outputs.push(out);
    }
    Ok(outputs)
}

/// Text and image each in memory of its own, in several cuts.
fn segments(device: &Device, dtype: DType) -> Result<()> {
    let call = call(dtype)?;
    for how in every_way(device) {
        let run = |is_cut: bool| {
            move |rank: &mut Rank<'_>| -> Result<OfRank> {
                if !is_cut {
                    return Ok(rank.forward(device, Scores::AsTheyAre, false)?);
                }
                let inputs = rank.inputs(device)?;
                let tokens = rank.positions.len();
                let (first, second) = (PREFIX, tokens - SUFFIX);
                let copied = |tensor: &Tensor, place: std::ops::Range<usize>| cut(device, tensor, place);
                let [q, k, v] = &inputs;
                let q = [copied(q, 0..first)?, copied(q, first..second)?, copied(q, second..tokens)?];
                let k = [copied(k, 0..second)?, copied(k, second..tokens)?];
                let OracleShape { batch, heads, head_dim, .. } = rank.call.shape;
                let new = |tokens: usize| filled(device, rank.call.dtype, &[batch, tokens, heads, head_dim]);
                let mut outs = [new(first)?, new(second - first)?, new(tokens - second)?];
                {
                    let [a, b, c] = &mut outs;
                    let Rank { communicator, parallel, request, .. } = &mut *rank;
                    parallel.forward_into(communicator, &*request, q.each_ref(), k.each_ref(), v, [a, b, c])?;
                }
                let width = heads * head_dim;
                let parts = outs.each_ref().map(download);
                let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
                let mut out = Vec::new();
                for b in 0..batch {
                    for (bits, tensor) in parts.iter().zip(&outs) {
                        let row = tensor.shape()[1] * width;
                        out.extend_from_slice(&bits[b * row..][..row]);
                    }
                }
                Ok(OfRank { positions: rank.positions.clone(), out, lse: Vec::new() })
            }
        };
        let judge = || -> Result<()> {
            let (whole, cut) =
                (check(device, &call, how, (false, run(false)))?, check(device, &call, how, (false, run(true)))?);
            let is_same = device.capabilities().backend != BackendKind::Cpu || whole == cut;
            ensure!(is_same, "segments give other bits than one tensor");
            Ok(())
        };
        judge().with_context(|| format!("{how:?}"))?;
    }
    Ok(())
}

/// Some tokens of a tensor, in memory of their own.
fn cut(device: &Device, tensor: &Tensor, place: std::ops::Range<usize>) -> Result<Tensor> {
    let &[batch, seq, heads, dim] = tensor.shape() else { anyhow::bail!("a tensor of another rank") };
    let (bits, width) = (download(tensor)?, heads * dim);
    let rows =
        (0..batch).flat_map(|b| bits[(b * seq + place.start) * width..(b * seq + place.end) * width].iter().copied());
    upload(device, tensor.dtype(), &rows.collect::<Vec<_>>(), &[batch, place.len(), heads, dim])
}

fn log_sum_exp(device: &Device, dtype: DType) -> Result<()> {
    let call = call(dtype)?;
    let gathers = every_way(device).into_iter().filter(|how| how.mode == Mode::Gather);
    for how in gathers {
        let with =
            check(device, &call, how, (true, |rank: &mut Rank<'_>| Ok(rank.forward(device, Scores::AsTheyAre, true)?)));
        let with = with.with_context(|| format!("{how:?}"))?;
        let without = check(
            device,
            &call,
            how,
            (false, |rank: &mut Rank<'_>| Ok(rank.forward(device, Scores::AsTheyAre, false)?)),
        )?;
        ensure!(with == without, "{how:?}: asking for the lse changed the output");
    }
    Ok(())
}

/// Biases of the whole sequence, of every kind of shape.
fn bias(variant: &Variant) -> Result<()> {
    let (device, seq) = (&variant.device, shards()?.seq());
    let full = [BATCH, 8, seq, seq];
    let shapes: [&[usize]; 5] =
        [&[BATCH, 1, 1, seq], &[8, 1, seq], &[1, 1, seq, seq], &[BATCH, 8, seq, seq], &[1, 8, 1, 1]];
    let shapes = if is_emulated_gpu(device) { &shapes[3..4] } else { &shapes[..] };
    for (at, shape) in shapes.iter().enumerate() {
        let of = if at % 2 == 0 { variant.dtype } else { DType::F32 };
        let values = random::normal_rounded(3, at as u64, shape.iter().product(), precision(of));
        let mut call = call(variant.dtype)?;
        call.bias = Some(broadcast(&values, shape, full));
        let bits: Vec<u32> = values.iter().map(|&value| narrow(value, of)).collect();
        for how in every_way(device).into_iter().filter(|how| !is_ring(how.mode)) {
            let has_lse = how.mode == Mode::Gather;
            let run = |rank: &mut Rank<'_>| -> Result<OfRank> {
                rank.parallel = rank.parallel.clone().with_kernel(variant.kernel);
                let tensor = upload(device, of, &bits, shape)?;
                Ok(rank.forward(device, Scores::Bias(&tensor), has_lse)?)
            };
            check(device, &call, how, (has_lse, run)).with_context(|| format!("bias {shape:?} of {of}, {how:?}"))?;
        }
    }
    Ok(())
}

/// Numbers of heads: each rank has its own.
fn modifiers(variant: &Variant) -> Result<()> {
    let device = &variant.device;
    let (slopes, sinks) = (Some(alibi_slopes(8)), Some((0..8).map(|head| head as f32 - 3.0).collect::<Vec<_>>()));
    let all = [
        Modifying { softcap: 1.5, ..Modifying::default() },
        Modifying { softcap: 2.0, sinks: sinks.clone(), ..Modifying::default() },
        Modifying { softcap: 1.0, slopes, sinks },
    ];
    for (at, modifying) in all.into_iter().enumerate() {
        let mut call = call(variant.dtype)?;
        call.modifying = modifying;
        let given: ScoreModifiers = call.modifying.modifiers();
        let can = |how: &How| match at {
            0 => true,
            1 => !is_ring(how.mode),
            _ => how.mode == Mode::Ulysses,
        };
        for how in every_way(device).into_iter().filter(can) {
            let has_lse = how.mode == Mode::Gather;
            let run = |rank: &mut Rank<'_>| -> Result<OfRank> {
                rank.parallel = rank.parallel.clone().with_kernel(variant.kernel);
                // Twice: the second call has the values of its heads from the first.
                let first = rank.forward(device, Scores::Modifiers(&given), has_lse)?;
                let second = rank.forward(device, Scores::Modifiers(&given), has_lse)?;
                ensure!(first.out == second.out, "the second call gives other bits");
                Ok(second)
            };
            check(device, &call, how, (has_lse, run)).with_context(|| format!("{:?}, {how:?}", call.modifying))?;
        }
    }
    Ok(())
}

/// Refused on every rank before anything is sent, with the reason.
fn what_a_mode_cannot(device: &Device) -> Result<()> {
    let dtype = device.capabilities().dtypes[0];
    let call = call(dtype)?;
    let (seq, modifiers) = (shards()?.seq(), ScoreModifiers::new());
    let slopes = modifiers.clone().with_alibi(alibi_slopes(8));
    let sinks = modifiers.clone().with_sinks([0.5; 8]);
    let few = modifiers.with_sinks([0.5; 7]);
    let zeros = Tensor::zeros(device, DType::F32, &[1, 1, 1, seq])?;
    let short = Tensor::zeros(device, DType::F32, &[1, 1, 1, seq - 1])?;
    let (ring, both) = (Mode::Ring, Mode::UlyssesGather { ulysses: 2 });
    let cases = [
        (Mode::Ulysses, true, Scores::AsTheyAre, "`lse`: a log-sum-exp in the mode ulysses"),
        (ring, true, Scores::AsTheyAre, "`lse`: a log-sum-exp in the mode ring"),
        (ring, false, Scores::Bias(&zeros), "`bias`: a bias in the mode ring"),
        (ring, false, Scores::Modifiers(&sinks), "`sinks`: sinks in the mode ring"),
        (both, false, Scores::Modifiers(&slopes), "`alibi`: ALiBi in the mode ulysses-gather:2"),
        (Mode::Gather, false, Scores::Modifiers(&slopes), "`alibi`: ALiBi in the mode gather"),
        (Mode::Gather, false, Scores::Modifiers(&few), "a number for each of 8 query heads"),
        (Mode::Gather, false, Scores::Bias(&short), "`bias`"),
    ];
    for (mode, with_lse, scores, expected) in cases {
        let errors = on_ranks(HostCommunicator::threads(RANKS)?, |communicator| {
            let mut rank = match Rank::new(device, &call, How { mode, chunks: None }, communicator) {
                Ok(rank) => rank,
                // Another rank may be refused before this one has heard that all agree.
                Err(error) => return Ok(Some(error.downcast::<Error>()?)),
            };
            Ok(rank.forward(device, scores, with_lse).err())
        })?;
        for error in errors {
            let error = error?.map(|error| error.to_string()).unwrap_or_default();
            ensure!(error.contains(expected), "{mode}: expected {expected}, got {error}");
        }
    }
    Ok(())
}

/// A plan that is told what calls carry takes the best mode that computes it, and says which do not and why.
fn plans_for_needs(_: &Device) -> Result<()> {
    // Of a long video; and of few heads, with memory for the keys that a ring has at once.
    let plan = |ranks: usize, heads: usize, needs: ParallelNeeds, forced| {
        let (seq, machine) = match heads {
            2 => (32_768, Machine::H100.with_memory(2 * 2 * 32_768 * 128)),
            _ => (75_776, Machine::H100),
        };
        let shards = Shards::equal(seq, ranks)?;
        let meta = ShardedMeta::new(&KeyMask::all(1, seq)?, &shards, 0)?;
        let heads = Heads { num_heads: heads, num_kv_heads: heads, head_dim: 128, dtype: DType::Bf16 };
        ParallelPlan::new(&meta, &heads, needs, &machine, forced)
    };
    let (none, kinds) = (ParallelNeeds::new(), ScoreModifiers::new());
    let alibi = none.with_modifiers(&kinds.clone().with_alibi([1.0]));
    let sinks = none.with_modifiers(&kinds.clone().with_sinks([1.0]));
    let softcap = none.with_modifiers(&kinds.with_softcap(30.0));
    // Which modes compute it, and what of others a plan says.
    type Computes = fn(Mode) -> bool;
    let all: [(ParallelNeeds, Computes, &str); 5] = [
        (softcap, |_| true, ""),
        (none.with_bias(), |mode| !is_ring(mode), "a bias: a ring computes packed rows"),
        (sinks, |mode| !is_ring(mode), "sinks: a ring would count them"),
        (alibi, |mode| mode == Mode::Ulysses, "ALiBi: it counts positions"),
        (none.with_lse(), |mode| mode == Mode::Gather, "a log-sum-exp: a rank has that"),
    ];
    ensure!(is_ring(plan(4, 2, none, None)?.mode), "memory for a ring alone, and no ring");
    let mut counts = [0; 2];
    for (ranks, heads) in [(2, 24), (8, 40), (16, 80), (4, 2)] {
        let free = plan(ranks, heads, none, None)?;
        for (needs, computes, why) in all {
            let told = match plan(ranks, heads, needs, None) {
                // No mode of 4 ranks has the positions of the whole sequence with 2 heads.
                Err(Error::NotApplicable { argument: "needs", .. }) if (needs, heads) == (alibi, 2) => continue,
                told => told.with_context(|| format!("{needs} of {ranks} ranks"))?,
            };
            let is_free = computes(free.mode);
            counts[usize::from(is_free)] += 1;
            ensure!(computes(told.mode), "{needs}: {told}");
            ensure!(is_free == (told.mode == free.mode), "{needs}: {told}; without: {free}");
            ensure!(is_free == (told.reason != ModeReason::Needs), "{needs}: {told}");
            for (mode, estimate) in &told.candidates {
                let of_heads = free.candidates.iter().find(|(of, _)| of == mode).context("another mode")?.1.clone();
                let is_right = match estimate {
                    Ok(_) => computes(*mode) && *estimate == of_heads,
                    Err(says) if of_heads.is_ok() => {
                        !computes(*mode) && says.contains(why) && told.to_string().contains(says)
                    }
                    Err(_) => *estimate == of_heads,
                };
                ensure!(is_right, "{needs}: {mode} in {told}");
            }
        }
    }
    ensure!(counts.iter().all(|&count| count > 3), "{counts:?} plans that needs change, and do not");
    ensure!(plan(1, 40, alibi.with_lse(), None)?.reason == ModeReason::OneRank, "one rank computes anything");
    let refused = |ranks, heads, needs, forced, expected: &str| -> Result<()> {
        match plan(ranks, heads, needs, forced) {
            Err(error @ Error::NotApplicable { .. }) if error.to_string().contains(expected) => Ok(()),
            other => anyhow::bail!("{needs}: expected {expected}, got {other:?}"),
        }
    };
    refused(8, 42, alibi, None, "ulysses: 8 ranks do not divide 42 heads")?;
    refused(8, 40, alibi.with_lse(), None, "`needs`: ALiBi, a log-sum-exp")?;
    refused(8, 40, sinks, Some(Mode::Ring), "`sinks`: sinks in the mode ring")
}

/// Requests that were told what calls carry compute it, though another mode would be chosen; ranks that were told other
/// things differ.
fn requests_for_needs(device: &Device) -> Result<()> {
    let dtype = device.capabilities().dtypes[0];
    let (call, shards) = (call(dtype)?, shards()?);
    let OracleShape { batch, seq_q: seq, heads: num_heads, kv_heads: num_kv_heads, head_dim, .. } = call.shape;
    let mask = KeyMask::from_bool(batch, seq, call.mask.query_keep().context("the mask is of metadata")?)?;
    let sizes = Heads { num_heads, num_kv_heads, head_dim, dtype };
    let prepare = |communicator: &mut HostCommunicator, needs: ParallelNeeds| {
        let meta = ShardedMeta::new(&mask, &shards, communicator.rank())?;
        SequenceParallel::new(device).with_needs(needs).prepare(communicator, &meta, &sizes)
    };
    let alibi = ScoreModifiers::new().with_alibi(alibi_slopes(8));
    let needs = ParallelNeeds::new();
    for (needs, mode) in [(needs.with_lse(), Mode::Gather), (needs.with_modifiers(&alibi), Mode::Ulysses)] {
        let modes = on_ranks(HostCommunicator::threads(RANKS)?, |mut communicator| {
            let request = prepare(&mut communicator, needs)?;
            communicator.barrier()?;
            Ok(request.plan().mode)
        })?;
        for of_rank in modes {
            ensure!(of_rank? == mode, "{needs} is not computed by {mode}");
        }
    }
    let errors = on_ranks(HostCommunicator::threads(RANKS)?, |mut communicator| {
        let needs = if communicator.rank() == 2 { needs.with_bias() } else { needs };
        Ok(prepare(&mut communicator, needs).err())
    })?;
    let errors = errors.into_iter().collect::<Result<Vec<_>>>()?;
    ensure!(errors.iter().any(|error| matches!(error, Some(Error::RanksDiffer { .. }))), "{errors:?}");
    ensure!(errors.iter().all(Option::is_some), "{errors:?}");
    Ok(())
}

/// A plan counts the pairs that ranges leave: under a causal mask the last shard has more of them than the others, unless ranks
/// share heads.
fn plans_for_ranges(_: &Device) -> Result<()> {
    let (ranks, prefix, length) = (4, 96, 1000);
    let shards = Shards::from_lengths(&[length; 4])?.with_prefix(prefix)?;
    let seq = shards.seq();
    let keep = super::masks::mask(2, seq, |b, at| at % 5 != 3 && (b == 1 || at < 2500));
    let ranges = KeyRanges::causal([2, seq, seq])?;
    let meta = ShardedMeta::new(&KeyMask::from_bool(2, seq, &keep)?, &shards, 0)?.with_ranges(&ranges)?;
    let heads = Heads { num_heads: 8, num_kv_heads: 8, head_dim: 64, dtype: DType::F32 };
    let plan = ParallelPlan::new(&meta, &heads, ParallelNeeds::new(), &Machine::CPU, None)?;
    let seconds = |mode: Mode| {
        let found = plan.candidates.iter().find(|(of, _)| *of == mode);
        found.and_then(|(_, estimate)| Some(estimate.as_ref().ok()?.attention)).context("the plan has no such mode")
    };
    // By hand: a query and a key before it or itself, in the same batch row, both kept.
    let pairs = |queries: &dyn Fn(usize) -> bool| -> f64 {
        let mut pairs = 0_u64;
        for row in keep.chunks(seq) {
            let mut keys = 0;
            for (at, &kept) in row.iter().enumerate() {
                keys += u64::from(kept);
                pairs += if kept && queries(at) { keys } else { 0 };
            }
        }
        pairs as f64
    };
    let of_head = |pairs: f64| 4.0 * pairs * 64.0 / Machine::CPU.flops;
    let of_rank = |rank: usize| pairs(&|at| at < prefix || shards.shard(rank).contains(&at));
    let most = (0..ranks).map(of_rank).fold(0.0, f64::max);
    let expected = [(Mode::Gather, 8.0 * of_head(most)), (Mode::Ulysses, 2.0 * of_head(pairs(&|_| true)))];
    for (mode, expected) in expected {
        let got = seconds(mode)?;
        ensure!((got / expected - 1.0).abs() < 1e-9, "{mode}: {got} s of attention, expected {expected}");
    }
    Ok(())
}

/// One rank gives other numbers than the others, or none: an error on every rank.
fn scores_that_differ(device: &Device) -> Result<()> {
    let dtype = device.capabilities().dtypes[0];
    let (call, seq) = (call(dtype)?, shards()?.seq());
    let (cap, other) = (ScoreModifiers::new().with_softcap(2.0), ScoreModifiers::new().with_softcap(3.0));
    let bias = Tensor::zeros(device, DType::F32, &[1, 1, 1, seq])?;
    let cases = [
        (Scores::Modifiers(&cap), Scores::Modifiers(&other)),
        (Scores::Modifiers(&cap), Scores::AsTheyAre),
        (Scores::Bias(&bias), Scores::AsTheyAre),
    ];
    for (scores, of_rank_1) in cases {
        let errors = on_ranks(HostCommunicator::threads(RANKS)?, |communicator| {
            let scores = if communicator.rank() == 1 { of_rank_1 } else { scores };
            let mut rank = match Rank::new(device, &call, How { mode: Mode::Gather, chunks: None }, communicator) {
                Ok(rank) => rank,
                // Another rank may be refused before this one has heard that all agree.
                Err(error) => return Ok(Some(error.downcast::<Error>()?)),
            };
            Ok(rank.forward(device, scores, false).err())
        })?;
        let errors = errors.into_iter().collect::<Result<Vec<_>>>()?;
        ensure!(errors.iter().any(|error| matches!(error, Some(Error::RanksDiffer { .. }))), "{errors:?}");
        ensure!(errors.iter().all(Option::is_some), "{errors:?}");
    }
    Ok(())
}

/// Segments that meet elsewhere than the parts of a rank's tokens.
fn segments_that_do_not_fit(device: &Device) -> Result<()> {
    let dtype = device.capabilities().dtypes[0];
    let call = call(dtype)?;
    let errors = on_ranks(HostCommunicator::threads(RANKS)?, |communicator| {
        let mut rank = match Rank::new(device, &call, How { mode: Mode::Gather, chunks: None }, communicator) {
            Ok(rank) => rank,
            // Another rank may be refused before this one has heard that all agree.
            Err(error) => return Ok(Some(error.downcast::<Error>()?)),
        };
        let ([q, k, v], tokens) = (rank.inputs(device)?, rank.positions.len());
        let halves = [cut(device, &k, 0..PREFIX - 1)?, cut(device, &k, PREFIX - 1..tokens)?];
        let Rank { communicator, parallel, request, .. } = &mut rank;
        Ok(parallel.forward(communicator, &*request, &q, halves.each_ref(), &v).err())
    })?;
    for error in errors {
        let error = error?.map(|error| error.to_string()).unwrap_or_default();
        ensure!(error.contains("meet where prefix, shard and suffix do") && error.contains("`k`"), "{error}");
    }
    Ok(())
}
