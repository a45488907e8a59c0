//! Masked attention over a sequence that is divided among ranks, in every mode, against one device.
//!
//! Ranks are threads of this process, or processes of this machine. Text is a prefix that every rank has, padded to the longest of
//! the batch; the image is divided. Rows of masked text hold NaN throughout.

mod arguments;
mod problem;
mod rank;

use std::env;
use std::num::NonZeroUsize;
use std::process::{self, Child, Command, ExitCode};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use varlen_fa::dist::{Communicator, HostCommunicator, ParallelPlan, PeerCommunicator, Rendezvous};
use varlen_fa::{Config, Device, bf16, f16};

use arguments::{Arguments, Kind, Transport};
use problem::Problem;
use rank::{Outcome, run_rank};
use varlen_fa_harness::arguments::ElementType;
use varlen_fa_harness::report::exit_code;
use varlen_fa_harness::times::milliseconds;

/// How long ranks wait for one another.
const TIME_OUT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    env_logger::init();
    exit_code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    match (arguments.dtype, arguments.device) {
        (Some(ElementType::F32), _) | (None, Kind::Cpu | Kind::Wgpu) => run_as::<f32>(arguments),
        (Some(ElementType::F16), _) | (None, Kind::Cuda) => run_as::<f16>(arguments),
        (Some(ElementType::Bf16), _) => run_as::<bf16>(arguments),
    }
}

fn run_as<T: problem::Value>(arguments: &Arguments) -> Result<()> {
    let problem = Problem::new(arguments)?;
    if let Some(rank) = arguments.rank {
        return run_process::<T>(arguments, &problem, rank).map(drop);
    }
    let (ranks, how) = (arguments.ranks(), if arguments.processes { "processes" } else { "threads" });
    let (device, transport) = (arguments.device, arguments.transport());
    println!("ranks      {ranks} {how}, device {device:?}, rows by {transport:?}, {}", problem.heads(T::DTYPE).dtype);
    println!("sequence   {}", problem.describe());
    let (plan, outcomes) = match arguments.processes {
        true => run_processes::<T>(arguments, &problem)?,
        false => run_threads::<T>(arguments, &problem)?,
    };
    println!("plan       {plan}");
    println!("\n{:<18} {:>10} {:>14} {:>12}   against one device", "mode", "median ms", "sent a rank", "max error");
    let mut failed = 0;
    for Outcome { mode, median, sent, error, failure } in &outcomes {
        let sent = format!("{:.1} KB", *sent as f64 / 1e3);
        let verdict = failure.as_deref().unwrap_or(if *error == 0.0 { "ok, the same bits" } else { "ok" });
        println!("{mode:<18} {:>10.3} {sent:>14} {error:>12.2e}   {verdict}", milliseconds(*median));
        failed += usize::from(failure.is_some());
    }
    ensure!(failed == 0, "{failed} of {} modes failed", outcomes.len());
    Ok(())
}

type Outcomes = (ParallelPlan, Vec<Outcome>);

fn run_threads<T: problem::Value>(arguments: &Arguments, problem: &Problem) -> Result<Outcomes> {
    // Before any rank runs: one that misses its device would be a lost rank to the others.
    let devices = (0..arguments.ranks()).map(|rank| open(arguments, rank)).collect::<Result<Vec<_>>>()?;
    let reference = problem.reference::<T>(devices.first().context("there is no rank")?)?;
    let ranks: Vec<Start<'_>> = match arguments.transport() {
        Transport::Peer => {
            let start =
                |rank: PeerCommunicator| -> Start<'_> { Box::new(move |_| Ok(Box::new(rank.with_time_out(TIME_OUT)))) };
            PeerCommunicator::of_devices(&devices)?.into_iter().map(start).collect()
        }
        // To join NCCL each rank waits for all, in its own thread.
        Transport::Host | Transport::Nccl => {
            let start = |rank: HostCommunicator| -> Start<'_> {
                Box::new(move |device| over(rank.with_time_out(TIME_OUT), arguments, device))
            };
            HostCommunicator::threads(devices.len())?.into_iter().map(start).collect()
        }
    };
    let run = |start: Start<'_>, device: &Device| {
        run_rank::<T>(&mut *start(device)?, device, problem, &reference, arguments.calls.get())
    };
    let outcomes = thread::scope(|scope| {
        let (run, ranks) = (&run, ranks.into_iter().zip(&devices));
        let threads: Vec<_> = ranks.map(|(rank, device)| scope.spawn(move || run(rank, device))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a rank panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    outcomes.into_iter().next().context("there is no rank")
}

/// What makes a rank's communicator, in its own thread.
type Start<'a> = Box<dyn FnOnce(&Device) -> Result<Box<dyn Communicator>> + Send + 'a>;

/// A rank of what `--transport` says, among those that have met.
fn over(met: HostCommunicator, arguments: &Arguments, device: &Device) -> Result<Box<dyn Communicator>> {
    match arguments.transport() {
        #[cfg(feature = "nccl")]
        Transport::Nccl => Ok(Box::new(varlen_fa::dist::NcclCommunicator::new(met, device)?)),
        #[cfg(not(feature = "nccl"))]
        Transport::Nccl => anyhow::bail!("built without NCCL for {}: add `--features nccl`", device.name()),
        Transport::Host | Transport::Peer => Ok(Box::new(met)),
    }
}

/// Starts the other ranks and is rank 0.
fn run_processes<T: problem::Value>(arguments: &Arguments, problem: &Problem) -> Result<Outcomes> {
    ensure!(arguments.transport() != Transport::Peer, "`--transport peer` is between threads, not with `--processes`");
    let meeting = env::temp_dir().join(format!("varlen-fa-sequence-parallel-{}", process::id()));
    let mut others = Vec::new();
    for rank in 1..arguments.ranks() {
        let mut command = Command::new(env::current_exe()?);
        command.args(env::args_os().skip(1)).args(["--rank", &rank.to_string(), "--meeting"]).arg(&meeting);
        others.push(command.spawn().context("cannot start a process")?);
    }
    let mut arguments = arguments.clone();
    arguments.meeting = Some(meeting);
    let outcomes = run_process::<T>(&arguments, problem, 0);
    let ended = others.iter_mut().map(Child::wait).collect::<Result<Vec<_>, _>>()?;
    let outcomes = outcomes?;
    ensure!(ended.iter().all(|status| status.success()), "a rank failed: {ended:?}");
    Ok(outcomes)
}

fn run_process<T: problem::Value>(arguments: &Arguments, problem: &Problem, rank: usize) -> Result<Outcomes> {
    let meeting = Rendezvous::File(arguments.meeting.clone().context("`--meeting` is missing")?);
    let met = HostCommunicator::connect(&meeting, rank, arguments.ranks(), TIME_OUT)?;
    let device = open(arguments, rank)?;
    let mut communicator = over(met, arguments, &device)?;
    let reference = problem.reference::<T>(&device)?;
    run_rank::<T>(&mut *communicator, &device, problem, &reference, arguments.calls.get())
}

/// A rank's device; the CPU's cores are divided.
fn open(arguments: &Arguments, rank: usize) -> Result<Device> {
    let choice = arguments.choice(rank);
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = NonZeroUsize::new(cores / arguments.ranks()).unwrap_or(NonZeroUsize::MIN);
    Ok(Device::with_config(Config::from_env_for(choice)?.with_threads(Some(threads)))?)
}
