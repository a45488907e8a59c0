//! The CPU device beside candle's CPU attention on one padded batch, in turns, f32.
//!
//! ```text
//! cd benches/peers/candle && RUSTFLAGS="-C target-cpu=native" cargo run --release
//! ```
//!
//! candle chooses its instructions when it is compiled, so it is built for this processor; the
//! library chooses when it runs. `VARLEN_FA_CPU` forces its instruction set, `VARLEN_FA_THREADS` and
//! `RAYON_NUM_THREADS` the threads of either.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use candle_core::{D, Device as CandleDevice, Tensor as CandleTensor};
use candle_nn::attention::cpu_flash::varlen::flash_attn_varlen_cpu;
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};
use varlen_fa::{AttentionMask, Config, Device, DeviceChoice, KeyMask, MaskedAttention, Tensor, VarlenMeta};

const ROUNDS: usize = 9;
/// `[B, S, H, D]` and the valid tokens of each row: sentences of unequal length, and a batch without
/// padding.
const BATCHES: [([usize; 4], &[usize]); 3] = [
    ([8, 512, 12, 64], &[512, 64, 300, 128, 450, 200, 256, 138]),
    ([2, 512, 12, 64], &[512, 512]),
    ([32, 128, 12, 32], &[128, 16, 90, 24, 60, 33, 110, 12, 70, 44, 20, 101, 66, 30, 80, 52, 128, 16, 90, 24, 60, 33, 110, 12, 70, 44, 20, 101, 66, 30, 80, 52]),
];

fn main() -> Result<()> {
    let device = Device::with_config(Config::from_env_for(DeviceChoice::Cpu)?)?;
    println!("{}; medians of {ROUNDS} rounds in turns, ms", device.capabilities());
    for (shape, lengths) in BATCHES {
        run(&device, shape, lengths)?;
    }
    Ok(())
}

fn run(device: &Device, shape: [usize; 4], lengths: &[usize]) -> Result<()> {
    let [batch, seq, heads, dim] = shape;
    let mut random = StdRng::seed_from_u64(26318);
    let mut values = || -> Vec<f32> {
        (0..batch * seq * heads * dim).map(|_| StandardNormal.sample(&mut random)).collect()
    };
    let host = [values(), values(), values()];
    let mask = KeyMask::from_lengths(seq, lengths)?;
    let meta = VarlenMeta::from_key_mask(&mask)?;
    let scale = 1.0 / (dim as f64).sqrt();

    let [q, k, v] = host.each_ref().map(|values| Tensor::from_slice(device, values, &shape));
    let (q, k, v) = (q?, k?, v?);
    let mut out = Tensor::zeros(device, varlen_fa::DType::F32, &shape)?;
    let layer = MaskedAttention::new(device);

    let cpu = CandleDevice::Cpu;
    let padded = |values: &[f32]| CandleTensor::from_slice(values, &shape, &cpu);
    let [cq, ck, cv] = host.each_ref().map(|values| padded(values));
    let (cq, ck, cv) = (cq?, ck?, cv?);
    let packed = |values: &[f32]| -> Result<CandleTensor> {
        let row = heads * dim;
        let rows = lengths.iter().enumerate().flat_map(|(b, &length)| values[b * seq * row..][..length * row].to_vec());
        Ok(CandleTensor::from_vec(rows.collect::<Vec<f32>>(), (meta.total_valid(), heads, dim), &cpu)?)
    };
    let (pq, pk, pv) = (packed(&host[0])?, packed(&host[1])?, packed(&host[2])?);
    let lens: Vec<u32> = lengths.iter().map(|&length| length as u32).collect();
    let lens = CandleTensor::from_vec(lens, batch, &cpu)?;
    let keep = |b: usize, s: usize| if s < lengths[b] { 0.0 } else { f32::NEG_INFINITY };
    let bias: Vec<f32> = (0..batch * seq).map(|at| keep(at / seq, at % seq)).collect();
    let bias = CandleTensor::from_vec(bias, (batch, 1, 1, seq), &cpu)?;

    let mut ours = || -> Result<()> { Ok(layer.forward_into(&q, &k, &v, AttentionMask::varlen(&meta), &mut out).map(|_| ())?) };
    let varlen = || -> Result<CandleTensor> {
        let longest = meta.max_seqlen();
        let (lens_q, lens_k) = (&lens, &lens);
        Ok(flash_attn_varlen_cpu(&pq, &pk, &pv, None, lens_q, lens_k, longest, longest, scale as f32, false, None, None)?)
    };
    // As candle-transformers' encoders compute it.
    let standard = || -> Result<CandleTensor> {
        let by_head = |x: &CandleTensor| x.transpose(1, 2)?.contiguous();
        let (q, k, v) = (by_head(&cq)?, by_head(&ck)?, by_head(&cv)?);
        let scores = (q.matmul(&k.transpose(D::Minus2, D::Minus1)?)? * scale)?.broadcast_add(&bias)?;
        Ok(candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v)?.transpose(1, 2)?.contiguous()?)
    };

    let mut times: [Vec<Duration>; 3] = [const { Vec::new() }; 3];
    for round in 0..=ROUNDS {
        let mut took = [Duration::ZERO; 3];
        let started = Instant::now();
        ours()?;
        took[0] = started.elapsed();
        let started = Instant::now();
        std::hint::black_box(varlen()?);
        took[1] = started.elapsed();
        let started = Instant::now();
        std::hint::black_box(standard()?);
        took[2] = started.elapsed();
        if round > 0 {
            times.iter_mut().zip(took).for_each(|(times, took)| times.push(took));
        }
    }
    let (out, expected) = (out.to_vec::<f32>()?, standard()?.flatten_all()?.to_vec1::<f32>()?);
    let row = heads * dim;
    let valid = |at: usize| at / row % seq < lengths[at / row / seq];
    let worst = (0..out.len()).filter(|&at| valid(at)).map(|at| (out[at] - expected[at]).abs()).fold(0.0, f32::max);
    ensure!(worst < 1e-4, "outputs differ by {worst}");

    let [ours, varlen, standard] = times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e3
    });
    println!("{shape:?}, {} of {} tokens valid", meta.total_valid(), batch * seq);
    println!("  varlen-fa, padded              {ours:9.3}");
    println!("  candle, varlen on packed rows  {varlen:9.3}   {:5.2}x", varlen / ours);
    println!("  candle, standard with the mask {standard:9.3}   {:5.2}x", standard / ours);
    Ok(())
}
