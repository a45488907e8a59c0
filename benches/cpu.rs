//! How well the CPU device uses the processor: for each instruction set, operations in a second
//! beside those of nothing but multiplications and additions in registers, what the softmax takes,
//! f16 and bf16 beside f32, and text and image in segments beside one tensor.
//!
//! ```text
//! cargo bench --no-default-features --bench cpu
//! ```

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Result;
use rayon::{ThreadPool, ThreadPoolBuilder};
use varlen_fa::{
    AttentionMask, AttentionOutputs, Config, CpuIsa, Device, DeviceChoice, Element, MaskedAttention, TensorView,
    TensorViewMut, bf16, f16,
};

use varlen_fa_harness::peak::{CHAINS, peak_gflops};

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
        "GFLOP/s of one thread, and their share of the peak; times of f32, of one thread, and of all {}",
        all.current_num_threads()
    );
    for &isa in CpuIsa::ALL {
        let config = Config::default().with_device(DeviceChoice::Cpu).with_cpu_isa(Some(isa));
        let (Ok(device), Some(arch)) = (Device::with_config(config), arch(isa)) else { continue };
        let (mut peak, mut bf16_peak) = (0.0_f64, None);
        let mut lines = Vec::new();
        for shape in shapes {
            let mut best = Best::default();
            for _ in 0..rounds {
                peak = peak.max(one.install(|| peak_gflops(arch)));
                let bf16: Option<f64> = one.install(|| bf16_peak_gflops(isa));
                bf16_peak = bf16.map(|bf16| bf16.max(bf16_peak.unwrap_or(0.0)));
                best.round(&device, shape, &one, &all)?;
            }
            lines.push(best.line(shape));
        }
        print!("\n{isa}: peak {peak:.1} GFLOP/s a thread");
        println!("{}", bf16_peak.map_or(String::new(), |peak| format!(", of products of bf16 {peak:.1}")));
        for ([f32, bf16], line) in lines {
            println!(
                "  {line}; GFLOP/s: f32 {f32:.1}, {:.0} %, bf16 {bf16:.1}, {:.0} %",
                100.0 * f32 / peak,
                100.0 * bf16 / bf16_peak.unwrap_or(peak)
            );
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
    /// In two segments, of f32 on one thread.
    segments: Duration,
}

impl Default for Best {
    fn default() -> Self {
        let never = Duration::MAX;
        Self { f32: never, f16: never, bf16: never, double: never, all_threads: never, segments: never }
    }
}

impl Best {
    fn round(&mut self, device: &Device, shape: [usize; 4], one: &ThreadPool, all: &ThreadPool) -> Result<()> {
        let [b, s, h, d] = shape;
        let keep = |best: &mut Duration, time: Duration| *best = time.min(*best);
        keep(&mut self.f32, one.install(|| time::<f32>(device, shape, &[s], |x| x))?);
        keep(&mut self.segments, one.install(|| time::<f32>(device, shape, &[s / 8, s - s / 8], |x| x))?);
        keep(&mut self.f16, one.install(|| time::<f16>(device, shape, &[s], f16::from_f32))?);
        keep(&mut self.bf16, one.install(|| time::<bf16>(device, shape, &[s], bf16::from_f32))?);
        keep(&mut self.double, one.install(|| time::<f32>(device, [b, s, h, 2 * d], &[s], |x| x))?);
        keep(&mut self.all_threads, all.install(|| time::<f32>(device, shape, &[s], |x| x))?);
        Ok(())
    }

    /// GFLOP/s of one thread, of f32 and of bf16, and the line of the table.
    ///
    /// What does not grow with the head dimension, twice the time less the time of twice the
    /// dimension, is the softmax: maxima, exponentials, sums, and stores of scores.
    fn line(&self, [b, s, h, d]: [usize; 4]) -> ([f64; 2], String) {
        let seconds = self.f32.as_secs_f64();
        let softmax = 100.0 * (2.0 * seconds - self.double.as_secs_f64()) / seconds;
        let speed = |other: Duration| seconds / other.as_secs_f64();
        let line = format!(
            "B{b} S{s} {h}x{d}: {:.2} ms, {:.2} ms; softmax {softmax:.0} %, f16 {:.2}x as fast as f32, bf16 {:.2}x, segments {:.2}x",
            1e3 * seconds,
            1e3 * self.all_threads.as_secs_f64(),
            speed(self.f16),
            speed(self.bf16),
            speed(self.segments),
        );
        ([self.f32, self.bf16].map(|time| (4 * b * s * s * h * d) as f64 / time.as_secs_f64() / 1e9), line)
    }
}

/// One call on tensors in segments of these lengths, after one that is not timed.
fn time<T: Element>(
    device: &Device,
    [batch, _, heads, dim]: [usize; 4],
    lengths: &[usize],
    convert: fn(f32) -> T,
) -> Result<Duration> {
    let values = |first: usize| -> Vec<Vec<T>> {
        let value = |i: usize| convert((i * 7919 % 1009) as f32 / 504.5 - 1.0);
        let segment = |&length: &usize| (first..first + batch * length * heads * dim).map(value).collect();
        lengths.iter().map(segment).collect()
    };
    let inputs = [values(0), values(1), values(2)];
    let mut out = values(3);
    let mut taken = Duration::MAX;
    for _ in 0..2 {
        let [q, k, v] = inputs.each_ref().map(|segments| -> Result<Vec<_>, _> {
            let views = segments.iter().zip(lengths);
            let views = views.map(|(data, &length)| TensorView::from_host(data, &[batch, length, heads, dim]));
            views.collect()
        });
        let (q, k, v): (Vec<_>, Vec<_>, Vec<_>) = (q?, k?, v?);
        let views = out.iter_mut().zip(lengths);
        let views = views.map(|(data, &length)| TensorViewMut::from_host(data, &[batch, length, heads, dim]));
        let into = views.collect::<Result<Vec<_>, _>>()?;
        let started = Instant::now();
        MaskedAttention::new(device).forward_into(q, k, v, AttentionMask::none(), AttentionOutputs::new(into))?;
        taken = started.elapsed();
    }
    Ok(taken)
}

/// The same instruction set in the crate that the peak is measured with.
fn arch(isa: CpuIsa) -> Option<pulp::Arch> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx512 | CpuIsa::Avx512Bf16 => pulp::x86::V4::try_new().map(pulp::Arch::V4),
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx2 => pulp::x86::V3::try_new().map(pulp::Arch::V3),
        #[cfg(target_arch = "aarch64")]
        CpuIsa::Neon | CpuIsa::NeonBf16 => pulp::aarch64::Neon::try_new().map(pulp::Arch::Neon),
        CpuIsa::Scalar => Some(pulp::Arch::Scalar),
        _ => None,
    }
}

