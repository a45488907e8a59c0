//! Scales and magnitudes.

use anyhow::{Context, Result, ensure};
use varlen_fa::DType;
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask};
use super::check::Rules;
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    trials.each_path("numerics/softmax_scales", softmax_scales);
    trials.each_path("numerics/largest_softmax_scales", largest_softmax_scales);
    trials.each_path("numerics/large_scores", large_scores);
    trials.each_path("numerics/largest_values", largest_values);
    trials.each_path_of(&[DType::F32, DType::Bf16], "numerics/overflowing_scores", overflowing_scores);
    trials.each_path("numerics/overflowing_products_with_the_scale", overflowing_products_with_the_scale);
    trials.each_path("numerics/scores_far_apart", scores_far_apart);
    trials.each_path("numerics/smallest_values", smallest_values);
    trials.each_path("numerics/equal_scores", equal_scores);
    trials.each_path("numerics/growing_scores", growing_scores);
    trials.each_path("numerics/outlying_values", outlying_values);
    trials.each_path("numerics/outlying_keys", outlying_keys);
    let halves = [DType::F16, DType::Bf16];
    trials.each_path_of(&halves, "numerics/outputs_are_rounded_to_nearest", outputs_are_rounded_to_nearest);
}

const SHAPE: OracleShape = OracleShape { batch: 2, seq_q: 150, seq_k: 150, heads: 2, kv_heads: 2, head_dim: 64 };

fn holes() -> Mask {
    Mask::Varlen((0..2 * 150).map(|at| at % 7 != 3 && at % 150 > 4).collect())
}

fn softmax_scales(variant: &Variant) -> Result<()> {
    for scale in [None, Some(0.0), Some(1.0 / 64.0), Some(1.0), Some(-0.125), Some(-0.0), Some(3.5)] {
        let mut call = Call::random(SHAPE, holes(), variant.dtype, 1);
        call.scale = scale;
        // Scores of scale 3.5 reach 100, where an f32 is off by 1e-5, and so is a weight; a naive run in 16 bits is far off.
        let rules = match scale {
            Some(scale) if scale.abs() >= 1.0 => Rules::fixed_only(variant.dtype, 1e-3),
            _ => Rules::standard(variant.dtype),
        };
        call.check_by(variant, rules).with_context(|| format!("softmax_scale {scale:?}"))?;
    }
    Ok(())
}

/// Scales whose product with log2(e) is beyond f32. Products of q and k are 1, 0 and -1, so that every score is a number.
fn largest_softmax_scales(variant: &Variant) -> Result<()> {
    let mut call = Call::random(SHAPE, holes(), variant.dtype, 10);
    let row = 2 * 64;
    for (tensor, factors) in [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]].into_iter().enumerate() {
        for (at, value) in call.values[tensor].iter_mut().enumerate() {
            *value = if at % 64 == 0 { factors[at / row % 150 % 3] } else { 0.0 };
        }
    }
    for scale in [2.4e38, f32::MAX, -2.4e38, f32::MIN] {
        call.scale = Some(scale);
        call.check_by(variant, Rules::fixed_only(variant.dtype, 1e-3))
            .with_context(|| format!("softmax_scale {scale}"))?;
    }
    Ok(())
}

/// Scores up to 20,000, exact in f32: whole numbers times a power of two.
fn large_scores(variant: &Variant) -> Result<()> {
    let mut call = Call::random(SHAPE, holes(), variant.dtype, 2);
    for values in &mut call.values[..2] {
        for value in values {
            *value = (*value * 8.0).round().clamp(-32.0, 32.0);
        }
    }
    for scale in [8.0, -8.0] {
        call.scale = Some(scale);
        // A kernel may scale q first, which puts scores off by 2^-24 of their size, and weights by as much in all.
        let rules = Rules::fixed_only(variant.dtype, 8.0 * 20_000.0 * 2f64.powi(-24));
        call.check_by(variant, rules).with_context(|| format!("softmax_scale {scale}"))?;
    }
    Ok(())
}

/// Every query is one key's twin: scores of the largest size, and one key that outweighs all others.
fn largest_values(variant: &Variant) -> Result<()> {
    let signs: Vec<f32> = random::normal(3, 2 * 150 * 2 * 64).iter().map(|value| value.signum()).collect();
    let (factor, largest) = match variant.dtype {
        DType::F16 => (65504.0, 65504.0),
        _ => (2f32.powi(40), 2f32.powi(100)),
    };
    let rows: Vec<f32> = signs.iter().map(|sign| sign * factor).collect();
    let values: Vec<f32> = signs.iter().rev().map(|sign| sign * largest).collect();
    for scale in [None, Some(1.0)] {
        let mut call = Call::new(SHAPE, holes(), variant.dtype, [rows.clone(), rows.clone(), values.clone()]);
        call.scale = scale;
        let atol = f64::from(largest) * 1e-4;
        call.check_by(variant, Rules::fixed_only(variant.dtype, atol)).with_context(|| format!("{scale:?}"))?;
    }
    Ok(())
}

