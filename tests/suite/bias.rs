//! Additive biases: every broadcast shape, both element types, any strides.

use anyhow::{Context, Result, ensure};
use varlen_fa::{AttentionMask, DType, Path, Reason};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask};
use super::check::Rules;
use super::masks::{bernoulli, mask};
use super::memory::{narrow, poison, precision, upload};
use super::rule::Rule;
use super::trials::{Trials, Variant};

const SHAPE: OracleShape = OracleShape { batch: 2, seq_q: 37, seq_k: 70, heads: 4, kv_heads: 2, head_dim: 32 };
const FULL: [usize; 4] = [SHAPE.batch, SHAPE.heads, SHAPE.seq_q, SHAPE.seq_k];

pub fn register(trials: &mut Trials) {
    trials.each_kernel_with_bias("bias/broadcast_shapes", broadcast_shapes);
    trials.each_kernel_with_bias("bias/broadcast_shapes_in_f32", broadcast_shapes_in_f32);
    trials.each_kernel_with_bias("bias/minus_infinity", minus_infinity);
    trials.each_kernel_with_bias("bias/rows_of_minus_infinity", rows_of_minus_infinity);
    trials.each_kernel_with_bias("bias/strided", strided);
    trials.each_kernel_with_bias("bias/odd_lengths", odd_lengths);
    trials.each_kernel_with_bias("bias/lowest_finite_values", lowest_finite_values);
    trials.each_kernel_with_bias("bias/overflowing_scores", overflowing_scores);
    trials.each_kernel_with_bias("bias/nan_of_a_key", nan_of_a_key);
    trials.each_kernel_with_bias("bias/metadata", metadata);
}

/// `values`, of `shape`, read as PyTorch broadcasts it to `full`.
pub fn broadcast(values: &[f32], shape: &[usize], full: [usize; 4]) -> Vec<f32> {
    let missing = 4 - shape.len();
    (0..full.iter().product())
        .map(|flat: usize| {
            let (mut rest, mut index) = (flat, [0; 4]);
            for dim in (0..4).rev() {
                (index[dim], rest) = (rest % full[dim], rest / full[dim]);
            }
            let place = shape
                .iter()
                .enumerate()
                .fold(0, |place, (dim, &size)| place * size + if size == 1 { 0 } else { index[missing + dim] });
            values[place]
        })
        .collect()
}

/// Runs and judges a call under the bias `values`, of `shape` and an element type of its own.
fn check(variant: &Variant, mut call: Call, bias: DType, values: &[f32], shape: &[usize]) -> Result<()> {
    let OracleShape { batch, seq_q, seq_k, heads, .. } = call.shape;
    call.bias = Some(broadcast(values, shape, [batch, heads, seq_q, seq_k]));
    let bits: Vec<u32> = values.iter().map(|&value| narrow(value, bias)).collect();
    let tensor = upload(&variant.device, bias, &bits, shape)?;
    let (plan, bits) = call.run_as(variant, AttentionMask::bias(tensor.view()))?;
    ensure!((plan.path, plan.reason) == (Path::Dense, Reason::Bias), "got {plan}");
    ensure!(plan.kernel == variant.kernel, "got {plan}");
    call.judge(&bits, &call.reference(usize::MAX)?, Rules::standard(variant.dtype))
}

fn call(variant: &Variant) -> Call {
    Call::random(SHAPE, Mask::None, variant.dtype, 1)
}

fn every_shape(variant: &Variant, bias: DType) -> Result<()> {
    let [b, h, q, k] = FULL;
    let shapes: [&[usize]; 14] = [
        &[1, 1, 1, k],
        &[b, 1, 1, k],
        &[b, h, q, k],
        &[k],
        &[q, k],
        &[h, q, k],
        &[1, h, 1, 1],
        &[b, 1, q, 1],
        &[1, 1, q, k],
        &[b, h, 1, k],
        &[h, 1, k],
        &[q, 1],
        &[1],
        &[1, 1, 1, 1],
    ];
    for shape in shapes {
        let values = random::normal_rounded(2, shape.len() as u64, shape.iter().product(), precision(bias));
        check(variant, call(variant), bias, &values, shape).with_context(|| format!("bias {shape:?}"))?;
    }
    Ok(())
}

