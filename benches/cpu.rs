//! How well the CPU device uses the processor: for each instruction set, operations in a second
//! beside those of nothing but multiplications and additions in registers, and what softmax and
//! conversions take.
//!
//! ```text
//! cargo bench --no-default-features --bench cpu
//! ```

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Result;
use pulp::{Simd, WithSimd};
use rayon::{ThreadPool, ThreadPoolBuilder};
use varlen_fa::{
    AttentionMask, Config, CpuIsa, Device, DeviceChoice, Element, MaskedAttention, TensorView, TensorViewMut, bf16, f16,
};

/// Rounds, each of which times everything once; the best of all is printed.
const ROUNDS: usize = 12;
/// `[B, S, H, D]`: the shapes that `performance.md` has, the second with fewer heads.
const SHAPES: [[usize; 4]; 2] = [[2, 512, 12, 64], [1, 1024, 4, 128]];

fn main() -> Result<()> {
    // `cargo test` runs benches too, without `--bench`: there it is enough that they work.
    let (rounds, shapes) = match std::env::args().any(|argument| argument == "--bench") {
        true => (ROUNDS, SHAPES),
        false => (1, [[1, 24, 1, 8]; 2]),
    };
    let pool = |threads| ThreadPoolBuilder::new().num_threads(threads).build();
    let (one, all) = (pool(1)?, pool(0)?);
    println!(
        "GFLOP/s of one thread, and their share of the peak; times of one thread, and of all {}",
        all.current_num_threads()
    );
    for &isa in CpuIsa::ALL {
        let config = Config::default().with_device(DeviceChoice::Cpu).with_cpu_isa(Some(isa));
        let (Ok(device), Some(arch)) = (Device::with_config(config), arch(isa)) else { continue };
        let mut peak = 0.0_f64;
        let mut lines = Vec::new();
        for shape in shapes {
            let mut best = Best::default();
            for _ in 0..rounds {
                peak = peak.max(one.install(|| peak_gflops(arch)));
                best.round(&device, shape, &one, &all)?;
            }
            lines.push(best.line(shape));
        }
        println!("\n{isa}: peak {peak:.1} GFLOP/s a thread");
        for (gflops, line) in lines {
            println!("  {line}  {gflops:6.1} GFLOP/s, {:3.0} %", 100.0 * gflops / peak);
        }
    }
    Ok(())
}

/// The best times of a shape.
struct Best {
    f32: Duration,
    f16: Duration,
    bf16: Duration,
    /// The same with twice the head dimension.
    double: Duration,
    all_threads: Duration,
}

impl Default for Best {
    fn default() -> Self {
        let never = Duration::MAX;
        Self { f32: never, f16: never, bf16: never, double: never, all_threads: never }
    }
}

impl Best {
    fn round(&mut self, device: &Device, shape: [usize; 4], one: &ThreadPool, all: &ThreadPool) -> Result<()> {
        let [b, s, h, d] = shape;
        let keep = |best: &mut Duration, time: Duration| *best = time.min(*best);
        keep(&mut self.f32, one.install(|| time::<f32>(device, shape, |x| x))?);
        keep(&mut self.f16, one.install(|| time::<f16>(device, shape, f16::from_f32))?);
        keep(&mut self.bf16, one.install(|| time::<bf16>(device, shape, bf16::from_f32))?);
        keep(&mut self.double, one.install(|| time::<f32>(device, [b, s, h, 2 * d], |x| x))?);
        keep(&mut self.all_threads, all.install(|| time::<f32>(device, shape, |x| x))?);
        Ok(())
    }

    /// GFLOP/s of one thread, and the line of the table.
    ///
    /// What does not grow with the head dimension, twice the time less the time of twice the
    /// dimension, is the softmax: maxima, exponentials, sums, and stores of scores.
    fn line(&self, [b, s, h, d]: [usize; 4]) -> (f64, String) {
        let seconds = self.f32.as_secs_f64();
        let share = |extra: f64| 100.0 * extra / seconds;
        let softmax = share(2.0 * seconds - self.double.as_secs_f64());
        let conversion = |other: Duration| share(other.as_secs_f64() - seconds);
        let line = format!(
            "B{b} S{s} {h}x{d}: {:7.2} ms, {:7.2} ms; softmax {softmax:.0} %, conversion of f16 {:+.0} %, of bf16 {:+.0} %;",
            1e3 * seconds,
            1e3 * self.all_threads.as_secs_f64(),
            conversion(self.f16),
            conversion(self.bf16),
        );
        ((4 * b * s * s * h * d) as f64 / seconds / 1e9, line)
    }
}

/// One call, after one that is not timed.
fn time<T: Element>(device: &Device, shape: [usize; 4], convert: fn(f32) -> T) -> Result<Duration> {
    let len: usize = shape.iter().product();
    let values = |first: usize| -> Vec<T> {
        (first..first + len).map(|i| convert((i * 7919 % 1009) as f32 / 504.5 - 1.0)).collect()
    };
    let (q, k, v) = (values(0), values(1), values(2));
    let mut out = values(3);
    let mut taken = Duration::MAX;
    for _ in 0..2 {
        let [q, k, v] = [&q, &k, &v].map(|x| TensorView::from_host(x, &shape));
        let into = TensorViewMut::from_host(&mut out, &shape)?;
        let started = Instant::now();
        MaskedAttention::new(device).forward_into(q?, k?, v?, AttentionMask::none(), into)?;
        taken = started.elapsed();
    }
    Ok(taken)
}

/// The same instruction set in the crate that the peak is measured with.
fn arch(isa: CpuIsa) -> Option<pulp::Arch> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx512 => pulp::x86::V4::try_new().map(pulp::Arch::V4),
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx2 => pulp::x86::V3::try_new().map(pulp::Arch::V3),
        #[cfg(target_arch = "aarch64")]
        CpuIsa::Neon => pulp::aarch64::Neon::try_new().map(pulp::Arch::Neon),
        CpuIsa::Scalar => Some(pulp::Arch::Scalar),
        _ => None,
    }
}

/// Multiplications and additions on registers, as many at a time as hide their latency.
struct Peak {
    steps: usize,
}

const CHAINS: usize = 12;

impl WithSimd for Peak {
    /// Operations, and a value that depends on all of them.
    type Output = (usize, f32);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let (factor, addend) = (simd.splat_f32s(black_box(0.5)), simd.splat_f32s(black_box(1.0)));
        let mut chains = [simd.splat_f32s(1.0); CHAINS];
        for _ in 0..self.steps {
            for chain in &mut chains {
                *chain = simd.mul_add_e_f32s(*chain, factor, addend);
            }
        }
        let sum = chains.into_iter().fold(simd.splat_f32s(0.0), |sum, chain| simd.add_f32s(sum, chain));
        (2 * self.steps * CHAINS * S::F32_LANES, simd.reduce_sum_f32s(sum))
    }
}

fn peak_gflops(arch: pulp::Arch) -> f64 {
    let started = Instant::now();
    let (operations, value) = arch.dispatch(Peak { steps: 200_000 });
    let seconds = started.elapsed().as_secs_f64();
    black_box(value);
    operations as f64 / seconds / 1e9
}
