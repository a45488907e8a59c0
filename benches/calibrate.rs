//! Measures the constants of the cost model on one GPU, and prints them as rows of `src/call/chips.rs`.
//!
//! Each constant follows from calls that differ in it alone. `benches/peers/fit_cost.py` fits the same constants to random calls.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use varlen_fa::{
    AttentionMask, Device, Element, Kernel, KeyMask, MaskedAttention, Path, Tensor, Tiling, VarlenMeta, VarlenOptions,
    bf16, pack_qkv, varlen_attention,
};

use varlen_fa_harness::arguments::parse_device;
use varlen_fa_harness::random::standard_normal;
use varlen_fa_harness::report::exit_code;

/// Widths of the kernels' tiles.
const WIDTHS: [usize; 6] = [32, 64, 96, 128, 192, 256];

/// Key tiles of a short and of a long call. Both launch far faster than they run.
const STEPS: [usize; 2] = [16, 64];

/// Query tiles of each block in the longer of two calls.
const WAVES: usize = 4;

/// Calls of a sample take at least this long.
const SAMPLE: Duration = Duration::from_millis(4);

/// Times what launches, tiles and copies take on a GPU.
#[derive(Debug, Parser)]
#[command(name = "calibrate", version)]
struct Arguments {
    /// cuda, cuda:N, wgpu or cpu [default: VARLEN_FA_DEVICE, or the best one present]
    #[arg(long, value_name = "DEVICE", value_parser = parse_device)]
    device: Option<varlen_fa::DeviceChoice>,
    /// Samples of each call, of which the least counts
    #[arg(long, value_name = "N", default_value = "7")]
    reps: NonZeroUsize,
    /// `cargo bench` passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    env_logger::init();
    exit_code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut config = varlen_fa::Config::from_env()?;
    config.device = arguments.device.unwrap_or(config.device);
    let device = Device::with_config(config)?;
    // `cargo test` runs benches too, without `--bench`: there it is enough that they work.
    let is_quick = !arguments.bench || device.capabilities().is_software;
    let bench = Bench {
        device: &device,
        samples: if is_quick { 2 } else { arguments.reps.get() },
        sample: if is_quick { Duration::ZERO } else { SAMPLE },
        steps: if is_quick { [2, 4] } else { STEPS },
    };
    println!("{}", device.name());
    match device.capabilities().dtypes.contains(&varlen_fa::DType::Bf16) && !device.capabilities().is_software {
        true => bench.all::<bf16>(),
        false => bench.all::<f32>(),
    }
}

/// How calls are timed.
struct Bench<'a> {
    device: &'a Device,
    samples: usize,
    sample: Duration,
    steps: [usize; 2],
}

/// The tile of a device without a cost model: its constants are then those of the whole device, as if it were one block.
struct Tile {
    rows: usize,
    keys: usize,
    /// Blocks that run at once, and multiprocessors.
    blocks: usize,
    multiprocessors: usize,
    by_groups: bool,
}

