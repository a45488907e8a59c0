//! Score modifiers: soft cap, ALiBi and attention sinks, each alone and all together, beside every mask, range and bias.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Completion;
use varlen_fa::{AttentionMask, DType, Error, KeyMask, Path, RangesOf, ScoreModifiers, VarlenMeta, alibi_slopes};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask};
use super::check::Rules;
use super::head_dims;
use super::masks::{LENGTHS, bernoulli, mask};
use super::memory::upload;
use super::modifying::Modifying;
use super::packed::Packed;
use super::rule::Rule;
use super::trials::{Trials, Variant, is_emulated_gpu};

pub fn register(trials: &mut Trials) {
    trials.each_path_with_modifiers("modifiers/each_and_all", each_and_all);
    trials.each_path_with_modifiers("modifiers/with_ranges", with_ranges);
    trials.each_path_with_modifiers("modifiers/lengths_around_tiles", lengths_around_tiles);
    trials.each_path_with_modifiers("modifiers/every_tile_width", every_tile_width);
    trials.each_path_with_modifiers("modifiers/long_rows", long_rows);
    trials.each_path_with_modifiers(
        "modifiers/nan_reaches_only_queries_that_see_it",
        nan_reaches_only_queries_that_see_it,
    );
    trials.each_path_with_modifiers("modifiers/scores_beyond_f32_are_capped", scores_beyond_f32_are_capped);
    trials.each_path_with_modifiers("modifiers/none_of_them", none_of_them);
    trials.each_kernel_with_modifiers("modifiers/no_mask_and_key_masks", no_mask_and_key_masks);
    trials.each_kernel_with_modifiers("modifiers/with_bias", with_bias);
    trials.each_kernel_with_modifiers("modifiers/packed_rows", packed_rows);
    trials.each_kernel_with_modifiers("modifiers/packed_path_and_alibi", packed_path_and_alibi);
    trials.each_kernel_with_modifiers("modifiers/device_metadata", device_metadata);
}

/// Each modifier alone, small and large, and several together, for as many heads.
fn every(heads: usize) -> Vec<Modifying> {
    let none = Modifying::default;
    let sinks = |sink: fn(usize) -> f32| Some((0..heads).map(sink).collect::<Vec<_>>());
    let published = Some(alibi_slopes(heads));
    vec![
        Modifying { softcap: 0.5, ..none() },
        Modifying { softcap: 30.0, ..none() },
        Modifying { softcap: 1e5, ..none() },
        Modifying { slopes: published.clone(), ..none() },
        // Also of the other sign: distance attracts. Small: scores are rounded in f32.
        Modifying { slopes: Some((0..heads).map(|head| 0.04 - 0.04 * head as f32).collect()), ..none() },
        Modifying { sinks: sinks(|head| head as f32 - 1.0), ..none() },
        Modifying { sinks: sinks(|head| [f32::NEG_INFINITY, -1e30, 6.0, 60.0][head % 4]), ..none() },
        Modifying { softcap: 2.0, slopes: published.clone(), ..none() },
        Modifying { softcap: 1.0, slopes: published, sinks: sinks(|head| 0.5 * head as f32) },
    ]
}

/// [`every`], or all of them together, where an emulated GPU compiles a kernel for each set: there each
/// alone is for one trial of one path.
fn each(variant: &Variant, heads: usize) -> Vec<Modifying> {
    if is_emulated_gpu(&variant.device) { vec![all(heads)] } else { every(heads) }
}

/// The last of [`every`]: all of them.
fn all(heads: usize) -> Modifying {
    every(heads).pop().unwrap_or_default()
}

fn check(variant: &Variant, mut call: Call, modifying: Modifying, rule: Option<Rule>) -> Result<()> {
    let modifying = modifying.on(variant.path);
    let what = format!("{modifying:?}, {rule:?}");
    (call.modifying, call.rule) = (modifying, rule);
    call.check(variant).with_context(|| what)
}

