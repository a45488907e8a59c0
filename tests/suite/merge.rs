//! Attention over all keys from attention over parts of them.

use anyhow::{Context, Result, ensure};
use varlen_fa::{
    AttentionMask, AttentionOutputs, CuSeqlens, DType, Device, Error, KeyMask, Tensor, VarlenOptions, merge_attention,
    merge_attention_into, varlen_attention,
};
use varlen_fa_testkit::{OracleShape, Tolerance, check_close, random};

use super::call::{Call, Mask};
use super::check::Rules;
use super::lse;
use super::memory::{download, narrow, precision, sentinel, upload, widen};
use super::packed::Packed;
use super::trials::{Trials, Variant};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

pub fn register(trials: &mut Trials) {
    trials.each_kernel("merge/halves_of_the_keys", halves_of_the_keys);
    trials.each_kernel("merge/packed_halves_of_the_keys", packed_halves_of_the_keys);
    trials.once("merge/formula", formula);
    trials.once("merge/parts_without_keys", parts_without_keys);
    trials.once("merge/nan", nan);
    trials.once("merge/strided", strided);
    trials.once("merge/nothing", nothing);
    trials.once("merge/refusals", refusals);
}

/// Merged parts are the attention over all keys, of the oracle and of the same kernel; parts may have no key of a batch row.
fn halves_of_the_keys(variant: &Variant) -> Result<()> {
    let (device, dtype) = (&variant.device, variant.dtype);
    for (seq_q, seq_k, head_dim, cut) in [(75, 75, 32, 40), (40, 130, 64, 0), (33, 90, 128, 90), (64, 64, 8, 1)] {
        let shape = OracleShape { batch: 2, seq_q, seq_k, heads: 4, kv_heads: 2, head_dim };
        let mut call = Call::random(shape, Mask::None, dtype, 61);
        let tensor = |input: usize, shape: [usize; 4]| {
            let bits: Vec<u32> = call.values[input].iter().map(|&value| narrow(value, dtype)).collect();
            upload(device, dtype, &bits, &shape)
        };
        let q = tensor(0, [2, seq_q, 4, head_dim])?;
        let (k, v) = (tensor(1, [2, seq_k, 2, head_dim])?, tensor(2, [2, seq_k, 2, head_dim])?);
        // The second batch row keeps keys of the first part alone.
        let keep = super::masks::mask(2, seq_k, |row, key| row == 0 || key < cut);
        let part = |keys: std::ops::Range<usize>| {
            let of_part = super::masks::mask(2, keys.len(), |row, key| keep[row * seq_k + keys.start + key]);
            let mask = KeyMask::from_bool(2, keys.len(), &of_part)?;
            let slice = |x: &Tensor| -> Result<Tensor> {
                let (row, bits) = (2 * head_dim, download(x)?);
                let rows = (0..2).flat_map(|b| keys.clone().map(move |key| b * seq_k + key));
                let bits: Vec<u32> = rows.flat_map(|at| bits[at * row..][..row].to_vec()).collect();
                upload(device, dtype, &bits, &[2, keys.len(), 2, head_dim])
            };
            let attended =
                variant.layer().with_lse().forward(&q, &slice(&k)?, &slice(&v)?, AttentionMask::key(&mask))?;
            anyhow::Ok((attended.out, attended.lse.context("lse was asked for")?))
        };
        let ((out1, lse1), (out2, lse2)) = (part(0..cut)?, part(cut..seq_k)?);
        let merged = merge_attention(device, &out1, &lse1, &out2, &lse2)?;
        call.mask = Mask::Key(keep);
        // The parts are rounded too.
        let yardsticks = Rules::standard(dtype).yardsticks.map(|mut yardsticks| {
            yardsticks.field *= 2.0;
            yardsticks
        });
        call.judge(
            &download(&merged.out)?,
            &call.reference(usize::MAX)?,
            Rules { yardsticks, ..Rules::standard(dtype) },
        )
        .with_context(|| format!("cut at {cut}"))?;
        lse::judge(&merged.lse.to_vec::<f32>()?, &call.reference_lse()?)?;
        // In the other order, the same.
        let swapped = merge_attention(device, &out2, &lse2, &out1, &lse1)?;
        ensure!(download(&swapped.out)? == download(&merged.out)?, "the order of the parts changes the output");
        ensure!(download(&swapped.lse)? == download(&merged.lse)?, "the order of the parts changes the lse");
    }
    Ok(())
}

