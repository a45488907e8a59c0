//! A block of a joint diffusion transformer in Qwen-Image's shape, checked against an f64 oracle.
//!
//! Text and image have tensors and weights of their own. Each is modulated by the time step,
//! projected, attended to together with the other, projected back, and goes through an MLP.
//! QK-norm, rotary embedding and attention are one call on the device; the rest is the host's, or on a
//! wgpu device that of shaders of the example's own: there a step is one submission. Weights and inputs
//! are random.

#[cfg(feature = "wgpu")]
#[path = "../external_wgpu/application.rs"]
#[expect(dead_code, reason = "here the device is the library's, there the application's")]
mod application;
mod block;
#[cfg(feature = "wgpu")]
mod on_wgpu;
mod oracle;
#[path = "../masked_attention/product.rs"]
mod product;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Parser;
use varlen_fa::{Config, Device, DeviceChoice, KeyMask, VarlenMeta};

use block::{Block, Sizes, Step};
use varlen_fa_harness::arguments::parse_device;
use varlen_fa_harness::report::exit_code;
use varlen_fa_harness::times::milliseconds;

/// Valid text tokens of each prompt; the others hold NaN.
const PROMPTS: [usize; 2] = [11, 24];
/// Tokens that the oracle answers for at the full width.
const SAMPLE: usize = 48;
/// How far an element may be from the oracle's, as a share of the largest one: products of f32.
const TOLERANCE: f64 = 2e-5;

/// Run a block shaped like Qwen-Image's, with QK-norm, rotary embedding and joint attention in one
/// call, and check it.
///
/// Fails if an element is too far from an f64 oracle.
#[derive(Debug, Parser)]
#[command(name = "joint_block", version)]
struct Arguments {
    /// cuda, cuda:N, wgpu or cpu; the best one that is there if it is left out
    #[arg(long, value_parser = parse_device)]
    device: Option<DeviceChoice>,
    /// 24 heads of 128, as in the model, and a sample of its tokens for the oracle: about 1.4 GB of
    /// memory
    #[arg(long)]
    full: bool,
}

fn main() -> ExitCode {
    env_logger::init();
    exit_code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut config = Config::from_env()?;
    if let Some(choice) = arguments.device {
        config = config.with_device(choice);
    }
    let device = Device::with_config(config)?;
    let sizes = match arguments.full {
        true => Sizes { heads: 24, head_dim: 128, text: 32, image: 256 },
        false => Sizes { heads: 4, head_dim: 32, text: 32, image: 96 },
    };
    let Sizes { heads, head_dim, text, image } = sizes;
    // Once per request: text that is padded to the right, then the image.
    let runs = PROMPTS.map(|valid| vec![0..valid, text..text + image]);
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_runs(text + image, &runs)?)?;
    println!("device     {}", device.capabilities());
    println!("block      {heads} heads of {head_dim}: text [2, {text}, {heads}, {head_dim}], image [2, {image}, …]");
    println!("tokens     {} of {} valid", meta.total_valid(), 2 * (text + image));

    let block = Block::random(sizes, &PROMPTS);
    let hidden = match step_on_wgpu(&device, &block, &meta)? {
        Some(hidden) => hidden,
        None => step_by_host(&device, &block, &meta)?,
    };

    let sample = if arguments.full { SAMPLE } else { usize::MAX };
    let oracle::Judged { tokens, error } = oracle::judge(&block, meta.key_mask(), &hidden, sample);
    println!("\ncheck      {tokens} tokens against f64: {error:.2e} of the largest element, allowed {TOLERANCE:.0e}");
    // Not `error > TOLERANCE`, which NaN passes.
    ensure!(tokens > 0 && error <= TOLERANCE, "the block's output is {error:.2e} from the oracle's");
    Ok(())
}

/// A step whose products are the host's.
fn step_by_host(device: &Device, block: &Block, meta: &VarlenMeta) -> Result<[Vec<f32>; 2]> {
    // The first step compiles shaders and wakes threads.
    block.step(device, meta)?;
    let Step { hidden, plan, before, attention, after } = block.step(device, meta)?;
    println!("joint      {plan}\n");
    line("modulation and projections, on the host", before);
    line("QK-norm, rotary embedding, joint attention", attention);
    line("projection, modulation and MLP, on the host", after);
    Ok(hidden)
}

/// A step in one submission, if the device is a wgpu device.
#[cfg(feature = "wgpu")]
fn step_on_wgpu(device: &Device, block: &Block, meta: &VarlenMeta) -> Result<Option<[Vec<f32>; 2]>> {
    let Some(mut on_wgpu) = on_wgpu::OnWgpu::new(device, block)? else { return Ok(None) };
    on_wgpu.step(meta)?;
    let on_wgpu::Submitted { plan, recorded, run } = on_wgpu.step(meta)?;
    println!("joint      {plan}\n");
    line("recording a step, host", recorded);
    line("its one submission, until it is done", run);
    Ok(Some(on_wgpu.hidden()?))
}

#[cfg(not(feature = "wgpu"))]
fn step_on_wgpu(_: &Device, _: &Block, _: &VarlenMeta) -> Result<Option<[Vec<f32>; 2]>> {
    Ok(None)
}

fn line(what: &str, time: Duration) {
    println!("{what:<44}{:>10.3} ms", milliseconds(time));
}
