//! A `TransformerEncoder` of burn on a padded batch: by burn alone, by its layers with burn's function `attention`, and by its
//! layers with varlen-fa's. The outputs on valid rows are compared, then all are timed in turns.
//!
//! ```text
//! cd adapters/burn && cargo run --release -p burn_encoder
//! cd adapters/burn && cargo run --release -p burn_encoder --features fusion -- --device wgpu
//! ```

mod encoder;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use burn_nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn_tensor::module::attention as burn_attention;
use burn_tensor::{Bool, Device, Distribution, Tensor, TensorData};
use clap::{Parser, ValueEnum};
use varlen_fa_burn::varlen_fa::{AttentionMask, VarlenMeta};
use varlen_fa_burn::{key_mask, masked_attention};

/// How near outputs of layers are, on valid rows.
const TOLERANCE: f32 = 1e-3;

/// burn's encoder under a padding mask, with its own attention and with varlen-fa's.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where to compute.
    #[arg(long, value_enum, default_value = "flex")]
    device: Backend,
    /// Sequences of the batch; their lengths are spread evenly from a sixteenth of --seq to all of it.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of the longest sequence: what the batch is padded to.
    #[arg(long, default_value_t = 512)]
    seq: usize,
    /// Layers of the encoder.
    #[arg(long, default_value_t = 2)]
    layers: usize,
    /// Heads, each of 64 elements.
    #[arg(long, default_value_t = 6)]
    heads: usize,
    /// Rounds of all ways in turns; the fastest of each counts.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
}

/// What computes.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Backend {
    /// burn's CPU backend.
    Flex,
    /// burn's wgpu runtime.
    #[cfg(feature = "wgpu")]
    Wgpu,
}

fn main() -> Result<()> {
    run(&Arguments::parse())
}

fn run(arguments: &Arguments) -> Result<()> {
    let &Arguments { batch, seq, layers, heads, rounds, .. } = arguments;
    ensure!(batch > 0 && seq > 0 && layers > 0 && heads > 0 && rounds > 0, "sizes and rounds must be at least 1");
    let device = open(arguments.device)?;
    let width = heads * 64;
    let config = TransformerEncoderConfig::new(width, 4 * width, heads, layers).with_dropout(0.0);
    let encoder = config.init(&device);

    let lengths: Vec<usize> = (0..batch).map(|b| (seq * (1 + 15 * (b + 1) / batch)).div_ceil(16).min(seq)).collect();
    let is_padding: Vec<bool> = lengths.iter().flat_map(|&length| (0..seq).map(move |s| s >= length)).collect();
    let padding = Tensor::<2, Bool>::from_data(TensorData::new(is_padding, [batch, seq]), &device);
    let x = Tensor::<3>::random([batch, seq, width], Distribution::Normal(0.0, 1.0), &device);
    // Once per request.
    let meta = VarlenMeta::from_key_mask(&key_mask(padding.clone())?)?;
    println!("{device:?}: {batch} sequences of {lengths:?} tokens, {heads} heads of 64, {layers} layers");
    println!("{:.0}% of the tokens are padding\n", 100.0 - 100.0 * meta.total_valid() as f64 / (batch * seq) as f64);

    let inputs = Inputs { encoder: &encoder, x, padding, meta: &meta };
    compare(
        "the encoder",
        &inputs,
        &[
            ("burn's TransformerEncoder", &|inputs| Ok(inputs.by_burn())),
            ("its layers, burn's `attention`", &|inputs| inputs.by_burns_attention()),
            ("its layers, varlen-fa", &|inputs| inputs.by_ours()),
        ],
        rounds,
        &lengths,
    )?;
    let shape = [batch, heads, seq, 64];
    let [q, k, v] = [(); 3].map(|()| Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), &device));
    let alone = Alone { qkv: [q, k, v], inputs: &inputs };
    compare(
        "attention alone",
        &alone,
        &[
            ("burn's `attention`", &|alone| Ok(by_token(alone.inputs.masked_by_burn(alone.qkv.clone())))),
            ("varlen-fa", &|alone| Ok(by_token(alone.inputs.masked_by_us(alone.qkv.clone())?))),
        ],
        rounds,
        &lengths,
    )
}

