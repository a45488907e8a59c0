//! The plan's regret: the time of its choice over that of the best choice of all that can be forced, on random calls.
//!
//! ```text
//! cargo bench --bench regret -- --device wgpu --seed 1 --count 60
//! ```
//!
//! `benches/peers/regret.py` times CUDA by graphs, beside pack → FlashAttention-3 → scatter.

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Serialize;
use varlen_fa::{
    AttentionMask, BackendKind, Device, DeviceChoice, Element, Error, Kernel, KeyMask, MaskedAttention, Path, Tensor,
    Tiling, VarlenMeta, bf16, f16,
};
use varlen_fa_testkit::random::Draws;

use crate::arguments::{ElementType, RoundArguments, parse_device};
use crate::random::tensor;
use crate::report::Report;
use crate::sizes::Sizes;
use crate::times::{in_turns, milliseconds, repeats_of};

/// Paths that a call with metadata can take.
const PATHS: [Path; 3] = [Path::Dense, Path::Fused, Path::Packed];

/// The least time of one measurement on the CPU.
const SAMPLE: Duration = Duration::from_millis(4);

/// Time the plan's choice of path and kernel against every other choice, on random calls.
#[derive(Debug, Args)]
pub struct Arguments {
    /// cuda, cuda:N, wgpu or cpu [default: VARLEN_FA_DEVICE, or the best one present]
    #[arg(long, value_name = "DEVICE", value_parser = parse_device)]
    device: Option<DeviceChoice>,
    /// Element type of q, k, v and the output [default: f32 on the cpu device, f16 elsewhere]
    #[arg(long, value_name = "TYPE")]
    dtype: Option<ElementType>,
    /// Which random calls
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,
    /// How many
    #[arg(long, value_name = "N", default_value = "200")]
    count: NonZeroUsize,
    /// Begin no call after so many seconds
    #[arg(long, value_name = "N", default_value = "600")]
    seconds: u64,
    #[command(flatten)]
    rounds: RoundArguments,
    /// Also write one JSON object a line to FILE; `-` is standard output, and the text then goes to standard error
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs it and writes the report.
///
/// # Errors
/// The device is refused, a call fails, or two choices differ in what they compute.
pub fn run(arguments: &Arguments, sizes: Sizes) -> Result<()> {
    let device = match arguments.device {
        Some(choice) => Device::new(choice)?,
        None => Device::from_env()?,
    };
    let element_type = arguments.dtype.unwrap_or_else(|| ElementType::default_on(device.capabilities()));
    match element_type {
        ElementType::F32 => run_in::<f32>(arguments, sizes, &device),
        ElementType::F16 => run_in::<f16>(arguments, sizes, &device),
        ElementType::Bf16 => run_in::<bf16>(arguments, sizes, &device),
    }
}

fn run_in<T: Element + Into<f32>>(arguments: &Arguments, sizes: Sizes, device: &Device) -> Result<()> {
    let (start, limit) = (Instant::now(), Duration::from_secs(arguments.seconds));
    let (_, rounds) = arguments.rounds.of_run(sizes, &[], &[]);
    let count = if sizes == Sizes::Smoke { 2 } else { arguments.count.get() as u64 };
    let size = if device.capabilities().is_software { &SMALL } else { &LARGE };
    let mut report = Report::new(arguments.json.as_deref())?;
    writeln!(report.text, "{}, {}, seed {}, {rounds} rounds", device.capabilities(), T::DTYPE, arguments.seed)?;
    let capabilities = device.capabilities();
    let (multiprocessors, dtype) = (capabilities.modelled_multiprocessors(), T::DTYPE.to_string());
    report.json(&Header { facts: Facts { device: device.name().to_owned(), multiprocessors, dtype } })?;
    let mut records = Vec::new();
    for number in 0..count {
        if start.elapsed() > limit {
            writeln!(report.text, "{} of {count} calls: {} s are over", number, arguments.seconds)?;
            break;
        }
        let call = RandomCall::new(&mut Draws::new(arguments.seed, number), number, size);
        let record = call.time::<T>(device, rounds).with_context(|| call.title())?;
        if let Some(record) = record {
            writeln!(report.text, "{:.3}  {:<26} {}", record.regret, record.chosen, record.title)?;
            report.json(&record)?;
            records.push(record);
        }
    }
    summarize(&mut report, records)
}

/// How large calls are.
struct Size {
    /// Tokens of the batch, from and to.
    tokens: [f64; 2],
    shortest: usize,
    heads: &'static [usize],
    head_dims: &'static [usize],
    /// The widest row of q, in elements.
    width: usize,
}

/// Calls of transformers on GPUs.
const LARGE: Size = Size {
    tokens: [1e3, 12e3],
    shortest: 64,
    heads: &[4, 8, 12, 16, 20, 24, 32],
    head_dims: &[64, 64, 64, 72, 96, 128, 128, 128, 192, 256],
    width: 4096,
};

/// Calls that a few processor cores compute in milliseconds.
const SMALL: Size =
    Size { tokens: [100.0, 1500.0], shortest: 16, heads: &[1, 2, 4, 6], head_dims: &[32, 64, 64, 128], width: 512 };

/// How the valid tokens of a row lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Full,
    Prefix,
    Left,
    Joint,
    Holes,
    Runs,
    Random,
}

