//! How fast a device is, beside what may be expected of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rayon::{BroadcastContext, ThreadPoolBuilder};
use serde::Serialize;
use varlen_fa::{
    AttentionMask, BackendKind, DType, Device, Element, KeyMask, MaskedAttention, Plan, Tensor, VarlenMeta, f16,
};
use varlen_fa_harness::peak::peak_gflops;
use varlen_fa_harness::random::tensor;
use varlen_fa_harness::times::{Times, milliseconds};

/// Batch rows, heads and head dimension: an encoder's.
const BATCH: usize = 4;
const HEADS: usize = 12;
const HEAD_DIM: usize = 64;

/// The longest rows that are tried. Shorter ones do where a call takes long enough to be timed.
const LONGEST: usize = 4096;
const LONG_ENOUGH: Duration = Duration::from_millis(20);

/// Calls are timed in groups that take so long.
const SAMPLE: Duration = Duration::from_millis(10);

/// The speed of attention with metadata on a device.
#[derive(Debug, Clone, Serialize)]
pub struct Speed {
    /// The call.
    pub call: String,
    /// Its plan.
    pub plan: String,
    /// Other programs only add to a time, so the shortest is compared with what is expected.
    pub min_ms: f64,
    pub median_ms: f64,
    /// Of the shortest time, and of valid pairs of query and key only.
    pub tflops: f64,
    pub expected: Option<Expected>,
}

/// What a device should do.
#[derive(Debug, Clone, Serialize)]
pub struct Expected {
    pub tflops: f64,
    /// Where the number comes from.
    pub by: &'static str,
    /// The share of it below which a device is slower than it should be.
    pub least: f64,
}

impl Speed {
    /// Measures for about so long. `cpu` is the speed of the CPU device.
    ///
    /// # Errors
    /// What makes calls fail.
    pub fn measure(device: &Device, budget: Duration, cpu: Option<f64>) -> Result<Self> {
        let capabilities = device.capabilities();
        let is_cpu = capabilities.backend == BackendKind::Cpu;
        let (flops, times, plan, shape) = match is_cpu {
            true => time::<f32>(device, budget)?,
            false => time::<f16>(device, budget)?,
        };
        let expected = match capabilities.backend {
            BackendKind::Cpu => Some(Expected {
                tflops: peak_tflops(threads(device), times.min)?,
                by: "multiplications and additions in registers, on as many threads",
                least: 0.4,
            }),
            BackendKind::Cuda => plan.estimate.map(|estimate| Expected {
                tflops: flops / estimate.time.as_secs_f64() / 1e12,
                by: "the cost model of this chip, or of the one before it",
                least: 0.5,
            }),
            BackendKind::Wgpu if !capabilities.is_software => {
                cpu.map(|tflops| Expected { tflops, by: "the CPU device, which a GPU should pass", least: 1.0 })
            }
            // Software adapters.
            _ => None,
        };
        let dtype = if is_cpu { DType::F32 } else { DType::F16 };
        Ok(Self {
            call: format!("{dtype} {shape:?}, rows 100, 60, 30 and 20 % valid"),
            plan: plan.to_string(),
            min_ms: milliseconds(times.min),
            median_ms: milliseconds(times.median),
            tflops: flops / times.min.as_secs_f64() / 1e12,
            expected,
        })
    }

    /// The share of what is expected.
    pub fn share(&self) -> Option<f64> {
        self.expected.as_ref().map(|expected| self.tflops / expected.tflops)
    }

    /// Whether it is slower than it should be.
    pub fn is_slow(&self) -> bool {
        self.expected.as_ref().is_some_and(|expected| self.tflops < expected.least * expected.tflops)
    }
}

/// Operations of a call, its times, its plan and its shape: the first shape whose call takes long enough.
fn time<T: Element>(device: &Device, budget: Duration) -> Result<(f64, Times, Plan, [usize; 4])> {
    let started = Instant::now();
    let mut seq = 128;
    let (mut call, once) = loop {
        let mut call = Call::new::<T>(device, seq)?;
        call.run(device, 1)?;
        let once = call.run(device, 1)?;
        if once >= LONG_ENOUGH || seq >= LONGEST || started.elapsed() > budget {
            break (call, once);
        }
        seq *= 2;
    };
    let count = (SAMPLE.as_nanos() / once.as_nanos().max(1)).clamp(1, 1000) as u32;
    let mut samples = vec![call.run(device, count)?];
    while started.elapsed() < budget {
        samples.push(call.run(device, count)?);
    }
    let plan = call.plan.context("no call was made")?;
    Ok((call.flops, Times::of(samples), plan, call.shape))
}

struct Call {
    shape: [usize; 4],
    flops: f64,
    inputs: [Tensor; 3],
    out: Tensor,
    meta: VarlenMeta,
    plan: Option<Plan>,
}

impl Call {
    fn new<T: Element>(device: &Device, seq: usize) -> Result<Self> {
        let shape = [BATCH, seq, HEADS, HEAD_DIM];
        let lengths = [100, 60, 30, 20].map(|percent| seq * percent / 100);
        let pairs: usize = lengths.iter().map(|length| length * length).sum();
        Ok(Self {
            shape,
            flops: 4.0 * (pairs * HEADS * HEAD_DIM) as f64,
            inputs: [tensor::<T>(device, 1, &shape)?, tensor::<T>(device, 2, &shape)?, tensor::<T>(device, 3, &shape)?],
            out: Tensor::zeros(device, T::DTYPE, &shape)?,
            meta: VarlenMeta::from_key_mask(&KeyMask::from_lengths(seq, &lengths)?)?,
            plan: None,
        })
    }

    /// The time of one call of so many.
    fn run(&mut self, device: &Device, count: u32) -> Result<Duration> {
        let Self { inputs: [q, k, v], out, meta, plan, .. } = self;
        let layer = MaskedAttention::new(device);
        let ((), timing) = device.time(|| {
            for _ in 0..count {
                *plan = Some(layer.forward_into(&*q, &*k, &*v, AttentionMask::varlen(&*meta), &mut *out)?);
            }
            Ok(())
        })?;
        Ok(timing.duration / count)
    }
}

fn threads(device: &Device) -> usize {
    device.config().threads.map_or_else(rayon::current_num_threads, usize::from)
}

/// TFLOP/s of nothing but multiplications and additions in registers, on so many threads at once. The best of some times, each as
/// long as the shortest call: other programs take as much from it as from a call.
fn peak_tflops(threads: usize, time: Duration) -> Result<f64> {
    let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
    let rate = |_: BroadcastContext<'_>| {
        let (started, mut rates) = (Instant::now(), Vec::new());
        while rates.is_empty() || started.elapsed() < time {
            rates.push(peak_gflops(pulp::Arch::new()));
        }
        // All do the same work, so the mean of their times is what counts.
        rates.len() as f64 / rates.iter().map(|rate| 1.0 / rate).sum::<f64>()
    };
    let total = || pool.broadcast(rate).into_iter().sum::<f64>();
    Ok((0..10).map(|_| total()).fold(0.0, f64::max) / 1e3)
}