fn open(backend: Backend) -> Result<Device> {
    match backend {
        Backend::Flex => Ok(Device::flex()),
        #[cfg(feature = "wgpu")]
        Backend::Wgpu => {
            let (device, setup) = Device::wgpu_options().init_with_setup()?;
            varlen_fa_burn::share_wgpu(&device, &setup.device, &setup.queue)?;
            println!("{}", setup.adapter.get_info().name);
            Ok(device)
        }
    }
}

/// What all ways compute with.
struct Inputs<'a> {
    encoder: &'a TransformerEncoder,
    x: Tensor<3>,
    padding: Tensor<2, Bool>,
    meta: &'a VarlenMeta,
}

impl Inputs<'_> {
    fn by_burn(&self) -> Tensor<3> {
        self.encoder.forward(TransformerEncoderInput::new(self.x.clone()).mask_pad(self.padding.clone()))
    }

    fn by_burns_attention(&self) -> Result<Tensor<3>> {
        encoder::forward(self.encoder, self.x.clone(), |qkv| Ok(self.masked_by_burn(qkv)))
    }

    fn by_ours(&self) -> Result<Tensor<3>> {
        encoder::forward(self.encoder, self.x.clone(), |qkv| self.masked_by_us(qkv))
    }

    fn masked_by_burn(&self, [q, k, v]: [Tensor<4>; 3]) -> Tensor<4> {
        let [batch, heads, seq, _] = q.dims();
        let mask = self.padding.clone().reshape([batch, 1, 1, seq]).expand([batch, heads, seq, seq]);
        burn_attention(q, k, v, Some(mask), None, Default::default())
    }

    fn masked_by_us(&self, [q, k, v]: [Tensor<4>; 3]) -> Result<Tensor<4>> {
        Ok(masked_attention(q, k, v, AttentionMask::varlen(self.meta), None)?)
    }
}

struct Alone<'a> {
    qkv: [Tensor<4>; 3],
    inputs: &'a Inputs<'a>,
}

/// `[B, H, S, D]` as the next layer takes it, `[B, S, H·D]`.
fn by_token(x: Tensor<4>) -> Tensor<3> {
    let [batch, heads, seq, dim] = x.dims();
    x.swap_dims(1, 2).reshape([batch, seq, heads * dim])
}

/// A way to compute `[B, S, H·D]`, and what it is called.
type Way<'a, I> = (&'a str, &'a dyn Fn(&I) -> Result<Tensor<3>>);

/// Runs every way once and compares its valid rows with the first's, then times all in turns.
fn compare<I>(what: &str, inputs: &I, ways: &[Way<'_, I>], rounds: usize, lengths: &[usize]) -> Result<()> {
    let mut results = vec![];
    for (_, way) in ways {
        results.push(way(inputs)?.try_into_data()?.try_to_vec::<f32>()?);
    }
    let width = results[0].len() / lengths.len();
    let row = width / lengths.iter().max().copied().unwrap_or(1);
    let mut errors = vec![];
    for result in &results {
        let valid = lengths.iter().enumerate().flat_map(|(b, &length)| b * width..b * width + length * row);
        // A NaN stays, and is no small error.
        let error = valid
            .map(|at| (result[at] - results[0][at]).abs())
            .fold(0.0_f32, |most, error| if error <= most { most } else { error });
        ensure!(error <= TOLERANCE, "{what}: a valid row is {error} away from the first way's");
        errors.push(error);
    }

    let mut fastest = vec![Duration::MAX; ways.len()];
    for _ in 0..rounds {
        for ((_, way), fastest) in ways.iter().zip(&mut fastest) {
            let start = Instant::now();
            let out = way(inputs)?;
            // Waits for the device. On the CPU the work is done.
            out.device().sync()?;
            *fastest = start.elapsed().min(*fastest);
        }
    }
    println!("{what:<32} fastest ms   speed-up   largest difference");
    for (((name, _), time), error) in ways.iter().zip(&fastest).zip(&errors) {
        let speed_up = fastest[0].as_secs_f64() / time.as_secs_f64();
        println!("{name:<32} {:10.2}   {speed_up:7.2}×   {error:.1e}", time.as_secs_f64() * 1e3);
    }
    println!();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_encoder_agrees_on_valid_rows_on_every_backend() -> Result<()> {
        for &device in Backend::value_variants() {
            run(&Arguments { device, batch: 3, seq: 33, layers: 2, heads: 2, rounds: 1 })?;
        }
        Ok(())
    }
}