impl Bench<'_> {
    fn all<T: Element>(&self) -> Result<()> {
        self.copies::<T>()?;
        println!(
            "                                 item    listed scattered      step    masked   dropped     alone   launch, ns"
        );
        for &kernel in &self.device.capabilities().kernels {
            for width in WIDTHS {
                let tiling = self.device.capabilities().tiling(kernel, width);
                // A width that the kernel computes in a wider tile was measured, or will be.
                if width > kernel.max_head_dim() || tiling.is_some_and(|tiling| tiling.width != width) {
                    continue;
                }
                let measured = self.kernel::<T>(kernel, width, tiling);
                println!("{}", measured.with_context(|| format!("{kernel}, head dimension {width}"))?);
            }
        }
        Ok(())
    }

    /// What a launch of a kernel that copies costs, and the bytes it moves in a nanosecond.
    fn copies<T: Element>(&self) -> Result<()> {
        let (heads, dim) = (8, 128);
        let time = |batch: usize, seq: usize| -> Result<(f64, f64)> {
            let x = tensor::<T>(self.device, &[batch, seq, heads, dim])?;
            let valid: Vec<usize> = vec![seq - 1; batch];
            let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(seq, &valid)?)?;
            let time = self.time(|| pack_qkv(self.device, &x, &x, &x, &meta).map(drop))?;
            Ok((time, (2 * 3 * meta.total_valid() * heads * dim * size_of::<T>()) as f64))
        };
        let ((small, few), (large, many)) = (time(1, 16)?, time(8, if self.sample.is_zero() { 64 } else { 4096 })?);
        let rate = (many - few) / (large - small).max(1.0);
        println!("copy_launch: {small:.1}, copy_rate: {rate:.1}");
        Ok(())
    }

    fn kernel<T: Element>(&self, kernel: Kernel, width: usize, tiling: Option<Tiling>) -> Result<String> {
        let multiprocessors = self.device.capabilities().modelled_multiprocessors().unwrap_or(1);
        let tile =
            tiling.map_or(Tile { rows: 128, keys: 64, blocks: 1, multiprocessors: 1, by_groups: false }, |tiling| {
                Tile {
                    rows: tiling.rows,
                    keys: tiling.keys,
                    blocks: tiling.blocks * multiprocessors,
                    multiprocessors,
                    by_groups: kernel.works_by_tile_lists(),
                }
            });
        let [short, long] = self.steps;
        // One head of keys for all heads of queries, so that keys come from the cache, as they do where blocks share them.
        let by_path = |path: Path, heads: usize, waves: usize, keys: &KeyMask| -> Result<f64> {
            self.attention::<T>(kernel, path, [heads, waves * tile.rows, width], keys)
        };
        let call = |heads: usize, waves: usize, keys: &KeyMask| {
            by_path(if keys.is_all_kept() { Path::Dense } else { Path::Fused }, heads, waves, keys)
        };
        let all = |steps: usize| KeyMask::all(1, steps * tile.keys);
        let by_short = call(tile.blocks, 1, &all(short)?)?;
        let by_long = call(tile.blocks, 1, &all(long)?)?;
        let step = (by_long - by_short) / (long - short) as f64;
        let wave = (call(tile.blocks, WAVES, &all(short)?)? - by_short) / (WAVES - 1) as f64;
        let (item, launch) = (wave - short as f64 * step, by_short - wave);
        let alone = match tile.blocks == tile.multiprocessors {
            true => 1.0,
            false => {
                let [short_alone, long_alone] = [short, long].map(|steps| call(tile.multiprocessors, 1, &all(steps)?));
                (long_alone? - short_alone?) / (long - short) as f64 / step
            }
        };
        let (mut listed, mut dropped, mut scattered) = (0.0, 0.0, 0.0);
        let fused_short = by_path(Path::Fused, tile.blocks, 1, &all(short)?)?;
        let fused_long = by_path(Path::Fused, tile.blocks, 1, &all(long)?)?;
        // Of a kernel without tile lists: a tile that it gathers.
        let mut masked = (fused_long - fused_short) / (long - short) as f64;
        if tile.by_groups {
            listed = (fused_short - by_short).max(0.0);
            // Runs of 64 keys, four groups each without a dropped key; and groups of which every other key is dropped.
            let keys = long * tile.keys;
            let by_runs = call(tile.blocks, 1, &KeyMask::from_runs(keys / 64 * 65, &[runs(keys / 64, 65, 64)])?)?;
            let by_holes = call(tile.blocks, 1, &KeyMask::from_runs(keys, &[runs(keys / 2, 2, 1)])?)?;
            masked = step + (by_runs - by_long) / long as f64;
            dropped = (by_holes - by_runs) / (keys / 2) as f64;
            scattered = self.scattered::<T>(kernel, width, &tile)?;
        }
        Ok(format!(
            "{:<28} {item:>8.1}, {listed:>8.1}, {scattered:>8.1}, {step:>8.1}, {masked:>8.1}, {dropped:>8.2}, {alone:>8.2}   {launch:.1}",
            format!("{kernel}, {width}")
        ))
    }

    /// Nanoseconds of a call of these [heads, queries, head dimension].
    fn attention<T: Element>(
        &self,
        kernel: Kernel,
        path: Path,
        [heads, queries, dim]: [usize; 3],
        keys: &KeyMask,
    ) -> Result<f64> {
        let layer = MaskedAttention::new(self.device).with_kernel(kernel).with_path(path);
        let q = tensor::<T>(self.device, &[1, queries, heads, dim])?;
        let k = tensor::<T>(self.device, &[1, keys.seq(), 1, dim])?;
        let v = tensor::<T>(self.device, &[1, keys.seq(), 1, dim])?;
        let mut out = Tensor::zeros(self.device, T::DTYPE, &[1, queries, heads, dim])?;
        let query = VarlenMeta::from_key_mask(&KeyMask::all(1, queries)?)?;
        let key = VarlenMeta::from_key_mask(keys)?;
        let mask = if path == Path::Dense { AttentionMask::none() } else { AttentionMask::varlen_cross(&query, &key) };
        self.time(|| layer.forward_into(&q, &k, &v, mask, &mut out).map(drop))
    }

    /// What a query tile takes more where the kernel scatters it: the packed path less its pack and its attention.
    fn scattered<T: Element>(&self, kernel: Kernel, width: usize, tile: &Tile) -> Result<f64> {
        let (seq, heads) = (8 * tile.rows, tile.blocks / 4);
        let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(seq, &[seq - 1])?)?;
        let x = tensor::<T>(self.device, &[1, seq, heads, width])?;
        let mut out = Tensor::zeros(self.device, T::DTYPE, &[1, seq, heads, width])?;
        let layer = MaskedAttention::new(self.device).with_kernel(kernel).with_path(Path::Packed);
        let mask = AttentionMask::varlen(&meta);
        let whole = self.time(|| layer.forward_into(&x, &x, &x, mask, &mut out).map(drop))?;
        let pack = self.time(|| pack_qkv(self.device, &x, &x, &x, &meta).map(drop))?;
        let packed = pack_qkv(self.device, &x, &x, &x, &meta)?;
        let options = VarlenOptions::default().with_kernel(kernel);
        let lengths = meta.cu_seqlens();
        let attention =
            self.time(|| varlen_attention(self.device, packed.each_ref(), lengths, lengths, options).map(drop))?;
        // Eight query tiles of a quarter as many heads as there are blocks.
        Ok(((whole - pack - attention) / 2.0).max(0.0))
    }

    /// Nanoseconds of a call: the least of all samples.
    fn time(&self, mut call: impl FnMut() -> varlen_fa::Result<()>) -> Result<f64> {
        let mut calls = |count: u32| -> Result<Duration> {
            let ((), timing) = self.device.time(|| (0..count).try_for_each(|_| call()))?;
            Ok(timing.duration / count)
        };
        calls(1)?;
        let once = calls(1)?;
        let count = (self.sample.as_nanos() / once.as_nanos().max(1)).clamp(1, 256) as u32;
        let mut least = Duration::MAX;
        for _ in 0..self.samples {
            least = least.min(calls(count)?);
        }
        ensure!(!least.is_zero() || self.sample.is_zero(), "the device's clock does not advance");
        Ok(least.as_secs_f64() * 1e9)
    }
}

/// So many runs of `len` tokens, one each `period` tokens.
fn runs(count: usize, period: usize, len: usize) -> Vec<std::ops::Range<usize>> {
    (0..count).map(|at| at * period..at * period + len).collect()
}

/// Standard normal values, which repeat after a while: zeros would take less power, and so less time.
fn tensor<T: Element>(device: &Device, shape: &[usize]) -> Result<Tensor> {
    let len = shape.iter().product();
    let some: Vec<T> = standard_normal(7, 1 << 16).into_iter().map(T::from_f32).collect();
    let values: Vec<T> = some.into_iter().cycle().take(len).collect();
    Ok(Tensor::from_slice(device, &values, shape)?)
}
