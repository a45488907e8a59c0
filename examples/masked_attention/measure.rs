//! Steps of the layer on a device: times, plans and checks.

use std::time::{Duration, Instant};

use anyhow::Result;
use rayon::prelude::*;
use varlen_fa::{AttentionMask, Device, Element, KeyMask, MaskedAttention, Path, Plan, Tensor, TensorView, VarlenMeta};
use varlen_fa_testkit::oracle::Modifiers;
use varlen_fa_testkit::{CompareError, Value, check_masked_rows_zero};

use crate::layer::Layer;
use crate::scores::Scores;
use crate::seen_keys::SeenKeys;
use varlen_fa_harness::arguments::Problem;
use varlen_fa_harness::check::{Comparison, Queries, compare};
use varlen_fa_harness::progress::Progress;
use varlen_fa_harness::times::Times;

/// A round of calls on a GPU that takes this long, after one half as long, runs at the clock of a busy GPU.
const ROUND: Duration = Duration::from_millis(100);

/// The most calls of a round. A timed region holds about 2,000 launches, and a call is up to five.
const MAX_CALLS: u32 = 256;

/// What came of one workload.
pub struct Measured {
    /// Attention with metadata.
    pub varlen: Call,
    /// Attention with the key mask alone.
    pub dense: Call,
    /// Whether varlen's masked rows were exactly zero in every step.
    pub masked_rows: Result<(), CompareError>,
    /// Time to build mask, metadata and ranges from the batch's `bool`s.
    pub meta_time: Duration,
}

/// One kind of attention over all steps.
pub struct Call {
    pub plan: Plan,
    pub times: Times,
    /// Whether the device measured them.
    pub by_device: bool,
    /// Of all steps together.
    pub comparison: Comparison,
}

impl Measured {
    /// Whether every check passed.
    pub fn is_correct(&self) -> bool {
        let calls = [&self.varlen, &self.dense];
        self.masked_rows.is_ok() && calls.iter().all(|call| call.comparison.failure.is_none())
    }
}

/// Runs the layer on one workload.
pub fn run<T: Element + Value>(
    device: &Device,
    problem: &Problem,
    (seen, scores): (&SeenKeys, &Scores),
    steps: usize,
) -> Result<Measured> {
    let mut progress = Progress::new(steps + 1);
    progress.begin("preparing");
    let (batch, seq, keep) = (problem.workload.batch, problem.workload.seq, &problem.workload.mask);
    let start = Instant::now();
    let mask = KeyMask::from_bool(batch, seq, keep)?;
    // Once per request: every layer and step uses the same metadata and ranges, and their one copy on the device.
    let meta = VarlenMeta::from_key_mask(&mask)?;
    let ranges = seen.ranges(&problem.workload)?;
    let meta_time = start.elapsed();
    let sees = seen.booleans(&problem.workload)?;
    let (mut by_meta, mut by_mask) = (AttentionMask::varlen(&meta), AttentionMask::key(&mask));
    if let Some(ranges) = &ranges {
        (by_meta, by_mask) = (by_meta.with_ranges(ranges), by_mask.with_ranges(ranges));
    }
    // Once per layer of a model.
    let modifiers = scores.modifiers(problem.heads);
    (by_meta, by_mask) = (by_meta.with_modifiers(&modifiers), by_mask.with_modifiers(&modifiers));
    let slopes = scores.slopes(problem.heads);
    let (sees, modified) = (sees.as_deref(), scores.of_oracle(slopes.as_deref()));

    // The first calls come before the layer: what does not fit is refused before anything takes long.
    let mut qkv = Tensor::zeros(device, T::DTYPE, &fused_shape(problem))?;
    let mut varlen = Caller::new(device, problem, &qkv, by_meta, (Queries::Valid, sees, modified))?;
    let mut dense = Caller::new(device, problem, &qkv, by_mask, (Queries::All, sees, modified))?;
    let mut layer = Layer::random(problem)?;
    progress.end();

    let mut masked_rows = Ok(());
    for step in 0..steps {
        progress.begin("steps");
        let projected: Vec<T> = layer.project_qkv().into_par_iter().map(T::from_f32).collect();
        qkv.write(&projected)?;
        let reference = split_heads(problem, &projected);
        dense.call::<T>(problem, &qkv, &reference, step)?;
        let attended = varlen.call::<T>(problem, &qkv, &reference, step)?;
        masked_rows = masked_rows.and(check_masked_rows_zero("varlen", problem.shape(), &attended, keep));
        let attended: Vec<f32> = attended.into_par_iter().map(Element::to_f32).collect();
        layer.project_out(&attended);
        progress.end();
    }
    Ok(Measured { varlen: varlen.finish(), dense: dense.finish(), masked_rows, meta_time })
}