fn each_and_all(variant: &Variant) -> Result<()> {
    let head_dim = head_dims::or_narrow(variant, 32);
    let shape = OracleShape { batch: 3, seq_q: 75, seq_k: 75, heads: 4, kv_heads: 2, head_dim };
    let masks = [
        mask(3, 75, |row, token| token < 75 - 20 * row),
        mask(3, 75, |row, token| token >= 20 * row),
        mask(3, 75, |row, token| token < 20 || token >= 50 + row),
        bernoulli(55, 3 * 75, 0.6)?,
    ];
    // On every device.
    let modifiers = if variant.path == Some(Path::Dense) { every(shape.heads) } else { each(variant, shape.heads) };
    for keep in masks {
        for modifying in modifiers.clone() {
            check(variant, Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 51), modifying, None)?;
        }
    }
    // Cross-attention, where the last query is level with the last key.
    for (seq_q, seq_k) in [(40, 100), (100, 40)] {
        let shape = OracleShape { seq_q, seq_k, ..shape };
        let masks = Mask::Cross { query: bernoulli(56, 3 * seq_q, 0.7)?, key: bernoulli(57, 3 * seq_k, 0.7)? };
        for modifying in each(variant, shape.heads) {
            check(variant, Call::random(shape, masks.clone(), variant.dtype, 52), modifying, None)?;
        }
    }
    Ok(())
}

fn with_ranges(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 2, seq_q: 90, seq_k: 90, heads: 4, kv_heads: 1, head_dim: 64 };
    let keep = bernoulli(58, 2 * 90, 0.7)?;
    // A query of the last sees no key.
    let own = (0..2 * 90).map(|at| [at * 31 % 90, at * 31 % 90 + at * 17 % (91 - at * 31 % 90)]).collect();
    for rule in [Rule::Causal, Rule::Window(Some(9), Some(4)), Rule::Prefix(20), Rule::Own(own)] {
        for modifying in each(variant, shape.heads) {
            let call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 53);
            check(variant, call, modifying, Some(rule.clone()))?;
        }
    }
    Ok(())
}

fn lengths_around_tiles(variant: &Variant) -> Result<()> {
    for &seq in &LENGTHS {
        let shape = OracleShape { batch: 2, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 1, head_dim: 64 };
        let keep = mask(2, seq, |row, token| row == 0 || token >= seq / 3);
        for rule in [None, Some(Rule::Causal)] {
            check(variant, Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 54), all(2), rule)?;
        }
    }
    Ok(())
}

fn every_tile_width(variant: &Variant) -> Result<Completion> {
    if is_emulated_gpu(&variant.device) && variant.path != Some(Path::Dense) {
        return Ok(Completion::ignored_with("on an emulated GPU the dense path alone: each width is compiled"));
    }
    for head_dim in head_dims::of(variant, &[8, 40, 64, 72, 96, 128, 136, 192, 256, 264, 512]) {
        let shape = OracleShape { batch: 2, seq_q: 70, seq_k: 70, heads: 2, kv_heads: 1, head_dim };
        let keep = bernoulli(59, 2 * 70, 0.7)?;
        for rule in [None, Some(Rule::Causal)] {
            check(variant, Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 55), all(2), rule)?;
        }
    }
    Ok(Completion::Completed)
}

/// Far keys: distances of thousands.
fn long_rows(variant: &Variant) -> Result<()> {
    let seq = 1500;
    let shape = OracleShape { batch: 1, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 2, head_dim: 16 };
    let keep = mask(1, seq, |_, token| token < 1400 && token % 11 != 5);
    for modifying in [Modifying { slopes: Some(alibi_slopes(2)), ..Modifying::default() }, all(2)] {
        check(variant, Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 56), modifying, None)?;
    }
    Ok(())
}

fn no_mask_and_key_masks(variant: &Variant) -> Result<()> {
    for (seq_q, seq_k) in [(75, 75), (40, 130), (130, 40), (1, 70), (70, 1)] {
        let shape = OracleShape { batch: 2, seq_q, seq_k, heads: 4, kv_heads: 2, head_dim: 32 };
        for modifying in each(variant, shape.heads) {
            for mask in [Mask::None, Mask::Key(bernoulli(60, 2 * seq_k, 0.6)?)] {
                for rule in [None, Some(Rule::Causal)] {
                    check(variant, Call::random(shape, mask.clone(), variant.dtype, 57), modifying.clone(), rule)?;
                }
            }
        }
    }
    Ok(())
}