const KINDS: [Kind; 7] = [Kind::Full, Kind::Prefix, Kind::Left, Kind::Joint, Kind::Holes, Kind::Runs, Kind::Random];

/// Which of the `[batch, seq]` tokens are valid.
struct Side {
    seq: usize,
    keep: Vec<bool>,
}

impl Side {
    fn new(draws: &mut Draws, kind: Kind, batch: usize, seq: usize) -> Self {
        let (shortest, text) =
            (draws.pick(&[0.05, 0.25, 0.5, 0.8]).unwrap_or(0.5), 1 + draws.below(seq.div_ceil(2).min(512)));
        let (step, gap, longest) =
            (16 + draws.below(113), 1.0 + draws.below(256) as f64, draws.uniform(1.0, 9.0).exp2());
        let share = draws.pick(&[0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95]).unwrap_or(0.5);
        let mut keep = Vec::with_capacity(batch * seq);
        for _ in 0..batch {
            let least = ((seq as f64 * shortest) as usize).max(1);
            let (length, of_text, at) =
                (least + draws.below(seq - least + 1), 1 + draws.below(text), draws.below(step));
            let (mut is_in_run, mut ends) = (false, draws.below(gap as usize + 1));
            keep.extend((0..seq).map(|token| match kind {
                Kind::Full => true,
                Kind::Prefix => token < length,
                Kind::Left => token >= seq - length,
                Kind::Joint => token < of_text || token >= text,
                Kind::Holes => token % step != at,
                Kind::Random => draws.uniform(0.0, 1.0) < share,
                Kind::Runs => {
                    if token == ends {
                        is_in_run = !is_in_run;
                        ends += 1 + draws.below(if is_in_run { longest } else { gap } as usize);
                    }
                    is_in_run
                }
            }));
        }
        Self { seq, keep }
    }

    fn meta(&self, batch: usize) -> varlen_fa::Result<VarlenMeta> {
        VarlenMeta::from_key_mask(&KeyMask::from_bool(batch, self.seq, &self.keep)?)
    }

    fn valid(&self) -> usize {
        self.lengths().into_iter().sum()
    }

    /// Steps of `step` tokens of which some are valid, of each batch row.
    fn steps(&self, step: usize) -> Vec<usize> {
        let steps_of = |row: &[bool]| row.chunks(step).filter(|tokens| tokens.contains(&true)).count();
        self.keep.chunks(self.seq).map(steps_of).collect()
    }

    /// Valid tokens of each batch row.
    fn lengths(&self) -> Vec<usize> {
        self.keep.chunks(self.seq).map(|row| row.iter().filter(|&&keep| keep).count()).collect()
    }
}

/// Attention under a random mask. q and the output are `[batch, query.seq, heads, head_dim]`, k and v
/// `[batch, key.seq, kv_heads, head_dim]`.
struct RandomCall {
    number: u64,
    kind: Kind,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    query: Side,
    /// None in self-attention.
    key: Option<Side>,
}

/// What one call gave. `benches/peers/fit_cost.py` reads it.
#[derive(Debug, Serialize)]
struct Record {
    number: u64,
    title: String,
    plan: String,
    chosen: String,
    best: String,
    regret: f64,
    features: Features,
    times: BTreeMap<String, Measured>,
}

/// Of one choice.
#[derive(Debug, Serialize)]
struct Measured {
    median_ms: f64,
}

/// What the cost model needs of a call.
#[derive(Debug, Serialize)]
struct Features {
    batch: usize,
    seq_q: usize,
    seq_k: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Bytes of an element.
    element: usize,
    is_cross: bool,
    /// Valid tokens of each batch row.
    queries: Vec<usize>,
    keys: Vec<usize>,
    /// Of the kernels that the model knows.
    tiles: BTreeMap<&'static str, TileFeatures>,
}

/// How a kernel cuts the call.
#[derive(Debug, Serialize)]
struct TileFeatures {
    width: usize,
    rows: usize,
    keys: usize,
    blocks: usize,
    /// Steps of as many keys, in which some key is valid, of each batch row.
    key_steps: Vec<usize>,
}

