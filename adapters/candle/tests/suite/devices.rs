//! Every function, on every device, against a computation by candle's own operations.

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use varlen_fa_candle::varlen_fa::{KeyMask, KeyRanges, VarlenMeta, alibi_slopes};
use varlen_fa_candle::{
    Attention, flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_windowed, flash_attn_windowed, masked_attention,
};

use crate::reference::{DIM, HEADS, Rule, SCALE, expect_close, on_every_device, random, reference, tolerance, values};

/// Packed queries, keys and values of sequences of these lengths.
struct Packed {
    qkv: [Tensor; 3],
    lengths: [Vec<usize>; 2],
}

impl Packed {
    fn new(lengths: [&[usize]; 2], dtype: DType, device: &Device) -> Result<Self> {
        let [total_q, total_k] = lengths.map(|lengths| lengths.iter().sum());
        let [heads, kv_heads] = HEADS;
        let q = random(&[total_q, heads, DIM], dtype, device)?;
        let kv = || random(&[total_k, kv_heads, DIM], dtype, device);
        Ok(Self { qkv: [q, kv()?, kv()?], lengths: lengths.map(<[usize]>::to_vec) })
    }

    fn seqlens(&self) -> Result<[Tensor; 2]> {
        let cumulative = |lengths: &[usize]| {
            let ends = lengths.iter().scan(0, |end, &length| {
                *end += length as u32;
                Some(*end)
            });
            let values: Vec<u32> = std::iter::once(0).chain(ends).collect();
            Tensor::new(values, self.qkv[0].device())
        };
        let [q, k] = &self.lengths;
        Ok([cumulative(q)?, cumulative(k)?])
    }

    fn longest(&self) -> [usize; 2] {
        self.lengths.each_ref().map(|lengths| lengths.iter().copied().max().unwrap_or(0))
    }

    fn expected(&self, rule: Rule<'_>) -> Result<Tensor> {
        let ([q, k, v], [lengths_q, lengths_k]) = (&self.qkv, &self.lengths);
        let (mut at_q, mut at_k, mut parts) = (0, 0, vec![]);
        for (&queries, &keys) in lengths_q.iter().zip(lengths_k) {
            if queries > 0 && keys > 0 {
                let (k, v) = (k.narrow(0, at_k, keys)?, v.narrow(0, at_k, keys)?);
                parts.push(reference(&q.narrow(0, at_q, queries)?, &k, &v, SCALE, rule)?);
            } else {
                parts.push(Tensor::zeros((queries, HEADS[0], DIM), DType::F32, &Device::Cpu)?);
            }
            (at_q, at_k) = (at_q + queries, at_k + keys);
        }
        Tensor::cat(&parts, 0)
    }
}

#[test]
fn packed_rows_of_every_type() -> Result<()> {
    on_every_device(|device, dtype| {
        let packed = Packed::new([&[5, 40, 1, 0, 70], &[9, 40, 3, 4, 50]], dtype, device)?;
        let ([q, k, v], [seqlens_q, seqlens_k], [most_q, most_k]) = (&packed.qkv, packed.seqlens()?, packed.longest());
        for causal in [false, true] {
            let found = flash_attn_varlen(q, k, v, &seqlens_q, &seqlens_k, most_q, most_k, SCALE, causal)?;
            assert_eq!(found.dtype(), dtype);
            let rule = Rule { right: causal.then_some(0), ..Rule::default() };
            expect_close(&found, &packed.expected(rule)?, tolerance(device, dtype))?;
        }
        Ok(())
    })
}

#[test]
fn packed_rows_with_windows_slopes_and_a_cap() -> Result<()> {
    on_every_device(|device, dtype| {
        let packed = Packed::new([&[5, 40, 1, 70], &[9, 40, 3, 50]], dtype, device)?;
        let ([q, k, v], [seqlens_q, seqlens_k], [most_q, most_k]) = (&packed.qkv, packed.seqlens()?, packed.longest());
        let slopes = alibi_slopes(HEADS[0]);
        let alibi = Tensor::new(&slopes[..], device)?;
        for [left, right] in [[Some(7), Some(3)], [Some(0), None], [None, Some(12)], [None, None]] {
            let rule = Rule { left, right, ..Rule::default() };
            let found =
                flash_attn_varlen_windowed(q, k, v, &seqlens_q, &seqlens_k, most_q, most_k, SCALE, left, right)?;
            expect_close(&found, &packed.expected(rule)?, tolerance(device, dtype))?;

            let rule = Rule { slopes: Some(&slopes), ..rule };
            let found = flash_attn_varlen_alibi_windowed(
                q, k, v, &alibi, &seqlens_q, &seqlens_k, most_q, most_k, SCALE, left, right,
            )?;
            expect_close(&found, &packed.expected(rule)?, tolerance(device, dtype))?;

            let rule = Rule { softcap: Some(2.0), ..rule };
            let found = flash_attn_varlen_alibi_windowed_softcap(
                q,
                k,
                v,
                Some(&alibi),
                &seqlens_q,
                &seqlens_k,
                most_q,
                most_k,
                SCALE,
                left,
                right,
                2.0,
            )?;
            expect_close(&found, &packed.expected(rule)?, tolerance(device, dtype))?;
        }
        for causal in [false, true] {
            let found =
                flash_attn_varlen_alibi(q, k, v, &alibi, &seqlens_q, &seqlens_k, most_q, most_k, SCALE, causal)?;
            let rule = Rule { right: causal.then_some(0), slopes: Some(&slopes), ..Rule::default() };
            expect_close(&found, &packed.expected(rule)?, tolerance(device, dtype))?;
        }
        Ok(())
    })
}

