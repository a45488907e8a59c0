//! What each rank does: every mode, several times, checked against its rows of the output of one device.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use varlen_fa::dist::{Communicator, Mode, ParallelNeeds, ParallelPlan, SequenceParallel, ShardedMeta};
use varlen_fa::{BackendKind, DType, Device, Tensor};

use super::problem::{Problem, Value};

/// One mode's figures: the worst of all ranks.
#[derive(Debug)]
pub struct Outcome {
    /// The mode's name.
    pub mode: String,
    /// Time of a call.
    pub median: Duration,
    /// Bytes that a rank sends, by the plan.
    pub sent: u64,
    /// The largest difference from one device.
    pub error: f32,
    /// What is wrong, if anything.
    pub failure: Option<String>,
}

/// The plan, and what every mode gives that the ranks and heads allow. All ranks come to the same, but for times.
pub fn run_rank<T: Value>(
    communicator: &mut dyn Communicator,
    device: &Device,
    problem: &Problem,
    reference: &[T],
    calls: usize,
) -> Result<(ParallelPlan, Vec<Outcome>)> {
    let rank = communicator.rank();
    let (heads, tokens) = (problem.heads(T::DTYPE), problem.tokens(rank));
    let expected = problem.rows(reference, &tokens);
    let inputs = problem.inputs::<T>(device, &tokens)?;
    // Once a request: no rank asks another what is masked.
    let meta = ShardedMeta::new(&problem.mask, &problem.shards, rank)?;
    let plan = ParallelPlan::new(&meta, &heads, ParallelNeeds::new(), &SequenceParallel::new(device).machine(), None)?;
    let mut modes: Vec<(Mode, u64)> = Vec::new();
    for (mode, estimate) in &plan.candidates {
        let sent = estimate.as_ref().map(|estimate| estimate.bytes_in_host + estimate.bytes_between_hosts);
        modes.extend(sent.ok().map(|sent| (*mode, sent)));
    }
    // One rank has nothing to choose from.
    if plan.candidates.is_empty() {
        modes.push((plan.mode, 0));
    }
    let mut outcomes = Vec::new();
    for (mode, sent) in modes {
        let parallel = SequenceParallel::new(device).with_mode(mode);
        let request = parallel.prepare(communicator, &meta, &heads)?;
        let [q, k, v] = &inputs;
        let mut times = Vec::new();
        let mut out: Option<Tensor> = None;
        for _ in 0..calls {
            communicator.barrier()?;
            let started = Instant::now();
            out = Some(parallel.forward(communicator, &request, q, k, v)?);
            device.synchronize()?;
            times.push(started.elapsed());
        }
        times.sort_unstable();
        let out = out.context("there was no call")?.to_vec::<T>()?;
        let own = furthest(&out, &expected);
        let error = worst(communicator, own)?;
        let limit = limit(mode, T::DTYPE, device);
        // NaN is beyond any limit.
        let is_near = error <= limit;
        let failure = (!is_near).then(|| format!("FAILED: at most {limit:e} was expected"));
        outcomes.push(Outcome { mode: mode.to_string(), median: times[times.len() / 2], sent, error, failure });
    }
    Ok((plan, outcomes))
}

/// How far a mode may be from one device: no bit where the CPU attends to the same keys in the same order.
fn limit(mode: Mode, dtype: DType, device: &Device) -> f32 {
    let merges = matches!(mode, Mode::Ring | Mode::UlyssesRing { .. });
    match (dtype, merges || device.capabilities().backend != BackendKind::Cpu) {
        (_, false) => 0.0,
        (DType::F32, true) => 1e-5,
        (_, true) => 3e-2,
    }
}

/// The largest difference; NaN if there is one.
fn furthest<T: Value>(out: &[T], expected: &[T]) -> f32 {
    let differences = out.iter().zip(expected).map(|(got, expected)| (got.to_f32() - expected.to_f32()).abs());
    differences.fold(0.0, larger)
}

/// The largest of all ranks.
fn worst(communicator: &mut dyn Communicator, own: f32) -> Result<f32> {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&own.to_le_bytes());
    let all = communicator.all_gather_16("comparing with one device", bytes)?;
    let values = all.iter().map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    Ok(values.fold(0.0, larger))
}

/// The larger number; NaN if either is.
fn larger(a: f32, b: f32) -> f32 {
    if a.is_nan() || a >= b { a } else { b }
}