/// Products of q and k beyond f32. +∞ among the scores makes a row NaN, and so does −∞ alone; −∞ beside numbers has no weight.
fn overflowing_scores(variant: &Variant) -> Result<()> {
    let mut call = Call::random(SHAPE, holes(), variant.dtype, 11);
    let (far, row) = (2f32.powi(100), 2 * 64);
    for (at, value) in call.values[0].iter_mut().enumerate() {
        *value = if at % 64 == 0 { [-far, 0.0, far][at / row % 150 % 3] } else { 0.0 };
    }
    for (at, value) in call.values[1].iter_mut().enumerate() {
        // In the second batch row, every third key has a score of 0.
        if at % 64 == 0 {
            *value = if at / row >= 150 && at / row % 3 == 0 { 0.0 } else { far };
        }
    }
    let kept = call.mask.query_keep().map(<[bool]>::to_vec).unwrap_or_default();
    for scale in [None, Some(-1.0)] {
        call.scale = scale;
        let lowest = if scale.is_some() { 2 } else { 0 };
        let is_nan = |batch: usize, query: usize| {
            kept[batch * 150 + query] && (query % 3 == 2 - lowest || (query % 3 == lowest && batch == 0))
        };
        let rules = Rules::fixed_only(variant.dtype, 1e-3);
        call.judge_beside_nan(&call.run(variant)?, &call.reference(usize::MAX)?, rules, is_nan)
            .with_context(|| format!("softmax_scale {scale:?}"))?;
    }
    Ok(())
}

/// Products of q and k that are numbers, but not times the scale. Kernels that scale differences of scores are right; others give
/// NaN. None gives anything else.
fn overflowing_products_with_the_scale(variant: &Variant) -> Result<()> {
    let mut call = Call::random(SHAPE, holes(), variant.dtype, 12);
    for (factor, values) in [2.0, 4.0].into_iter().zip(&mut call.values) {
        values.iter_mut().enumerate().for_each(|(at, value)| *value = if at % 64 == 0 { factor } else { 0.0 });
    }
    let kept = call.mask.query_keep().map(<[bool]>::to_vec).unwrap_or_default();
    for scale in [1e38, -1e38] {
        call.scale = Some(scale);
        let bits = call.run(variant)?;
        let out = call.widen(&bits);
        let is_nan = |batch: usize, query: usize| {
            let token = batch * 150 + query;
            kept[token] && out[token * 2 * 64].is_nan()
        };
        call.judge_beside_nan(&bits, &call.reference(usize::MAX)?, Rules::fixed_only(variant.dtype, 1e-3), is_nan)
            .with_context(|| format!("softmax_scale {scale}"))?;
    }
    Ok(())
}

/// Scores of 2^31 and -2^31 beside ordinary ones, in stretches of keys: what one stretch of keys leaves may be far out of what the next
/// one's is counted in. The second batch row has no keys but those of the first stretch.
fn scores_far_apart(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 2, seq_q: 150, seq_k: 400, heads: 2, kv_heads: 2, head_dim: 64 };
    let query = (0..2 * 150).map(|at| at % 7 != 3).collect();
    let key = (0..2 * 400).map(|at| at % 5 != 2 && (at < 400 || at % 400 < 64)).collect();
    let mut call = Call::random(shape, Mask::Cross { query, key }, variant.dtype, 9);
    let row = 2 * 64;
    let largest = 57344.0;
    for (at, value) in call.values[1].iter_mut().enumerate() {
        let key = at / row % 400;
        if at % 64 == 0 {
            *value = if key / 64 % 2 == 0 { -largest } else { 0.0 };
        }
    }
    for (at, value) in call.values[0].iter_mut().enumerate() {
        let factor = [largest, -largest, 0.0][at / row % 150 % 3];
        // A score of 2^31 leaves no bits for anything beside it.
        *value = if at % 64 == 0 {
            factor
        } else if factor == 0.0 {
            *value
        } else {
            0.0
        };
    }
    call.check_by(variant, Rules::fixed_only(variant.dtype, 1e-3))
}