#[test]
fn padded_tensors_without_a_mask() -> Result<()> {
    on_every_device(|device, dtype| {
        let (batch, seq) = (3, 33);
        let [heads, kv_heads] = HEADS;
        let q = random(&[batch, seq, heads, DIM], dtype, device)?;
        let (k, v) = (
            random(&[batch, seq, kv_heads, DIM], dtype, device)?,
            random(&[batch, seq, kv_heads, DIM], dtype, device)?,
        );
        let slopes = alibi_slopes(heads);
        let alibi = Tensor::new(&slopes[..], device)?;
        let expect = |found: &Tensor, rule: Rule<'_>| {
            for b in 0..batch {
                expect_close(
                    &found.get(b)?,
                    &reference(&q.get(b)?, &k.get(b)?, &v.get(b)?, SCALE, rule)?,
                    tolerance(device, dtype),
                )?;
            }
            Ok::<(), candle_core::Error>(())
        };
        let (left, right) = (Some(5), Some(2));
        let causal = Rule { right: Some(0), ..Rule::default() };
        let window = Rule { left, right, ..Rule::default() };
        let with_slopes = |rule| Rule { slopes: Some(&slopes), ..rule };
        expect(&flash_attn(&q, &k, &v, SCALE, false)?, Rule::default())?;
        expect(&flash_attn(&q, &k, &v, SCALE, true)?, causal)?;
        expect(&flash_attn_windowed(&q, &k, &v, SCALE, left, right)?, window)?;
        expect(&flash_attn_alibi(&q, &k, &v, &alibi, SCALE, true)?, with_slopes(causal))?;
        expect(&flash_attn_alibi_windowed(&q, &k, &v, &alibi, SCALE, left, right)?, with_slopes(window))?;
        let capped = flash_attn_alibi_windowed_softcap(&q, &k, &v, None, SCALE, left, right, 1.5)?;
        expect(&capped, Rule { softcap: Some(1.5), ..window })
    })
}

/// Valid tokens of each batch row of the padded tests; a gap in the middle of the first.
#[expect(clippy::single_range_in_vec_init, reason = "one run, and not its tokens")]
const KEPT: [&[std::ops::Range<usize>]; 3] = [&[0..7, 20..31], &[], &[0..40]];
const SEQ: usize = 40;

/// A key mask of `KEPT`, and where it keeps, as indices of each row.
fn kept() -> Result<(VarlenMeta, Vec<Vec<u32>>)> {
    let mask = KeyMask::from_runs(SEQ, &KEPT).map_err(Error::wrap)?;
    let rows = KEPT.iter().map(|runs| runs.iter().cloned().flatten().map(|token| token as u32).collect()).collect();
    Ok((VarlenMeta::from_key_mask(&mask).map_err(Error::wrap)?, rows))
}

/// NaN where a row is masked.
fn poisoned(x: &Tensor, rows: &[Vec<u32>]) -> Result<Tensor> {
    let (_, _, heads, dim) = x.dims4()?;
    let values: Vec<f32> = (0..rows.len() * SEQ)
        .map(|at| if rows[at / SEQ].contains(&((at % SEQ) as u32)) { 0.0 } else { f32::NAN })
        .collect();
    let nan = Tensor::from_vec(values, (rows.len(), SEQ, 1, 1), x.device())?.to_dtype(x.dtype())?;
    x.broadcast_add(&nan.broadcast_as((rows.len(), SEQ, heads, dim))?)
}