fn broadcast_shapes(variant: &Variant) -> Result<()> {
    every_shape(variant, variant.dtype)
}

fn broadcast_shapes_in_f32(variant: &Variant) -> Result<()> {
    every_shape(variant, DType::F32)
}

/// An additive mask: 0 or −∞, per batch row, and per query.
fn minus_infinity(variant: &Variant) -> Result<()> {
    let [b, _, q, k] = FULL;
    for (shape, p) in [([b, 1, 1, k], 0.5), ([1, 1, q, k], 0.5), ([1, 1, q, k], 0.97)] {
        let dropped = random::bernoulli_mask(3, shape.iter().product(), p)?;
        let values: Vec<f32> = dropped.iter().map(|&drop| if drop { f32::NEG_INFINITY } else { 0.25 }).collect();
        for bias in [variant.dtype, DType::F32] {
            check(variant, call(variant), bias, &values, &shape).with_context(|| format!("{shape:?} in {bias}"))?;
        }
    }
    Ok(())
}

/// Rows whose every entry is −∞, beside others; then nothing else.
fn rows_of_minus_infinity(variant: &Variant) -> Result<()> {
    let [b, h, q, k] = FULL;
    let row = |row: usize| if row.is_multiple_of(3) { f32::NEG_INFINITY } else { 0.5 };
    let values: Vec<f32> = (0..b * h * q * k).map(|at| row(at / k)).collect();
    let batch_row: Vec<f32> = (0..b * k).map(|at| if at < k { f32::NEG_INFINITY } else { -1.0 }).collect();
    for bias in [variant.dtype, DType::F32] {
        check(variant, call(variant), bias, &values, &FULL).context("every third row")?;
        check(variant, call(variant), bias, &batch_row, &[b, 1, 1, k]).context("the first batch row")?;
        check(variant, call(variant), bias, &[f32::NEG_INFINITY], &[1]).context("every row")?;
    }
    Ok(())
}