/// The machine, in the first line.
#[derive(Debug, Serialize)]
struct Facts {
    device: String,
    multiprocessors: Option<usize>,
    dtype: String,
}

/// A line that is not a call's.
#[derive(Debug, Serialize)]
struct Header {
    facts: Facts,
}

impl RandomCall {
    fn new(draws: &mut Draws, number: u64, size: &Size) -> Self {
        let kind = KINDS[number as usize % KINDS.len()];
        let log_uniform = |draws: &mut Draws, [from, to]: [f64; 2]| from * (to / from).powf(draws.uniform(0.0, 1.0));
        let tokens = log_uniform(draws, size.tokens);
        let mut seq = log_uniform(draws, [size.shortest as f64, tokens.max(size.shortest as f64)]).round() as usize;
        // Half of the lengths are multiples of 64, as models and servers round them.
        if draws.one_in(2) {
            seq = seq.next_multiple_of(64);
        }
        let batch = (tokens as usize / seq).max(1);
        let head_dim = draws.pick(size.head_dims).unwrap_or(64);
        let fitting: Vec<_> = size.heads.iter().copied().filter(|heads| heads * head_dim <= size.width).collect();
        let heads = draws.pick(&fitting).unwrap_or(1);
        let groups: Vec<_> =
            [1, 1, 1, 1, 2, 3, 4, 8].into_iter().filter(|&group| heads.is_multiple_of(group)).collect();
        let kv_heads = heads / draws.pick(&groups).unwrap_or(1);
        // One in seven: as many queries as a self-attention would have, and fewer keys.
        let (query, key) = if draws.one_in(7) {
            let of_queries = draws.pick(&[Kind::Full, Kind::Full, Kind::Prefix, Kind::Joint]).unwrap_or(Kind::Full);
            let seq_k = 16 + draws.below(seq.clamp(64, 1024) - 15);
            (Side::new(draws, of_queries, batch, seq), Some(Side::new(draws, kind, batch, seq_k)))
        } else {
            (Side::new(draws, kind, batch, seq), None)
        };
        Self { number, kind, batch, heads, kv_heads, head_dim, query, key }
    }

    fn title(&self) -> String {
        let Self { number, kind, batch, heads, kv_heads, head_dim, query, key } = self;
        let keys = key.as_ref().unwrap_or(query);
        let percent = 100 * keys.valid() / (batch * keys.seq);
        let (seq_q, seq_k) = (query.seq, keys.seq);
        format!(
            "{number}: {kind:?} B{batch} Sq{seq_q} Sk{seq_k} {heads}/{kv_heads}×{head_dim}, {percent} % of keys valid"
        )
    }

    /// Times each choice in turns; none for a call without a valid query or key.
    fn time<T: Element + Into<f32>>(&self, device: &Device, rounds: usize) -> Result<Option<Record>> {
        let Self { batch, heads, kv_heads, head_dim, query, key, .. } = self;
        let keys = key.as_ref().unwrap_or(query);
        if query.valid() == 0 || keys.valid() == 0 {
            return Ok(None);
        }
        let q = tensor::<T>(device, 1, &[*batch, query.seq, *heads, *head_dim])?;
        let [k, v] = [2, 3].map(|seed| tensor::<T>(device, seed, &[*batch, keys.seq, *kv_heads, *head_dim]));
        let (k, v) = (k?, v?);
        let mut out = Tensor::zeros(device, T::DTYPE, q.shape())?;
        let (of_query, of_key) = (query.meta(*batch)?, keys.meta(*batch)?);
        let mask = match key {
            Some(_) => AttentionMask::varlen_cross(&of_query, &of_key),
            None => AttentionMask::varlen(&of_query),
        };

        let plan = MaskedAttention::new(device).forward_into(&q, &k, &v, mask, &mut out)?;
        let is_cpu = device.capabilities().backend == BackendKind::Cpu;
        let mut choices = Vec::new();
        let mut first: Option<Vec<f32>> = None;
        for &kernel in &device.capabilities().kernels {
            for path in PATHS {
                let name = format!("{path} by {kernel}");
                let layer = MaskedAttention::new(device).with_kernel(kernel).with_path(path);
                let start = Instant::now();
                match layer.forward_into(&q, &k, &v, mask, &mut out) {
                    Ok(_) => {}
                    // A choice may not fit the call.
                    Err(Error::NotApplicable { .. }) => continue,
                    Err(error) => return Err(error).context(name),
                }
                let took = start.elapsed().max(Duration::from_micros(1));
                let values: Vec<f32> = out.to_vec::<T>()?.into_iter().map(Into::into).collect();
                match &first {
                    None => first = Some(values),
                    Some(first) => check(first, &values).with_context(|| name.clone())?,
                }
                let repeats = if is_cpu { SAMPLE.div_duration_f64(took).ceil() as u32 } else { repeats_of(device) };
                choices.push((name, layer, repeats));
            }
        }
        let timed = in_turns(device, rounds, choices.len(), |choice| {
            let (_, layer, repeats) = &choices[choice];
            for _ in 1..*repeats {
                layer.forward_into(&q, &k, &v, mask, &mut out)?;
            }
            layer.forward_into(&q, &k, &v, mask, &mut out)
        })?;
        let times = choices.into_iter().zip(timed).map(|((name, _, repeats), (_, times))| {
            // What else a processor does makes calls longer, never shorter.
            let time = if is_cpu { times.min } else { times.median };
            (name, milliseconds(time / repeats))
        });
        let times_ms: Vec<_> = times.collect();

        let chosen = format!("{} by {}", plan.path, plan.kernel);
        let (best, least) = times_ms.iter().min_by(|a, b| a.1.total_cmp(&b.1)).context("no choice fits the call")?;
        let Some((_, time)) = times_ms.iter().find(|(name, _)| *name == chosen) else {
            bail!("the plan chose {chosen}, which cannot be forced");
        };
        let (regret, best) = (time / least, best.clone());
        let times = times_ms.into_iter().map(|(name, median_ms)| (name, Measured { median_ms })).collect();
        let features = self.features(device, T::DTYPE.size());
        let (number, title, plan) = (self.number, self.title(), plan.with_estimate().to_string());
        Ok(Some(Record { number, title, plan, chosen, best, regret, features, times }))
    }