#[test]
fn a_key_mask_on_strided_views_with_nan_in_the_padding() -> Result<()> {
    on_every_device(|device, dtype| {
        let (meta, rows) = kept()?;
        let batch = rows.len();
        let [heads, kv_heads] = HEADS;
        // Slices of one fused projection, and tensors that lie [B, H, S, D].
        let fused = poisoned(&random(&[batch, SEQ, heads + 2 * kv_heads, DIM], dtype, device)?, &rows)?;
        let slices = [(0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads)];
        let [q, k, v] = slices.map(|(start, count)| fused.narrow(2, start, count));
        let (q, k, v) = (q?, k?, v?);
        let permuted = |x: &Tensor| x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
        for [q, k, v] in [[q.clone(), k.clone(), v.clone()], [permuted(&q)?, permuted(&k)?, permuted(&v)?]] {
            assert!(!q.is_contiguous());
            let found = masked_attention(&q, &k, &v, &meta)?;
            assert_eq!((found.dtype(), found.dims()), (dtype, &[batch, SEQ, heads, DIM][..]));
            for (b, kept) in rows.iter().enumerate() {
                let values = found.get(b)?.to_dtype(DType::F32)?;
                let of_masked = (0..SEQ as u32).filter(|token| !kept.contains(token)).collect::<Vec<_>>();
                if !of_masked.is_empty() {
                    let of_masked = values.index_select(&Tensor::new(of_masked, device)?, 0)?;
                    assert!(of_masked.flatten_all()?.to_vec1::<f32>()?.iter().all(|value| value.to_bits() == 0));
                }
                if !kept.is_empty() {
                    let index = Tensor::new(kept.clone(), device)?;
                    let of_kept = |x: &Tensor| x.get(b)?.contiguous()?.index_select(&index, 0);
                    let scale = 1.0 / (DIM as f32).sqrt();
                    let expected = reference(&of_kept(&q)?, &of_kept(&k)?, &of_kept(&v)?, scale, Rule::default())?;
                    expect_close(&values.index_select(&index, 0)?, &expected, tolerance(device, dtype))?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn an_attention_is_built_once_and_says_more() -> Result<()> {
    on_every_device(|device, dtype| {
        let (meta, rows) = kept()?;
        let q = random(&[rows.len(), SEQ, 4, DIM], dtype, device)?;
        let ranges = KeyRanges::causal([rows.len(), SEQ, SEQ]).unwrap();
        let attention = Attention::masked(&meta).with_ranges(&ranges).with_softmax_scale(SCALE);
        let found = attention.forward(&q, &q, &q)?;
        // The last row of the batch keeps every token.
        let last = q.get(2)?;
        let rule = Rule { right: Some(0), ..Rule::default() };
        expect_close(&found.get(2)?, &reference(&last, &last, &last, SCALE, rule)?, tolerance(device, dtype))?;
        assert_eq!(values(&found)?, values(&attention.forward(&q, &q, &q)?)?);
        Ok(())
    })
}

fn message(result: Result<Tensor>) -> String {
    result.map_or_else(|error| error.to_string(), |tensor| format!("no error, but a tensor {:?}", tensor.shape()))
}

#[test]
fn errors_name_the_argument() -> Result<()> {
    let (meta, rows) = kept()?;
    let batch = rows.len();
    let q = random(&[batch, SEQ, 4, DIM], DType::F32, &Device::Cpu)?;
    let said = |result, expected: &str| {
        let message = message(result);
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
    };
    said(masked_attention(&q, &q.to_dtype(DType::F16)?, &q, &meta), "`k`: expected elements of type f32");
    said(
        masked_attention(&q.to_dtype(DType::F64)?, &q, &q, &meta),
        "`q`: expected elements of type f32, f16 or bf16, got f64",
    );
    said(masked_attention(&q, &q, &q.narrow(1, 0, 9)?, &meta), "`v`: expected shape");
    let across = q.transpose(2, 3)?.contiguous()?.transpose(2, 3)?;
    said(masked_attention(&across, &q, &q, &meta), "`q`");

    let packed = Packed::new([&[5, 4], &[5, 4]], DType::F32, &Device::Cpu)?;
    let ([q, k, v], [seqlens, _]) = (&packed.qkv, packed.seqlens()?);
    let call = |seqlens: &Tensor, most| flash_attn_varlen(q, k, v, seqlens, seqlens, most, most, SCALE, false);
    said(call(&seqlens, 4), "`max_seqlen_q`: expected at least 5, the longest sequence of seqlens_q, got 4");
    said(call(&seqlens.to_dtype(DType::I64)?, 5), "`seqlens_q`: expected elements of type u32, got i64");
    said(call(&Tensor::new(&[0_u32, 6, 5, 9], &Device::Cpu)?, 6), "never fall");
    said(call(&Tensor::new(&[0_u32, u32::MAX], &Device::Cpu)?, 6), "fit an i32");
    said(call(&Tensor::new(&[0_u32, 5], &Device::Cpu)?, 5), "cu_seqlens");
    Ok(())
}

#[test]
fn a_backward_pass_is_an_error_and_not_a_wrong_gradient() -> Result<()> {
    on_every_device(|device, dtype| {
        let (meta, rows) = kept()?;
        let q = Var::from_tensor(&random(&[rows.len(), SEQ, 4, DIM], dtype, device)?)?;
        let out = masked_attention(&q, &q, &q, &meta)?;
        let error = out.sum_all()?.backward().map(drop).unwrap_err().to_string();
        assert!(error.contains("varlen-fa"), "{error}");
        Ok(())
    })
}