/// Biases inside larger tensors and with dimensions in another order, also with the keys not innermost.
fn strided(variant: &Variant) -> Result<()> {
    let [b, h, q, k] = FULL;
    let full = [b, h, q, k];
    for (bias, order) in [DType::F32, variant.dtype]
        .into_iter()
        .flat_map(|bias| [[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [1, 3, 0, 2]].map(|order| (bias, order)))
    {
        // Memory has `order`'s dimensions, two places of poison before and three after each.
        let memory_shape = order.map(|dim| full[dim] + 5);
        let mut bits: Vec<u32> = (0..memory_shape.iter().product()).map(|place| poison(place, bias)).collect();
        let values = random::normal_rounded(4, 0, full.iter().product(), precision(bias));
        for (flat, &value) in values.iter().enumerate() {
            let index = [flat / k / q / h, flat / k / q % h, flat / k % q, flat % k];
            let place = order.iter().zip(memory_shape).fold(0, |place, (&dim, size)| place * size + index[dim] + 2);
            bits[place] = narrow(value, bias);
        }
        let memory = upload(&variant.device, bias, &bits, &memory_shape)?;
        let sliced =
            order.iter().enumerate().try_fold(memory.view(), |view, (at, &dim)| view.slice(at, 2..2 + full[dim]))?;
        let inverse = [0, 1, 2, 3].map(|dim| order.iter().position(|&at| at == dim).unwrap_or(dim));

        let mut call = call(variant);
        call.bias = Some(values);
        let (_, out) = call.run_as(variant, AttentionMask::bias(sliced.permute(&inverse)?))?;
        call.judge(&out, &call.reference(usize::MAX)?, Rules::standard(variant.dtype))
            .with_context(|| format!("{bias} in order {order:?}"))?;
    }
    Ok(())
}

/// Rows of 16-bit biases that start in the middle of a 32-bit word.
fn odd_lengths(variant: &Variant) -> Result<()> {
    for (seq_q, seq_k) in [(3, 1), (1, 3), (5, 33), (33, 65), (64, 129)] {
        let shape = OracleShape { batch: 2, seq_q, seq_k, heads: 2, kv_heads: 2, head_dim: 16 };
        let bias_shape = [2, 2, seq_q, seq_k];
        let values = random::normal_rounded(5, 0, bias_shape.iter().product(), precision(variant.dtype));
        let call = Call::random(shape, Mask::None, variant.dtype, 5);
        check(variant, call, variant.dtype, &values, &bias_shape).with_context(|| format!("{seq_q} × {seq_k}"))?;
    }
    Ok(())
}

/// Beside metadata and ranges, on every path that adds a bias: it counts positions of the padded tensors. The second batch row has
/// queries and no keys; a bias of −∞ hides a row, and keys of others.
fn metadata(variant: &Variant) -> Result<()> {
    let fused = variant.kernel.has_fused_bias();
    let paths = [None, Some(Path::Dense), Some(Path::Fused)];
    let [b, h, q, k] = FULL;
    let hides = |at: usize| at.is_multiple_of(5) || at / k % q == 3;
    let of_full = random::normal_rounded(6, 0, FULL.iter().product(), precision(variant.dtype));
    let of_full: Vec<f32> =
        of_full.into_iter().enumerate().map(|(at, x)| if hides(at) { f32::NEG_INFINITY } else { x }).collect();
    let of_keys = random::normal(7, b * k);
    let (query, some) = (bernoulli(8, b * q, 0.7)?, bernoulli(9, b * k, 0.6)?);
    let key = mask(b, k, |row, token| row == 0 && some[token]);
    let rules = [None, Some(Rule::Causal), Some(Rule::Window(Some(12), Some(5)))];
    for rule in rules.into_iter().filter(|rule| rule.is_none() || variant.kernel.has_ranges()) {
        for (bias, shape, values) in
            [(variant.dtype, &FULL[..], &of_full), (DType::F32, &FULL, &of_full), (DType::F32, &[b, 1, 1, k], &of_keys)]
        {
            for key in [key.clone(), some.clone()] {
                let mut call = Call::random(SHAPE, Mask::Cross { query: query.clone(), key }, variant.dtype, 6);
                call.rule = rule.clone();
                call.bias = Some(broadcast(values, shape, [b, h, q, k]));
                let bits: Vec<u32> = values.iter().map(|&value| narrow(value, bias)).collect();
                let tensor = upload(&variant.device, bias, &bits, shape)?;
                let reference = call.reference(usize::MAX)?;
                for path in paths.into_iter().filter(|&path| fused || path != Some(Path::Fused)) {
                    let variant = Variant { path, ..variant.clone() };
                    let bits = call.under_mask(&variant, |mask| {
                        let (plan, bits) = call.run_as(&variant, mask.with_bias(&tensor))?;
                        let taken = if path == Some(Path::Dense) || !fused { Path::Dense } else { Path::Fused };
                        ensure!(plan.path == taken, "got {plan}");
                        Ok((plan, bits))
                    })?;
                    call.judge(&bits, &reference, Rules::standard(variant.dtype))
                        .with_context(|| format!("{path:?}, {rule:?}, bias {shape:?} in {bias}"))?;
                }
            }
        }
    }
    Ok(())
}

/// NaN in one key makes NaN of every row that the bias does not hide it from, and of no other.
fn nan_of_a_key(variant: &Variant) -> Result<()> {
    let [b, h, q, k] = FULL;
    let at = 41;
    let hides = |row: usize| row.is_multiple_of(2);
    let values: Vec<f32> =
        (0..q * k).map(|place| if place % k == at && hides(place / k) { f32::NEG_INFINITY } else { 0.5 }).collect();
    let tensor = upload(&variant.device, DType::F32, &values.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), &[q, k])?;
    let mut call = call(variant);
    let row = SHAPE.kv_heads * SHAPE.head_dim;
    call.values[1][at * row..(at + 1) * row].fill(f32::NAN);
    let (_, bits) = call.run_as(variant, AttentionMask::bias(tensor.view()))?;
    for (place, out) in call.widen(&bits).chunks_exact(SHAPE.head_dim).enumerate() {
        let (batch, query) = (place / h / q, place / h % q);
        let is_nan = batch == 0 && !hides(query);
        ensure!(out.iter().all(|x| x.is_nan() == is_nan), "query {query} of batch row {batch} of {b}: got {out:?}");
    }
    Ok(())
}