/// A bias, ranges and metadata beside them, on every path that adds a bias. A bias of −∞ hides keys, and rows.
fn with_bias(variant: &Variant) -> Result<()> {
    let (batch, seq) = (2, 90);
    let shape = OracleShape { batch, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 2, head_dim: 32 };
    let keep = bernoulli(61, batch * seq, 0.7)?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(batch, seq, &keep)?)?;
    let hides = |at: usize| at.is_multiple_of(7) || at / seq % seq == 20;
    let bias: Vec<f32> = random::normal(58, 2 * seq * seq)
        .into_iter()
        .enumerate()
        .map(|(at, value)| if hides(at) { f32::NEG_INFINITY } else { value })
        .collect();
    let bits: Vec<u32> = bias.iter().map(|x| x.to_bits()).collect();
    let tensor = upload(&variant.device, DType::F32, &bits, &[2, seq, seq])?;
    for modifying in each(variant, shape.heads) {
        let modifiers = modifying.modifiers();
        for rule in [None, Some(Rule::Causal), Some(Rule::Window(Some(12), Some(12)))] {
            let mut call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 59);
            call.bias = Some([&bias[..], &bias[..]].concat());
            call.rule = rule.clone();
            call.modifying = modifying.clone();
            let ranges = rule.as_ref().map(|rule| rule.ranges(&RangesOf::from([batch, seq, seq]))).transpose()?;
            let mut mask = AttentionMask::varlen(&meta).with_bias(&tensor).with_modifiers(&modifiers);
            if let Some(ranges) = &ranges {
                mask = mask.with_ranges(ranges);
            }
            let reference = call.reference(usize::MAX)?;
            for path in [None, Some(Path::Dense)] {
                let variant = Variant { path, ..variant.clone() };
                let (plan, bits) = call.run_as(&variant, mask)?;
                ensure!(plan.kernel == variant.kernel, "got {plan}");
                call.judge(&bits, &reference, Rules::standard(variant.dtype))
                    .with_context(|| format!("{plan} {modifying:?} {rule:?}"))?;
            }
        }
    }
    Ok(())
}

/// Positions are those of each sequence; the log-sum-exp has the sink.
fn packed_rows(variant: &Variant) -> Result<()> {
    for (queries, keys) in [
        (&[40, 1, 0, 70, 129][..], &[40, 1, 5, 70, 129][..]),
        (&[30, 64, 7], &[65, 30, 0]),
        (&[1, 1, 1], &[200, 1, 64]),
    ] {
        for modifying in each(variant, 4) {
            for rule in [None, Some(Rule::Causal), Some(Rule::Window(Some(9), Some(4)))] {
                let what = format!("{modifying:?}, {rule:?}, queries {queries:?}, keys {keys:?}");
                let mut packed = Packed::random(variant.dtype, [4, 2, 64], queries, keys);
                (packed.rule, packed.modifying) = (rule, modifying.clone());
                packed.check(variant).with_context(|| what)?;
            }
        }
    }
    Ok(())
}

/// Rows that are packed have lost the positions that ALiBi counts in, so the path is refused.
fn packed_path_and_alibi(variant: &Variant) -> Result<()> {
    let shape = OracleShape::self_attention(1, 20, 2, 32);
    let mut call = Call::random(shape, Mask::Varlen(mask(1, 20, |_, token| token < 11)), variant.dtype, 60);
    call.modifying = all(2);
    let forced = Variant { path: Some(Path::Packed), ..variant.clone() };
    let refused = call.run(&forced).err().and_then(|error| error.downcast::<Error>().ok());
    ensure!(matches!(&refused, Some(Error::NotApplicable { argument: "path", .. })), "got {refused:?}");
    Ok(())
}

/// Metadata in the device's memory.
fn device_metadata(variant: &Variant) -> Result<Completion> {
    if varlen_fa::DeviceVarlenMeta::new(&variant.device, 1, 1).is_err() {
        return Ok(Completion::ignored_with("the device builds no metadata"));
    }
    let shape = OracleShape { batch: 2, seq_q: 75, seq_k: 75, heads: 4, kv_heads: 2, head_dim: 32 };
    for modifying in each(variant, shape.heads) {
        for path in [Path::Dense, Path::Fused] {
            let variant = Variant { path: Some(path), ..variant.clone() };
            let call = Call::random(shape, Mask::Device(bernoulli(62, 2 * 75, 0.7)?), variant.dtype, 61);
            check(&variant, call, modifying.clone(), None)?;
        }
    }
    Ok(Completion::Completed)
}

