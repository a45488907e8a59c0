//! Times attention over a sequence that is divided among ranks, in every mode, beside the same call on one device, in turns.
//!
//! ```text
//! cargo bench --bench sequence_parallel -- --device cuda --ranks 2
//! ```

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;
use varlen_fa::dist::{
    Communicator, Heads, HostCommunicator, Machine, Mode, ParallelRequest, PeerCommunicator, SequenceParallel,
    ShardedMeta, Shards,
};
use varlen_fa::{
    AttentionMask, BackendKind, Config, DType, Device, DeviceChoice, KeyMask, MaskedAttention, Tensor, VarlenMeta,
};
use varlen_fa::{bf16, f16};

use crate::arguments::{ElementType, RoundArguments};
use crate::random::tensor;
use crate::report::Report;
use crate::sizes::Sizes;
use crate::times::{Times, milliseconds};

/// A joint layer at 1024² of two requests, and videos of 16k and 32k tokens.
const DEFAULTS: [&str; 3] = ["256+4096:valid=256,120", "16384", "32768"];
const SMOKE: &str = "5+40:valid=3,5:heads=4:dim=16";
/// Several calls a timing, as a model makes them: the host's work for one hides behind the device's for another.
const REPEATS: [f64; 2] = [4.0, 64.0];
/// How long the calls of a timing shall take, by a plan's idea of the device.
const SECONDS: f64 = 0.03;

/// Time sequence parallelism against one device.
#[derive(Debug, Args)]
#[command(after_help = "Workloads:
  A SPEC is [TEXT+]IMAGE, in tokens: text is on every rank, and the image is divided among them. After it may come
    :valid=A,B,...   a batch with so many valid text tokens in each row [default: one row, all valid]
    :heads=N  :kv_heads=N  :dim=N   [default: 24, as many, 128]")]
pub struct Arguments {
    /// Text and image to run, see below; may be given several times
    #[arg(long = "workload", value_name = "SPEC")]
    workloads: Vec<String>,
    /// Ranks that share the sequence [default: on cuda as many as there are GPUs, else 2]
    #[arg(long, value_name = "N")]
    ranks: Option<NonZeroUsize>,
    /// Each rank's device; with more ranks than GPUs, several share one
    #[arg(long, value_enum, default_value = "cpu")]
    device: Kind,
    /// How rows travel [default: peer on cuda, else host]
    #[arg(long, value_enum)]
    transport: Option<Transport>,
    /// Element type [default: bf16 on cuda, else f32]
    #[arg(long, value_name = "TYPE")]
    dtype: Option<ElementType>,
    /// Chunks of heads that are tried beside what the plan takes
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,2,3,4")]
    chunks: Vec<usize>,
    /// Also write one JSON object a line to FILE; `-` is standard output, and the text then goes to standard error
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    rounds: RoundArguments,
}

/// Kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// The processor.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
}

/// Ways of rows between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Transport {
    /// Through host memory.
    Host,
    /// From GPU to GPU.
    Peer,
    /// By NCCL: a GPU for each rank.
    Nccl,
}

/// A masked sequence, text before image.
#[derive(Debug)]
struct Problem {
    name: String,
    shards: Shards,
    mask: KeyMask,
    heads: Heads,
}

impl Problem {
    fn parse(spec: &str, ranks: usize, dtype: DType) -> Result<Self> {
        let wrong = || format!("expected [TEXT+]IMAGE[:valid=A,B,...][:heads=N][:kv_heads=N][:dim=N], got `{spec}`");
        let mut fields = spec.split(':');
        let tokens = fields.next().unwrap_or_default();
        let (text, image) = tokens.split_once('+').unwrap_or(("0", tokens));
        let (text, image) = (text.parse().with_context(wrong)?, image.parse().with_context(wrong)?);
        let mut valid = vec![text];
        let (mut num_heads, mut num_kv_heads, mut head_dim) = (24, None, 128);
        for field in fields {
            let (name, value) = field.split_once('=').with_context(wrong)?;
            match name {
                "valid" => valid = value.split(',').map(str::parse).collect::<Result<_, _>>().with_context(wrong)?,
                "heads" => num_heads = value.parse().with_context(wrong)?,
                "kv_heads" => num_kv_heads = Some(value.parse().with_context(wrong)?),
                "dim" => head_dim = value.parse().with_context(wrong)?,
                _ => return Err(anyhow!(wrong())),
            }
        }
        let shards = Shards::equal(image, ranks)?.with_prefix(text)?;
        let rows: Vec<_> = valid.iter().map(|&valid: &usize| vec![0..valid.min(text), text..shards.seq()]).collect();
        let mask = KeyMask::from_runs(shards.seq(), &rows)?;
        let heads = Heads { num_heads, num_kv_heads: num_kv_heads.unwrap_or(num_heads), head_dim, dtype };
        Ok(Self { name: spec.to_owned(), shards, mask, heads })
    }