/// As frameworks write masks: the most negative finite number instead of −∞. Beside other keys it drops a key; a row of nothing
/// else is a plain mean, since no score is large enough to make a difference.
fn lowest_finite_values(variant: &Variant) -> Result<()> {
    let [b, h, q, k] = FULL;
    for bias in [variant.dtype, DType::F32] {
        for lowest in [lowest(bias), precision(bias).round(lowest(bias) / 2.0)] {
            let values: Vec<f32> = (0..b * k).map(|at| if at % k < 20 { 0.0 } else { lowest }).collect();
            check(variant, call(variant), bias, &values, &[b, 1, 1, k])
                .with_context(|| format!("{lowest} in {bias}"))?;
        }
        // f16's lowest is small enough for scores to make a difference, and large enough to round them.
        if bias != DType::F16 {
            let row = |row: usize| if row.is_multiple_of(3) { lowest(bias) } else { 0.5 };
            let values: Vec<f32> = (0..b * h * q * k).map(|at| row(at / k)).collect();
            check(variant, call(variant), bias, &values, &FULL).with_context(|| format!("whole rows in {bias}"))?;
        }
    }
    Ok(())
}

/// Scaled scores beyond f32, before a bias is added. A bias of −∞ hides them; a row that it hides is +0.0. Other rows are NaN if
/// their scores include +∞ or are nothing but −∞.
fn overflowing_scores(variant: &Variant) -> Result<()> {
    const HIDDEN: f32 = f32::NEG_INFINITY;
    // Every key has `FAR` in column 0, and all but each fourth in column 1.
    const FAR: f32 = 16384.0;
    let has_score = |key: usize| key % 4 != 1;
    let ([_, _, q, k], dim) = (FULL, SHAPE.head_dim);
    let mut call = call(variant);
    call.scale = Some(2f32.powi(100));
    for (at, value) in call.values[1].iter_mut().enumerate() {
        let key = at / dim / SHAPE.kv_heads % k;
        match at % dim {
            0 => *value = FAR,
            1 => *value = if has_score(key) { FAR } else { 0.0 },
            _ => {}
        }
    }
    for bias in [variant.dtype, DType::F32] {
        // Of a query: what it has in columns 0 and 1, its bias for a key, and whether it is NaN.
        type Row = ([f32; 2], fn(usize, f32) -> f32, bool);
        let rows: [Row; 8] = [
            ([-FAR, 0.0], |_, _| 0.0, true),
            ([FAR, 0.0], |_, _| 0.0, true),
            ([-FAR, 0.0], |_, _| HIDDEN, false),
            ([FAR, 0.0], |_, _| HIDDEN, false),
            ([-FAR, 0.0], |key, _| if key == 5 { 0.5 } else { HIDDEN }, true),
            ([0.0, 0.0], |_, lowest| lowest, false),
            ([0.0, -FAR], |_, _| -0.5, false),
            ([0.0, FAR], |key, _| if key % 4 == 1 { 0.0 } else { HIDDEN }, false),
        ];
        for (at, value) in call.values[0].iter_mut().enumerate() {
            let query = at / dim / SHAPE.heads % q;
            *value = if at % dim < 2 { rows[query % 8].0[at % dim] } else { 0.0 };
        }
        let values: Vec<f32> = (0..q * k).map(|at| rows[at / k % 8].1(at % k, lowest(bias))).collect();
        call.bias = Some(broadcast(&values, &[q, k], FULL));
        let bits: Vec<u32> = values.iter().map(|&value| narrow(value, bias)).collect();
        let tensor = upload(&variant.device, bias, &bits, &[q, k])?;
        let (_, out) = call.run_as(variant, AttentionMask::bias(tensor.view()))?;
        let rules = Rules::fixed_only(variant.dtype, 1e-3);
        call.judge_beside_nan(&out, &call.reference(usize::MAX)?, rules, |_, query| rows[query % 8].2)
            .with_context(|| format!("bias in {bias}"))?;
    }
    Ok(())
}

fn lowest(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => varlen_fa::f16::MIN.to_f32(),
        DType::Bf16 => varlen_fa::bf16::MIN.to_f32(),
        _ => f32::MIN,
    }
}