/// The same of packed rows: the keys of each sequence in two parts, of which one may be empty.
fn packed_halves_of_the_keys(variant: &Variant) -> Result<()> {
    let (device, dtype) = (&variant.device, variant.dtype);
    let (queries, first, second) = ([30, 5, 64, 0, 7], [20, 0, 65, 4, 0], [11, 33, 0, 9, 0]);
    let packed = Packed::random(dtype, [4, 2, 64], &queries, &[31, 33, 65, 13, 0]);
    let [q, k, v] = packed.tensors(device)?;
    let part = |lengths: [usize; 5], others: [usize; 5], is_first: bool| {
        let mut rows = Vec::new();
        let mut start = 0;
        for (length, other) in lengths.into_iter().zip(others) {
            let from = if is_first { start } else { start + other };
            rows.extend(from..from + length);
            start += length + other;
        }
        let gather = |x: &Tensor| -> Result<Tensor> {
            let bits = download(x)?;
            let bits: Vec<u32> = rows.iter().flat_map(|&row| bits[row * 128..][..128].to_vec()).collect();
            upload(device, dtype, &bits, &[rows.len(), 2, 64])
        };
        let cu_q = CuSeqlens::from_lengths(&queries)?;
        let cu_k = CuSeqlens::from_lengths(&lengths)?;
        let options = VarlenOptions::default().with_kernel(variant.kernel).with_lse();
        let attended = varlen_attention(device, [&q, &gather(&k)?, &gather(&v)?], &cu_q, &cu_k, options)?;
        anyhow::Ok((attended.out, attended.lse.context("lse was asked for")?))
    };
    let ((out1, lse1), (out2, lse2)) = (part(first, second, true)?, part(second, first, false)?);
    let merged = merge_attention(device, &out1, &lse1, &out2, &lse2)?;
    let mut rules = Rules::standard(dtype);
    rules.yardsticks = rules.yardsticks.map(|mut yardsticks| {
        yardsticks.relative *= 2.0;
        yardsticks
    });
    packed.judge(&merged.out, Some(&merged.lse), rules)
}

/// What merging gives, in f64.
fn expected([lse1, lse2]: [f64; 2], out1: &[f64], out2: &[f64]) -> (f64, Vec<f64>) {
    let [weight1, weight2] = [lse1, lse2].map(f64::exp);
    let sum = weight1 + weight2;
    let of = |(a, b): (&f64, &f64)| if sum == 0.0 { 0.0 } else { (weight1 * a + weight2 * b) / sum };
    (sum.ln(), out1.iter().zip(out2).map(of).collect())
}

/// One part on a device: `[B, S, H, D]` bits and `[B, H, S]`.
struct Part {
    bits: Vec<u32>,
    lse: Vec<f32>,
}

impl Part {
    fn random([batch, seq, heads, dim]: [usize; 4], dtype: DType, seed: u64) -> Self {
        let values = random::normal_rounded(seed, 0, batch * seq * heads * dim, precision(dtype));
        let lse = random::normal(seed + 1, batch * seq * heads).into_iter().map(|value| 4.0 * value).collect();
        Self { bits: values.into_iter().map(|value| narrow(value, dtype)).collect(), lse }
    }

    fn tensors(&self, device: &Device, dtype: DType, [batch, seq, heads, dim]: [usize; 4]) -> Result<[Tensor; 2]> {
        let lse: Vec<u32> = self.lse.iter().map(|lse| lse.to_bits()).collect();
        Ok([
            upload(device, dtype, &self.bits, &[batch, seq, heads, dim])?,
            upload(device, DType::F32, &lse, &[batch, heads, seq])?,
        ])
    }
}