    /// How many calls a timing takes.
    fn repeats(&self, device: &Device) -> u32 {
        let machine = if device.capabilities().backend == BackendKind::Cpu { Machine::CPU } else { Machine::H100 };
        let Heads { num_heads, head_dim, .. } = self.heads;
        let operations = 4.0 * (self.mask.batch() * num_heads * head_dim) as f64 * (self.mask.seq() as f64).powi(2);
        let [least, most] = REPEATS;
        (SECONDS * machine.flops / operations).clamp(least, most) as u32
    }

    fn tensors(&self, device: &Device, seq: usize, seed: u64) -> Result<[Tensor; 4]> {
        let Heads { num_heads, num_kv_heads, head_dim, dtype } = self.heads;
        let new = |seed, heads| -> Result<Tensor> {
            let shape = [self.mask.batch(), seq, heads, head_dim];
            Ok(match dtype {
                DType::F32 => tensor::<f32>(device, seed, &shape)?,
                DType::F16 => tensor::<f16>(device, seed, &shape)?,
                _ => tensor::<bf16>(device, seed, &shape)?,
            })
        };
        Ok([new(seed, num_heads)?, new(seed + 1, num_kv_heads)?, new(seed + 2, num_kv_heads)?, new(seed, num_heads)?])
    }
}

/// What a row times: one device, or ranks in a mode and so many chunks.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Row {
    OneDevice,
    /// What the plan takes.
    Plan,
    Forced(Mode, Option<usize>),
}

/// Runs it and writes the report.
pub fn run(arguments: &Arguments, sizes: Sizes) -> Result<()> {
    let smoke = [SMOKE];
    let (defaults, rounds) = arguments.rounds.of_run(sizes, &DEFAULTS, &smoke);
    let gpus: Vec<_> = Device::choices().into_iter().filter(|choice| matches!(choice, DeviceChoice::Cuda(_))).collect();
    let ranks = match (arguments.ranks, arguments.device) {
        (Some(ranks), _) => ranks.get(),
        (None, Kind::Cuda) => gpus.len(),
        (None, Kind::Cpu) => 2,
    };
    let open = |rank: usize| -> Result<Device> {
        let choice = match arguments.device {
            Kind::Cpu => DeviceChoice::Cpu,
            Kind::Cuda => gpus[rank % gpus.len()],
        };
        Ok(Device::with_config(Config::from_env_for(choice)?)?)
    };
    let devices = (0..ranks).map(open).collect::<Result<Vec<_>>>()?;
    let dtype = match (arguments.dtype, arguments.device) {
        (Some(dtype), _) => dtype.dtype(),
        (None, Kind::Cuda) => DType::Bf16,
        (None, Kind::Cpu) => DType::F32,
    };
    let transport = match (arguments.transport, arguments.device) {
        (Some(transport), _) => transport,
        (None, Kind::Cuda) => Transport::Peer,
        (None, Kind::Cpu) => Transport::Host,
    };
    let mut report = Report::new(arguments.json.as_deref())?;
    let first = devices.first().context("there is no rank")?;
    let distinct = if arguments.device == Kind::Cuda { gpus.len().min(ranks) } else { 1 };
    writeln!(
        report.text,
        "{}; {ranks} ranks on {distinct} device(s), rows by {transport:?}, {rounds} rounds, {dtype}",
        first.capabilities()
    )?;
    let given: Vec<&str> = arguments.workloads.iter().map(String::as_str).collect();
    for spec in if given.is_empty() { defaults } else { &given } {
        let problem = Problem::parse(spec, ranks, dtype)?;
        let (rows, measured) = measure(&problem, &devices, (transport, &arguments.chunks), rounds)?;
        write_table(&mut report, (&problem, first, ranks), &rows, &measured)?;
    }
    Ok(())
}