/// Attention under one mask, called in every step.
struct Caller<'a> {
    device: &'a Device,
    attention: MaskedAttention,
    mask: AttentionMask<'a>,
    /// What the oracle is told beside the mask: `[B, S, S]` says which keys each query sees.
    told: (Queries, Option<&'a [bool]>, Modifiers<'a>),
    out: Tensor,
    plan: Plan,
    timings: Vec<Duration>,
    by_device: bool,
    comparison: Comparison,
}

impl<'a> Caller<'a> {
    /// Makes the output and calls once, to warm up.
    fn new(
        device: &'a Device,
        problem: &Problem,
        qkv: &Tensor,
        mask: AttentionMask<'a>,
        told: (Queries, Option<&'a [bool]>, Modifiers<'a>),
    ) -> Result<Self> {
        let mut attention = MaskedAttention::new(device);
        if told.0 == Queries::All {
            // What varlen is compared with.
            attention = attention.with_path(Path::Dense);
        }
        let mut out = Tensor::zeros(device, qkv.dtype(), &problem.shape())?;
        let [q, k, v] = heads_of(problem, qkv)?;
        let plan = attention.forward_into(q, k, v, mask, &mut out)?;
        device.synchronize()?;
        let comparison = Comparison::default();
        let timings = Vec::new();
        Ok(Self { device, attention, mask, told, out, plan, timings, by_device: false, comparison })
    }

    /// Attends, takes the time, and compares with the oracle; gives the output.
    fn call<T: Element + Value>(
        &mut self,
        problem: &Problem,
        qkv: &Tensor,
        [q, k, v]: &[Vec<f32>; 3],
        step: usize,
    ) -> Result<Vec<T>> {
        // What the call leaves unwritten stays NaN and fails the checks.
        self.out.write(&vec![T::from_f32(f32::NAN); problem.shape().iter().product()])?;
        self.time(heads_of(problem, qkv)?)?;
        let out = self.out.to_vec::<T>()?;
        let comparison = compare(problem, [q, k, v], self.told, &out, step as u64)?;
        self.comparison = merge(std::mem::take(&mut self.comparison), comparison);
        Ok(out)
    }

    /// Takes the time of a call, as one of enough calls back to back that a GPU leaves its idle clock: between steps it waits for
    /// the host's projections. Each round of calls is the warm-up of the next, longer one; the last counts.
    fn time(&mut self, [q, k, v]: [TensorView<'_>; 3]) -> Result<()> {
        let is_gpu = !self.device.capabilities().is_software;
        let mut calls = 1;
        loop {
            let (plan, timing) = self.device.time(|| {
                let mut plan = self.plan;
                for _ in 0..calls {
                    plan = self.attention.forward_into(q, k, v, self.mask, &mut self.out)?;
                }
                Ok(plan)
            })?;
            if is_gpu && timing.duration < ROUND && calls < MAX_CALLS {
                calls *= 2;
                continue;
            }
            self.plan = plan;
            self.timings.push(timing.duration / calls);
            self.by_device = timing.by_device;
            return Ok(());
        }
    }

    fn finish(self) -> Call {
        let Self { plan, timings, by_device, comparison, .. } = self;
        Call { plan, times: Times::of(timings), by_device, comparison }
    }
}

/// `[B, S, H + 2·Hkv, D]`, as a fused projection gives it.
fn fused_shape(problem: &Problem) -> [usize; 4] {
    let [batch, seq, heads, head_dim] = problem.shape();
    // Sizes past the address space saturate, and the tensor refuses them.
    [batch, seq, heads.saturating_add(problem.kv_heads.saturating_mul(2)), head_dim]
}

/// q, k and v inside the fused projection, without a copy.
fn heads_of<'a>(problem: &Problem, qkv: &'a Tensor) -> Result<[TensorView<'a>; 3]> {
    let (heads, kv_heads) = (problem.heads, problem.kv_heads);
    let q = qkv.view().slice(2, 0..heads)?;
    let k = qkv.view().slice(2, heads..heads + kv_heads)?;
    let v = qkv.view().slice(2, heads + kv_heads..heads + 2 * kv_heads)?;
    Ok([q, k, v])
}

/// The same as three tensors of their own, for the oracle.
fn split_heads<T: Element>(problem: &Problem, fused: &[T]) -> [Vec<f32>; 3] {
    let (q, kv) = (problem.heads * problem.head_dim, problem.kv_heads * problem.head_dim);
    let part = |start: usize, len: usize| {
        fused.chunks_exact(q + 2 * kv).flat_map(|token| &token[start..][..len]).map(|value| value.to_f32()).collect()
    };
    [part(0, q), part(q, kv), part(q + kv, kv)]
}

/// Two comparisons as one, with the worse of their errors; NaN is worse than any number.
fn merge(first: Comparison, second: Comparison) -> Comparison {
    let max = |a: f64, b: f64| if a.is_nan() || a > b { a } else { b };
    Comparison {
        rows: first.rows + second.rows,
        max_abs_err: max(first.max_abs_err, second.max_abs_err),
        rel_err: max(first.rel_err, second.rel_err),
        failure: first.failure.or(second.failure),
    }
}