fn merge_parts(device: &Device, dtype: DType, shape: [usize; 4], parts: &[Part; 2]) -> Result<(Vec<f32>, Vec<f32>)> {
    let ([out1, lse1], [out2, lse2]) =
        (parts[0].tensors(device, dtype, shape)?, parts[1].tensors(device, dtype, shape)?);
    let merged = merge_attention(device, &out1, &lse1, &out2, &lse2)?;
    ensure!(merged.out.shape() == shape && merged.out.dtype() == dtype, "got {:?}", merged.out);
    let [batch, seq, heads, _] = shape;
    ensure!(merged.lse.shape() == [batch, heads, seq] && merged.lse.dtype() == DType::F32, "got {:?}", merged.lse);
    Ok((download(&merged.out)?.into_iter().map(|bits| widen(bits, dtype)).collect(), merged.lse.to_vec::<f32>()?))
}

fn formula(device: &Device) -> Result<()> {
    for dtype in DTYPES {
        for shape in [[3, 50, 4, 64], [1, 1, 1, 8], [2, 129, 3, 40], [1, 700, 2, 256], [2, 21, 3, 5], [1, 9, 2, 111]] {
            let [_, seq, heads, dim] = shape;
            let parts = [Part::random(shape, dtype, 62), Part::random(shape, dtype, 64)];
            let (out, lse) = merge_parts(device, dtype, shape, &parts)?;
            let row = |part: &Part, at: usize| -> Vec<f64> {
                part.bits[at * dim..][..dim].iter().map(|&bits| f64::from(widen(bits, dtype))).collect()
            };
            let mut expected_out = Vec::new();
            let mut expected_lse = vec![0.0; lse.len()];
            for at in 0..lse.len() {
                let (b, s, h) = (at / heads / seq, at / heads % seq, at % heads);
                let lse_at = (b * heads + h) * seq + s;
                let lses = [&parts[0], &parts[1]].map(|part| f64::from(part.lse[lse_at]));
                let (lse, out) = expected(lses, &row(&parts[0], at), &row(&parts[1], at));
                expected_lse[lse_at] = lse;
                expected_out.extend(out);
            }
            check_close("out", shape, &out, &expected_out, Tolerance::fixed(precision(dtype)))?;
            lse::judge(&lse, &expected_lse)?;
        }
    }
    Ok(())
}

/// The other part comes out as it is, whatever a part without keys holds; zeros and −∞ if neither has a key.
fn parts_without_keys(device: &Device) -> Result<()> {
    let shape = [2, 21, 3, 16];
    for dtype in DTYPES {
        for poison in [f32::NAN, f32::INFINITY, 0.0] {
            let mut parts = [Part::random(shape, dtype, 65), Part::random(shape, dtype, 67)];
            let whole = parts.each_ref().map(|part| part.bits.clone());
            let has_keys = |part: usize, at: usize| at % 4 != part && at % 4 != 2;
            for (number, part) in parts.iter_mut().enumerate() {
                for at in 0..2 * 21 * 3 {
                    let (b, s, h) = (at / 63, at / 3 % 21, at % 3);
                    if !has_keys(number, at) {
                        part.lse[(b * 3 + h) * 21 + s] = f32::NEG_INFINITY;
                        part.bits[at * 16..][..16].fill(narrow(poison, dtype));
                    }
                }
            }
            let (out, lse) = merge_parts(device, dtype, shape, &parts)?;
            for (at, row) in out.chunks(16).enumerate() {
                let (b, s, h) = (at / 63, at / 3 % 21, at % 3);
                let lse_at = (b * 3 + h) * 21 + s;
                match (has_keys(0, at), has_keys(1, at)) {
                    (true, true) => ensure!(row.iter().all(|value| value.is_finite()), "row {at}: {row:?}"),
                    (false, false) => {
                        ensure!(row.iter().all(|value| value.to_bits() == 0), "row {at}: expected +0.0, got {row:?}");
                        ensure!(lse[lse_at] == f32::NEG_INFINITY, "row {at}: expected −∞, got {}", lse[lse_at]);
                    }
                    (is_first, _) => {
                        let part = usize::from(!is_first);
                        let expected = whole[part][at * 16..][..16].iter().map(|&bits| widen(bits, dtype));
                        ensure!(row.iter().copied().eq(expected), "row {at}: got {row:?}");
                        ensure!(lse[lse_at] == parts[part].lse[lse_at], "row {at}: lse {}", lse[lse_at]);
                    }
                }
            }
        }
    }
    Ok(())
}