/// The same of products of bf16, where the instruction set has them.
fn bf16_peak_gflops(isa: CpuIsa) -> Option<f64> {
    const STEPS: usize = 200_000;
    match isa {
        #[cfg(target_arch = "x86_64")]
        CpuIsa::Avx512Bf16 if std::arch::is_x86_feature_detected!("avx512bf16") => {
            let started = Instant::now();
            // SAFETY: the processor has AVX512-BF16, and AVX512-F with it.
            let (operations, value) = unsafe { avx512_bf16_products(STEPS) };
            let seconds = started.elapsed().as_secs_f64();
            black_box(value);
            Some(operations as f64 / seconds / 1e9)
        }
        #[cfg(target_arch = "aarch64")]
        CpuIsa::NeonBf16 if std::arch::is_aarch64_feature_detected!("bf16") => {
            let started = Instant::now();
            // SAFETY: the processor has FEAT_BF16, and NEON with it.
            let (operations, value) = unsafe { neon_bf16_products(STEPS) };
            let seconds = started.elapsed().as_secs_f64();
            black_box(value);
            Some(operations as f64 / seconds / 1e9)
        }
        _ => None,
    }
}

/// Operations, and a value that depends on all of them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn avx512_bf16_products(steps: usize) -> (usize, f32) {
    use std::arch::x86_64::{
        _mm512_add_ps, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_reduce_add_ps, _mm512_set1_ps,
    };
    /// Products of a vector: pairs for each f32.
    const PRODUCTS: usize = 32;

    let (one, half) = (_mm512_set1_ps(black_box(1.0)), _mm512_set1_ps(black_box(0.5)));
    let (a, b) = (_mm512_cvtne2ps_pbh(one, half), _mm512_cvtne2ps_pbh(half, one));
    let mut chains = [one; CHAINS];
    for _ in 0..steps {
        for chain in &mut chains {
            *chain = _mm512_dpbf16_ps(*chain, a, b);
        }
    }
    let sum = chains.into_iter().fold(one, |sum, chain| _mm512_add_ps(sum, chain));
    (2 * steps * CHAINS * PRODUCTS, _mm512_reduce_add_ps(sum))
}

/// Operations, and a value that depends on all of them.
#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon,bf16")]
fn neon_bf16_products(steps: usize) -> (usize, f32) {
    use std::arch::aarch64::{float32x4_t, vaddq_f32, vaddvq_f32, vdupq_n_f32};
    /// Products of a vector: pairs for each f32.
    const PRODUCTS: usize = 8;

    // As pairs of bf16 their upper halves count, and the lower ones are 0.
    let (one, half) = (vdupq_n_f32(black_box(1.0)), vdupq_n_f32(black_box(0.5)));
    let mut chains: [float32x4_t; CHAINS] = [one; CHAINS];
    for _ in 0..steps {
        for chain in &mut chains {
            // SAFETY: computes on registers; the processor has the instruction.
            unsafe {
                std::arch::asm!(
                    "bfdot {chain:v}.4s, {one:v}.8h, {half:v}.8h",
                    chain = inout(vreg) *chain, one = in(vreg) one, half = in(vreg) half,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
    }
    let sum = chains.into_iter().fold(one, |sum, chain| vaddq_f32(sum, chain));
    (2 * steps * CHAINS * PRODUCTS, vaddvq_f32(sum))
}