/// What can be run: every mode that the heads allow, each in the chunks that divide them.
fn rows_of(heads: Heads, ranks: usize, chunks: &[usize]) -> Vec<Row> {
    let mut rows = vec![Row::OneDevice, Row::Plan];
    for (mode, ulysses) in [(Mode::Gather, 1), (Mode::Ulysses, ranks)] {
        let fits = |of: usize, heads: usize| of > 0 && heads.is_multiple_of(of);
        if fits(ulysses, heads.num_heads) && fits(ulysses, heads.num_kv_heads) {
            let enough = |chunks: &&usize| (1..=heads.num_kv_heads / ulysses).contains(*chunks);
            rows.extend(chunks.iter().filter(enough).map(|&chunks| Row::Forced(mode, Some(chunks))));
        }
    }
    rows.push(Row::Forced(Mode::Ring, None));
    rows
}

/// Of one row on one rank: how long calls took, and how long the host took to launch them, each round.
#[derive(Debug, Default, Clone)]
struct Measured {
    name: String,
    calls: Vec<Duration>,
    host: Vec<Duration>,
}

/// Times every row on every rank, in turns. The slowest rank counts.
fn measure(
    problem: &Problem,
    devices: &[Device],
    (transport, chunks): (Transport, &[usize]),
    rounds: usize,
) -> Result<(Vec<Row>, Vec<Measured>)> {
    let starts: Vec<Start<'_>> = match transport {
        Transport::Peer => PeerCommunicator::of_devices(devices)?.into_iter().map(start).collect(),
        Transport::Host => HostCommunicator::threads(devices.len())?.into_iter().map(start).collect(),
        // To join NCCL each rank waits for all, in its own thread.
        Transport::Nccl => HostCommunicator::threads(devices.len())?
            .into_iter()
            .map(|met| -> Start<'_> { Box::new(move |device| over_nccl(met, device)) })
            .collect(),
    };
    let rows = rows_of(problem.heads, devices.len(), chunks);
    let of_rank = |rank: usize| devices[rank].config().device;
    let has_own_gpu = |rank: usize| {
        devices[rank].capabilities().backend == BackendKind::Cuda
            && (0..devices.len()).all(|other| other == rank || of_rank(other) != of_rank(rank))
    };
    let each = thread::scope(|scope| {
        let rows = &rows;
        let ranks = starts.into_iter().zip(devices).enumerate();
        let threads: Vec<_> = ranks
            .map(|(rank, (start, device))| {
                let has_own_gpu = has_own_gpu(rank);
                scope.spawn(move || run_rank(problem, (device, has_own_gpu), start(device)?, rows, rounds))
            })
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a rank panicked"))?);
        joined.collect::<Result<Vec<_>>>()
    })?;
    let mut slowest = each.first().context("there is no rank")?.clone();
    for of_rank in &each[1..] {
        for (all, own) in slowest.iter_mut().zip(of_rank) {
            all.calls.iter_mut().zip(&own.calls).for_each(|(all, own)| *all = (*all).max(*own));
            all.host.iter_mut().zip(&own.host).for_each(|(all, own)| *all = (*all).max(*own));
        }
    }
    Ok((rows, slowest))
}

/// What makes a rank's communicator, in its own thread.
type Start<'a> = Box<dyn FnOnce(&Device) -> Result<Box<dyn Communicator>> + Send + 'a>;

fn start<'a>(communicator: impl Communicator + 'static) -> Start<'a> {
    Box::new(move |_| Ok(Box::new(communicator)))
}

#[cfg(feature = "nccl")]
fn over_nccl(met: HostCommunicator, device: &Device) -> Result<Box<dyn Communicator>> {
    Ok(Box::new(varlen_fa::dist::NcclCommunicator::new(met, device)?))
}

#[cfg(not(feature = "nccl"))]
fn over_nccl(_: HostCommunicator, device: &Device) -> Result<Box<dyn Communicator>> {
    anyhow::bail!("built without NCCL for {}: add `--features nccl`", device.name())
}