/// NaN in a part that counts reaches its element, NaN in a log-sum-exp the whole row, and nothing else.
fn nan(device: &Device) -> Result<()> {
    let shape = [1, 9, 2, 16];
    for dtype in DTYPES {
        let mut parts = [Part::random(shape, dtype, 69), Part::random(shape, dtype, 71)];
        parts[0].bits[3 * 16 + 5] = narrow(f32::NAN, dtype);
        // Far below the other part, it counts all the same. Row 3 is token 1 of head 1.
        parts[0].lse[9 + 1] = parts[1].lse[9 + 1] - 500.0;
        // Tokens 4 and 5 of head 0, rows 8 and 10; the other part has no key for the second.
        parts[1].lse[4] = f32::NAN;
        (parts[1].lse[5], parts[0].lse[5]) = (f32::NAN, f32::NEG_INFINITY);
        // What overflows has no number.
        parts[0].lse[9 + 6] = f32::INFINITY;
        let (out, lse) = merge_parts(device, dtype, shape, &parts)?;
        for (at, value) in out.iter().enumerate() {
            let is_nan = at == 3 * 16 + 5 || [8, 10, 13].contains(&(at / 16));
            ensure!(value.is_nan() == is_nan, "element {at}: {value}");
        }
        for (at, value) in lse.iter().enumerate() {
            ensure!(value.is_nan() == [4, 5, 9 + 6].contains(&at), "lse {at}: {value}");
        }
    }
    Ok(())
}

/// Inputs and outputs inside other tensors, inputs beside words, and no log-sum-exp.
fn strided(device: &Device) -> Result<()> {
    let shape = [2, 13, 3, 24];
    for dtype in DTYPES {
        let parts = [Part::random(shape, dtype, 73), Part::random(shape, dtype, 75)];
        let (expected, expected_lse) = merge_parts(device, dtype, shape, &parts)?;
        let holder = [2, 13, 5, 25];
        let mut bits = vec![narrow(f32::NAN, dtype); 2 * 13 * 5 * 25];
        for (row, values) in parts[0].bits.chunks(24).enumerate() {
            bits[((row / 3) * 5 + row % 3 + 1) * 25 + 1..][..24].copy_from_slice(values);
        }
        let out1 = upload(device, dtype, &bits, &holder)?;
        let out1 = out1.view().slice(2, 1..4)?.slice(3, 1..25)?;
        let mut lse = vec![f32::NAN.to_bits(); 3 * 2 * 15];
        for (at, value) in parts[0].lse.iter().enumerate() {
            let (b, h, s) = (at / 39, at / 13 % 3, at % 13);
            lse[(h * 2 + b) * 15 + 1 + s] = value.to_bits();
        }
        let lse1 = upload(device, DType::F32, &lse, &[3, 2, 15])?;
        let lse1 = lse1.view().permute(&[1, 0, 2])?.slice(2, 1..14)?;
        let [out2, lse2] = parts[1].tensors(device, dtype, shape)?;
        let mut out = upload(device, dtype, &vec![sentinel(dtype); 2 * 13 * 4 * 24], &[2, 13, 4, 24])?;
        let mut lse = upload(device, DType::F32, &vec![sentinel(DType::F32); 2 * 4 * 15], &[2, 4, 15])?;
        for with_lse in [false, true] {
            let mut outputs = AttentionOutputs::new(out.view_mut().slice(2, 1..4)?);
            if with_lse {
                outputs = outputs.with_lse(lse.view_mut().slice(1, 1..4)?.slice(2, 1..14)?);
            }
            merge_attention_into(device, out1, lse1, &out2, &lse2, outputs)?;
            for (place, row) in download(&out)?.chunks(24).enumerate() {
                let (token, head) = (place / 4, place % 4);
                if head == 0 {
                    ensure!(row.iter().all(|&bits| bits == sentinel(dtype)), "row {place} was written");
                } else {
                    let row = row.iter().map(|&bits| widen(bits, dtype));
                    ensure!(row.eq(expected[(token * 3 + head - 1) * 24..][..24].iter().copied()), "row {place}");
                }
            }
            for (place, bits) in download(&lse)?.into_iter().enumerate() {
                let (b, h, s) = (place / 60, place / 15 % 4, place % 15);
                let is_inside = with_lse && h > 0 && (1..14).contains(&s);
                let value =
                    if is_inside { expected_lse[(b * 3 + h - 1) * 13 + s - 1].to_bits() } else { sentinel(DType::F32) };
                ensure!(bits == value, "lse {place}, asked for: {with_lse}");
            }
        }
    }
    Ok(())
}