    fn features(&self, device: &Device, element: usize) -> Features {
        let &Self { batch, heads, kv_heads, head_dim, ref query, ref key, .. } = self;
        let keys = key.as_ref().unwrap_or(query);
        let tile = |&kernel: &Kernel| {
            let tiling = device.capabilities().tiling(kernel, head_dim)?;
            let Tiling { width, rows, keys: step, blocks, .. } = tiling;
            let key_steps = keys.steps(step);
            Some((kernel.name(), TileFeatures { width, rows, keys: step, blocks, key_steps }))
        };
        Features {
            batch,
            seq_q: query.seq,
            seq_k: keys.seq,
            heads,
            kv_heads,
            head_dim,
            element,
            is_cross: key.is_some(),
            queries: query.lengths(),
            keys: keys.lengths(),
            tiles: device.capabilities().kernels.iter().filter_map(tile).collect(),
        }
    }
}

/// Whether two choices computed the same, but for roundings of 16-bit elements.
fn check(first: &[f32], values: &[f32]) -> Result<()> {
    let largest = first.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    let error = first.iter().zip(values).fold(0.0_f32, |most, (a, b)| {
        // NaN is an error, whatever the order of the two.
        let difference = (a - b).abs();
        if difference <= most { most } else { difference }
    });
    ensure!(error <= 0.03 * largest + 2e-3, "outputs differ by {error} from those of another choice");
    Ok(())
}

fn summarize(report: &mut Report, mut records: Vec<Record>) -> Result<()> {
    records.sort_by(|a, b| a.regret.total_cmp(&b.regret));
    let share = |part: f64| {
        let at = ((records.len() as f64 * part).ceil() as usize).saturating_sub(1);
        records.get(at).map_or(f64::NAN, |record| record.regret)
    };
    let (median, most, worst) = (share(0.5), share(0.9), share(1.0));
    let over = |limit: f64| records.iter().filter(|record| record.regret > limit).count();
    writeln!(
        report.text,
        "\nregret of {} calls: median {median:.3}, 90 % {most:.3}, worst {worst:.3}; over 1.03: {}, over 1.10: {}",
        records.len(),
        over(1.03),
        over(1.10)
    )?;
    let mut bests: Vec<_> = records.iter().map(|record| record.best.as_str()).collect();
    bests.sort_unstable();
    bests.dedup();
    for name in bests {
        let of_it = || records.iter().filter(|record| record.best == name);
        let chosen = of_it().filter(|record| record.chosen == name).count();
        writeln!(report.text, "  {name:<24} is the best of {:3}, chosen in {chosen:3} of those", of_it().count())?;
    }
    writeln!(report.text, "the ten worst:")?;
    for Record { title, plan, best, regret, times, .. } in records.iter().rev().take(10) {
        let mut times: Vec<_> = times.iter().map(|(name, measured)| (name, measured.median_ms)).collect();
        times.sort_by(|a, b| a.1.total_cmp(&b.1));
        let times: Vec<_> = times.into_iter().map(|(name, ms)| format!("{name} {ms:.4}")).collect();
        writeln!(report.text, "  {regret:.3}  {title}\n         {plan}; best: {best}; ms: {}", times.join(", "))?;
    }
    Ok(())
}
