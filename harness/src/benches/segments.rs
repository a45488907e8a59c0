//! Times attention on text and image in tensors of their own beside the same call on concatenated
//! tensors, in turns on one device.
//!
//! ```text
//! cargo bench --bench segments -- --device cpu
//! ```

use std::io::Write;

use anyhow::{Result, ensure};
use clap::Args;
use varlen_fa::{AttentionMask, Device, Element, KeyMask, MaskedAttention, Tensor, VarlenMeta};

use crate::arguments::Problem;
use crate::comparison::{self, Comparison};
use crate::random::tensor;
use crate::report::Report;
use crate::times::{in_turns, repeats_of};
use varlen_fa_testkit::WorkloadKind;

/// Time segments against concatenated tensors.
#[derive(Debug, Args)]
pub struct TextAndImage {}

impl Comparison for TextAndImage {
    /// Qwen-Image at 1024² and eight requests of it at 512².
    const DEFAULTS: &'static [&'static str] =
        &["joint:text=512:image=4096:valid=256", "joint:text=512:image=1024:valid=37,512,211,80,300,140,64,400"];
    const SMOKE: &'static str = "joint:text=5:image=20:valid=3,5:heads=2:dim=16";

    fn time<T: Element>(&self, device: &Device, problem: &Problem, rounds: usize, report: &mut Report) -> Result<()> {
        let (shape, kv_shape) = (problem.shape(), problem.kv_shape());
        let [batch, seq, ..] = shape;
        let WorkloadKind::Joint { text, .. } = problem.workload.kind else {
            anyhow::bail!("expected a joint workload: segments are a text and an image");
        };
        ensure!(text < seq, "expected an image");
        let mask = KeyMask::from_bool(batch, seq, &problem.workload.mask)?;
        let meta = VarlenMeta::from_key_mask(&mask)?;

        let mut whole = tensors::<T>(device, shape, kv_shape, 1)?;
        let part = |seq, seed| {
            let ([batch, _, heads, dim], [.., kv_heads, _]) = (shape, kv_shape);
            tensors::<T>(device, [batch, seq, heads, dim], [batch, seq, kv_heads, dim], seed)
        };
        let (mut first, mut second) = (part(text, 11)?, part(seq - text, 21)?);
        let attention = MaskedAttention::new(device);
        let names = ["concatenated", "segments"];
        let repeats = repeats_of(device);
        let timed = in_turns(device, rounds, names.len(), |row| {
            let mask = AttentionMask::varlen(&meta);
            let mut call = || {
                if row == 0 {
                    let [q, k, v, out] = &mut whole;
                    return attention.forward_into(&*q, &*k, &*v, mask, out);
                }
                let ([q0, k0, v0, out0], [q1, k1, v1, out1]) = (&mut first, &mut second);
                attention.forward_into([&*q0, &*q1], [&*k0, &*k1], [&*v0, &*v1], mask, [out0, out1])
            };
            for _ in 1..repeats {
                call()?;
            }
            call()
        })?;
        writeln!(
            report.text,
            "\n{shape:?} {}, text of {text} tokens, {} of {} tokens valid",
            T::DTYPE,
            meta.total_valid(),
            batch * seq
        )?;
        comparison::report_ratios(
            (report, device, problem),
            (meta.total_valid(), repeats),
            names.into_iter().zip(timed),
        )
    }
}

/// q, k, v and the output.
fn tensors<T: Element>(device: &Device, shape: [usize; 4], kv_shape: [usize; 4], seed: u64) -> Result<[Tensor; 4]> {
    let tensor = |seed, shape: [usize; 4]| tensor::<T>(device, seed, &shape);
    Ok([tensor(seed, shape)?, tensor(seed + 1, kv_shape)?, tensor(seed + 2, kv_shape)?, tensor(seed + 3, shape)?])
}