/// NaN in keys that a range hides from some queries; a cap and a sink hide no NaN.
fn nan_reaches_only_queries_that_see_it(variant: &Variant) -> Result<()> {
    let (seq, at) = (80, 50);
    let shape = OracleShape { batch: 1, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 2, head_dim: 32 };
    let keep = mask(1, seq, |_, token| token % 9 != 4);
    let row = shape.heads * shape.head_dim;
    for input in [1, 2] {
        for modifying in each(variant, shape.heads) {
            let modifying = modifying.on(variant.path);
            let mut call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 62);
            let reference = {
                (call.rule, call.modifying) = (Some(Rule::Causal), modifying.clone());
                call.reference(usize::MAX)?
            };
            call.values[input][at * row..(at + 1) * row].fill(f32::NAN);
            let bits = call.run(variant)?;
            // Values of weight 0 may or may not make NaN: sinks and slopes can be as large as that.
            let is_heavy = modifying.sinks.is_none() && modifying.slopes.is_none() || input == 1;
            if is_heavy {
                let is_nan = |_: usize, query: usize| keep[query] && query >= at;
                call.judge_beside_nan(&bits, &reference, Rules::standard(variant.dtype), is_nan)
                    .with_context(|| format!("{modifying:?}, input {input}"))?;
            }
            let out = call.widen(&bits);
            ensure!(
                out[..at * row].iter().all(|x| x.is_finite()),
                "{modifying:?}, input {input}: NaN in a row before it"
            );
        }
    }
    Ok(())
}

/// Scores beyond f32 are ±∞ before the cap, and ±cap after it; the oracle computes them as they are.
fn scores_beyond_f32_are_capped(variant: &Variant) -> Result<Completion> {
    if variant.dtype == DType::F16 {
        return Ok(Completion::ignored_with("no product of f16 is beyond f32"));
    }
    let (seq, far) = (60, 2f32.powi(100));
    let shape = OracleShape { batch: 1, seq_q: seq, seq_k: seq, heads: 2, kv_heads: 2, head_dim: 16 };
    let mut call = Call::random(shape, Mask::Varlen(mask(1, seq, |_, token| token >= 7)), variant.dtype, 63);
    for input in [0, 1] {
        for (at, value) in call.values[input].iter_mut().enumerate() {
            let token = at / 16 / shape.heads;
            *value = if at % 16 == 0 { [-far, 0.0, far][token * (input + 1) % 3] } else { 0.0 };
        }
    }
    for softcap in [0.5, 4.0] {
        let modifying = Modifying { softcap, ..all(2) };
        call.modifying = modifying.on(variant.path);
        call.check_by(variant, Rules::fixed_only(variant.dtype, 1e-3)).with_context(|| format!("cap {softcap}"))?;
    }
    Ok(Completion::Completed)
}

/// Modifiers without any modifier change no bit.
fn none_of_them(variant: &Variant) -> Result<()> {
    let shape = OracleShape::self_attention(2, 50, 2, 64);
    let keep = mask(2, 50, |row, token| token < 30 + row);
    let call = Call::random(shape, Mask::Varlen(keep.clone()), variant.dtype, 64);
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(2, 50, &keep)?)?;
    let (plan, without) = call.run_as(variant, AttentionMask::varlen(&meta))?;
    let none = ScoreModifiers::new();
    let (with_plan, with) = call.run_as(variant, AttentionMask::varlen(&meta).with_modifiers(&none))?;
    ensure!(plan == with_plan && with == without, "{plan}, {with_plan}");
    // A sink of −∞ takes no weight.
    let nothing = ScoreModifiers::new().with_sinks([f32::NEG_INFINITY; 2]);
    let (_, with) = call.run_as(variant, AttentionMask::varlen(&meta).with_modifiers(&nothing))?;
    call.judge(&with, &call.reference(usize::MAX)?, Rules::standard(variant.dtype))
}