fn nothing(device: &Device) -> Result<()> {
    for shape in [[0, 5, 2, 8], [2, 0, 2, 8], [2, 5, 0, 8]] {
        let parts = [Part::random(shape, DType::F16, 77), Part::random(shape, DType::F16, 79)];
        let (out, lse) = merge_parts(device, DType::F16, shape, &parts)?;
        ensure!(out.is_empty() && lse.is_empty(), "{shape:?}");
    }
    Ok(())
}

fn refusals(device: &Device) -> Result<()> {
    let shape = [2, 5, 3, 8];
    let parts = [Part::random(shape, DType::F16, 81), Part::random(shape, DType::F16, 83)];
    let ([out1, lse1], [out2, lse2]) =
        (parts[0].tensors(device, DType::F16, shape)?, parts[1].tensors(device, DType::F16, shape)?);
    let other = Tensor::zeros(device, DType::F16, &[2, 5, 4, 8])?;
    let bf16 = Tensor::zeros(device, DType::Bf16, &shape)?;
    let flat = Tensor::zeros(device, DType::F16, &[30, 8])?;
    let wide = Tensor::zeros(device, DType::F16, &[2, 3, 5])?;
    let turned = Tensor::zeros(device, DType::F32, &[2, 5, 3])?;
    let shape_error = |argument, expected: &[usize], got: &[usize]| Error::Shape {
        argument,
        expected: expected.to_vec(),
        got: got.to_vec(),
    };
    let dtype_error = |argument, expected, got| Error::DTypeMismatch { argument, expected, got };
    let refused = [
        (merge_attention(device, &out1, &lse1, &other, &lse2), shape_error("out2", &shape, &[2, 5, 4, 8])),
        (merge_attention(device, &out1, &turned, &out2, &lse2), shape_error("lse1", &[2, 3, 5], &[2, 5, 3])),
        (merge_attention(device, &out1, &lse1, &out2, &turned), shape_error("lse2", &[2, 3, 5], &[2, 5, 3])),
        (merge_attention(device, &out1, &lse1, &bf16, &lse2), dtype_error("out2", DType::F16, DType::Bf16)),
        (merge_attention(device, &out1, &wide, &out2, &lse2), dtype_error("lse1", DType::F32, DType::F16)),
        (
            merge_attention(device, &flat, &lse1, &flat, &lse2),
            Error::Rank { argument: "out1", expected: "4: [B, S, H, D], or 3: [total, H, D]", got: 2 },
        ),
        (
            merge_attention(device, out1.view().slice(3, 0..0)?, &lse1, out2.view().slice(3, 0..0)?, &lse2),
            Error::HeadDim { got: 0 },
        ),
    ];
    for (result, expected) in refused {
        let got = result.err().map(|error| error.to_string());
        ensure!(got == Some(expected.to_string()), "expected {expected}, got {got:?}");
    }
    let mut small = Tensor::zeros(device, DType::F16, &[2, 5, 2, 8])?;
    let got = merge_attention_into(device, &out1, &lse1, &out2, &lse2, &mut small).err().map(|error| error.to_string());
    ensure!(got == Some(shape_error("out", &shape, &[2, 5, 2, 8]).to_string()), "got {got:?}");
    Ok(())
}