fn run_rank(
    problem: &Problem,
    (device, has_own_gpu): (&Device, bool),
    mut communicator: Box<dyn Communicator>,
    rows: &[Row],
    rounds: usize,
) -> Result<Vec<Measured>> {
    let rank = communicator.rank();
    let meta = ShardedMeta::new(&problem.mask, &problem.shards, rank)?;
    let mut local = problem.tensors(device, problem.shards.local_len(rank), 1)?;
    // Rank 0 computes the whole, too. So do others with a GPU of their own, and do not count: one that has waited meanwhile is slower
    // at what comes next.
    let mut whole = match rank == 0 || has_own_gpu {
        true => Some((problem.tensors(device, problem.shards.seq(), 5)?, VarlenMeta::from_key_mask(&problem.mask)?)),
        false => None,
    };
    let attention = MaskedAttention::new(device);
    let repeats = problem.repeats(device);
    let mut requests: Vec<Option<(SequenceParallel, ParallelRequest)>> = Vec::new();
    let mut measured = vec![Measured::default(); rows.len()];
    for (row, measured) in rows.iter().zip(&mut measured) {
        let mut layer = SequenceParallel::new(device);
        if let Row::Forced(mode, chunks) = row {
            layer = chunks.iter().fold(layer.with_mode(*mode), |layer, &chunks| layer.with_chunks(chunks));
        }
        if *row == Row::OneDevice {
            measured.name = "one device".to_owned();
            requests.push(None);
            continue;
        }
        let request = layer.prepare(&mut *communicator, &meta, &problem.heads)?;
        let plan = request.plan();
        let of_plan = if *row == Row::Plan { "plan: " } else { "" };
        measured.name = format!("{of_plan}{} in {}", plan.mode, plan.chunks);
        requests.push(Some((layer, request)));
    }
    for round in 0..=rounds {
        for (request, measured) in requests.iter().zip(&mut measured) {
            communicator.barrier()?;
            let started = Instant::now();
            for _ in 0..repeats {
                match (request, &mut whole) {
                    (Some((layer, request)), _) => {
                        let [q, k, v, out] = &mut local;
                        layer.forward_into(&mut *communicator, request, &*q, &*k, &*v, out)?;
                    }
                    (None, Some(([q, k, v, out], meta))) => {
                        attention.forward_into(&*q, &*k, &*v, AttentionMask::varlen(&*meta), out)?;
                    }
                    (None, None) => {}
                }
            }
            let launched = started.elapsed();
            device.synchronize()?;
            let done = started.elapsed();
            // The first round warms up.
            if round > 0 && (request.is_some() || rank == 0) {
                measured.calls.push(done / repeats);
                measured.host.push(launched / repeats);
            }
        }
    }
    communicator.barrier()?;
    Ok(measured)
}

/// One line of JSON.
#[derive(Debug, Serialize)]
struct Record<'a> {
    device: String,
    workload: &'a str,
    ranks: usize,
    row: &'a str,
    median_ms: f64,
    host_us: f64,
    speedup: f64,
}

fn write_table(
    report: &mut Report,
    (problem, device, ranks): (&Problem, &Device, usize),
    rows: &[Row],
    measured: &[Measured],
) -> Result<()> {
    let Heads { num_heads, num_kv_heads, head_dim, .. } = problem.heads;
    let (batch, seq) = (problem.mask.batch(), problem.mask.seq());
    ensure!(rows.len() == measured.len(), "a row was not measured");
    writeln!(
        report.text,
        "\n{}: B {batch}, S {seq}, {num_heads} heads ({num_kv_heads} of keys) of {head_dim}, {} of {} tokens valid",
        problem.name,
        problem.mask.total_kept(),
        batch * seq
    )?;
    let mut one_ms = None;
    for Measured { name, calls, host } in measured {
        let (times, host) = (Times::of(calls.clone()), Times::of(host.clone()));
        let (median_ms, host_us) = (milliseconds(times.median), 1e3 * milliseconds(host.median));
        let speedup = *one_ms.get_or_insert(median_ms) / median_ms;
        writeln!(
            report.text,
            "  {name:<28} {median_ms:>9.3} ms ({:.3} to {:.3})   {speedup:>6.2}x   host {host_us:>7.1} µs a call",
            milliseconds(times.min),
            milliseconds(times.max)
        )?;
        report.json(&Record {
            device: device.capabilities().to_string(),
            workload: &problem.name,
            ranks,
            row: name,
            median_ms,
            host_us,
            speedup,
        })?;
    }
    Ok(())
}
