//! Attention inside an application's own wgpu commands: its pipeline writes q, k and v, our attention is recorded into the same
//! encoder, its pipeline reads the result; one submission a step, and no tensor is copied.
//!
//! The application is one residual attention block, `x += attention(x · w)`, over several steps. Nothing in `application.rs` knows
//! of varlen-fa; `block.rs` is where the two meet, and `check.rs` computes the same block on the CPU device.

mod application;
mod block;
mod check;

use std::num::NonZeroUsize;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use varlen_fa::{Config, Device, DeviceChoice, KeyMask, VarlenMeta};
use varlen_fa_testkit::Workload;

use application::Application;
use block::{Block, Sizes};
use varlen_fa_harness::times::{Times, milliseconds};

/// Run a residual attention block on the application's own wgpu device, attention recorded into its command encoder.
///
/// Each step is one command buffer: the application's projection writes q, k and v into its buffer, varlen-fa attends to the
/// valid tokens in place, the application's residual kernel adds the result to the hidden states. Fails if the hidden states
/// after all steps differ from a computation on the CPU device, or if a masked token changed at all.
#[derive(Debug, Parser)]
#[command(name = "external_wgpu", version)]
struct Arguments {
    /// Which tokens of the padded batch are valid; see `masked_attention --help`
    #[arg(long, value_name = "SPEC|NAME", default_value = "prefix:len=96:valid=96,41,7")]
    workload: Workload,
    /// Attention heads
    #[arg(long, value_name = "N", default_value = "4")]
    heads: NonZeroUsize,
    /// Elements of one head, from 1 to 512
    #[arg(long, value_name = "N", default_value = "32")]
    head_dim: NonZeroUsize,
    /// Steps, one submission each; times are their median, after the first
    #[arg(long, value_name = "N", default_value = "4")]
    steps: NonZeroUsize,
}

fn main() -> ExitCode {
    env_logger::init();
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(Arguments { workload, heads, head_dim, steps }: Arguments) -> Result<()> {
    let sizes = Sizes { batch: workload.batch, seq: workload.seq, heads: heads.get(), head_dim: head_dim.get() };

    let application = Application::new()?;
    let device = Device::from_wgpu(&application.device, &application.queue, Config::from_env_for(DeviceChoice::Wgpu)?)?;
    let mask = KeyMask::from_bool(sizes.batch, sizes.seq, &workload.mask)?;
    let meta = VarlenMeta::from_key_mask(&mask)?;
    let width = sizes.width();
    println!("device     {}, made by the application", device.name());
    println!("workload   {}: {} of {} tokens valid", workload.name, meta.total_valid(), workload.mask.len());
    println!(
        "tensors    f32, q, k and v: slices of the application's [{}, {}, 3·{heads}, {head_dim}] buffer",
        sizes.batch, sizes.seq
    );

    let hidden = varlen_fa_harness::random::standard_normal(1, sizes.tokens() * width);
    // Of deviation 1/√width: every projected value is again of deviation 1 or so.
    let scale = (width as f32).sqrt().recip();
    let weight: Vec<f32> = varlen_fa_harness::random::standard_normal(2, width * 3 * width)
        .into_iter()
        .map(|value| value * scale)
        .collect();

    let mut block = Block::new(&application, &device, sizes, &hidden, &weight)?;
    let mut stepped = Vec::new();
    for _ in 0..steps.get() {
        stepped.push(block.step(&application, &meta)?);
    }
    println!(
        "encoded    projection, attention and residual in one command buffer a step; {} submissions",
        stepped.len()
    );
    println!("attention  {}", stepped[0].plan);
    let warm = if stepped.len() > 1 { &stepped[1..] } else { &stepped[..] };
    let record = Times::of(warm.iter().map(|step| step.attention_recorded).collect());
    let run = Times::of(warm.iter().map(|step| step.run).collect());
    println!("\n{:<32} {:>12} {:>12} {:>12}", "a step after the first", "median ms", "min ms", "max ms");
    for (name, times) in [("recording attention, host", record), ("the submission, until done", run)] {
        let [median, min, max] = [times.median, times.min, times.max].map(milliseconds);
        println!("{name:<32} {median:>12.3} {min:>12.3} {max:>12.3}");
    }

    let got = block.hidden(&application)?;
    let expected = check::on_cpu(sizes, &hidden, &weight, &meta, stepped.len()).context("the check on the CPU")?;
    let error = check::relative_error(&got, &expected);
    let changed = check::changed_masked_tokens(&got, &hidden, &workload.mask, width);
    println!("\ncheck      {error:.2e} relative error against the CPU device after {} steps", stepped.len());
    println!("           {changed} of {} masked tokens changed", workload.mask.len() - meta.total_valid());
    ensure!(error < check::BOUND, "the result is {error:.2e} off, more than {:.0e}", check::BOUND);
    ensure!(changed == 0, "masked tokens changed");
    println!("           ok");
    Ok(())
}