/// Tiny q and k, whose scores are all but equal, and values at the bottom of the normal range.
fn smallest_values(variant: &Variant) -> Result<()> {
    let mut call = Call::random(SHAPE, holes(), variant.dtype, 4);
    let smallest = match variant.dtype {
        DType::F16 => 2f32.powi(-14),
        _ => 2f32.powi(-100),
    };
    let precision = super::memory::precision(variant.dtype);
    for values in &mut call.values {
        for value in values {
            *value = precision.round(value.signum() * value.abs().max(1.0) * smallest);
        }
    }
    // The outputs are means of about 120 such values: in f16 they fall below the normal range, where steps are 2^-24.
    let atol = f64::from(smallest) * 2f64.powi(-7);
    let bits = call.run(variant)?;
    let mut rules = Rules::fixed_only(variant.dtype, 0.0);
    rules.fixed.atol = atol;
    call.judge(&bits, &call.reference(usize::MAX)?, rules)
}

/// Keys that are all the same: every weight is one of as many as there are keys.
fn equal_scores(variant: &Variant) -> Result<()> {
    let mut call = Call::random(SHAPE, holes(), variant.dtype, 5);
    call.values[1].fill(1.5);
    call.check(variant)
}

/// Every few keys outweigh all before them, for some queries: what was summed up so far has to be scaled down again and again, by
/// factors that differ from row to row. For the other queries the keys only lose weight.
fn growing_scores(variant: &Variant) -> Result<()> {
    let mut call = Call::random(SHAPE, holes(), variant.dtype, 6);
    let row = 2 * 64;
    for (at, value) in call.values[1].iter_mut().enumerate() {
        // The first column of both heads grows by 1 with every fourth key; the others are small.
        let key = at / row % 150;
        *value = if at % 64 == 0 { (key / 4) as f32 } else { (*value * 4.0).round() / 64.0 };
    }
    for (at, value) in call.values[0].iter_mut().enumerate() {
        let query = at / row % 150;
        *value = if at % 64 == 0 { [8.0, 2.0, -4.0][query % 3] } else { (*value * 4.0).round() / 16.0 };
    }
    call.scale = Some(1.0);
    // Scores reach 300, where an f32 is off by 2^-16.
    call.check_by(variant, Rules::fixed_only(variant.dtype, 1e-3))
}

/// A large number, and one that the element type holds beside it.
fn outlier(dtype: DType) -> f32 {
    if dtype == DType::F16 { 2f32.powi(12) } else { 2f32.powi(60) }
}

/// A few values are far larger than all others, beyond what 16 bits with a short exponent hold.
fn outlying_values(variant: &Variant) -> Result<()> {
    let mut call = Call::random(SHAPE, holes(), variant.dtype, 7);
    let outlier = outlier(variant.dtype);
    for value in call.values[2].iter_mut().skip(3).step_by(611) {
        *value = value.signum() * outlier;
    }
    // Weights rounded to 16 bits are off by 2^-11 of their size.
    call.check_by(variant, Rules::fixed_only(variant.dtype, f64::from(outlier) * 2f64.powi(-11)))
}

/// A few keys and queries are far larger than all others, and scores are moderate.
fn outlying_keys(variant: &Variant) -> Result<()> {
    let mut call = Call::random(SHAPE, holes(), variant.dtype, 8);
    let (outlier, row) = (outlier(variant.dtype), 2 * 64);
    for (at, value) in call.values[1].iter_mut().enumerate() {
        if at / row % 5 == 0 {
            *value *= outlier;
        }
    }
    // Keys of ordinary size then have scores of almost nothing, and the others those of standard normal inputs.
    call.scale = Some(0.125 / outlier);
    call.check(variant)
}

/// Means that lie a quarter and three quarters of a step above a value of the element type, with every weight exact.
fn outputs_are_rounded_to_nearest(variant: &Variant) -> Result<()> {
    let step = if variant.dtype == DType::F16 { 2f32.powi(-10) } else { 2f32.powi(-7) };
    let shape = OracleShape { batch: 1, seq_q: 4, seq_k: 4, heads: 1, kv_heads: 1, head_dim: 8 };
    // Four keys with equal scores; in column c, `ups` of them hold the next value up.
    let ups = [0, 1, 3, 4, 0, 1, 3, 4];
    let values: Vec<f32> = (0..4 * 8)
        .map(|at| {
            let (key, column) = (at / 8, at % 8);
            let sign = if column < 4 { 1.0 } else { -1.0 };
            sign * (1.0 + if key < ups[column] { step } else { 0.0 })
        })
        .collect();
    let call = Call::new(shape, Mask::Varlen(vec![true; 4]), variant.dtype, [vec![1.0; 32], vec![1.0; 32], values]);
    let out = call.widen(&call.run(variant)?);
    let nearest = [1.0, 1.0, 1.0 + step, 1.0 + step];
    let expected: Vec<f32> = nearest.into_iter().chain(nearest.map(|value| -value)).collect();
    for row in out.chunks(8) {
        ensure!(row == expected, "expected {expected:?}, got {row:?}");
    }
    Ok(())
}
