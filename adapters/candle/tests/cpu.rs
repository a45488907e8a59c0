//! Every function against a computation by candle's own operations, one sequence after the other, in f32.

use candle_core::{D, DType, Device, Error, Result, Tensor, Var};
use varlen_fa_candle::varlen_fa::{KeyMask, KeyRanges, VarlenMeta, alibi_slopes};
use varlen_fa_candle::{
    Attention, flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_windowed, flash_attn_windowed, masked_attention,
};

/// Query heads, and key and value heads.
const HEADS: [usize; 2] = [4, 2];
const DIM: usize = 24;
const SCALE: f32 = 0.3;

/// What a reference does to scores.
#[derive(Clone, Copy, Default)]
struct Rule<'a> {
    left: Option<usize>,
    right: Option<usize>,
    slopes: Option<&'a [f32]>,
    softcap: Option<f64>,
}

/// Attention of one sequence: `q` `[Sq, H, D]`, `k` and `v` `[Sk, Hkv, D]`.
fn reference(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32, rule: Rule<'_>) -> Result<Tensor> {
    let ((seq_q, heads, _), (seq_k, kv_heads, _)) = (q.dims3()?, k.dims3()?);
    let by_head = |x: &Tensor, repeat: usize| -> Result<Tensor> {
        let x = x.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous()?;
        let (heads, seq, dim) = x.dims3()?;
        x.unsqueeze(1)?.broadcast_as((heads, repeat, seq, dim))?.reshape((heads * repeat, seq, dim))
    };
    let (q, k, v) = (by_head(q, 1)?, by_head(k, heads / kv_heads)?, by_head(v, heads / kv_heads)?);
    let mut scores = (q.matmul(&k.t()?)? * f64::from(scale))?;
    if let Some(cap) = rule.softcap {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    let mut added = Vec::with_capacity(heads * seq_q * seq_k);
    for h in 0..heads {
        for i in 0..seq_q {
            for j in 0..seq_k {
                let ahead = j as i64 - (i as i64 + seq_k as i64 - seq_q as i64);
                let hidden = rule.right.is_some_and(|right| ahead > right as i64)
                    || rule.left.is_some_and(|left| -ahead > left as i64);
                let slope = rule.slopes.map_or(0.0, |slopes| slopes[h]);
                added.push(if hidden { f32::NEG_INFINITY } else { -slope * ahead.abs() as f32 });
            }
        }
    }
    let added = Tensor::from_vec(added, (heads, seq_q, seq_k), q.device())?;
    let scores = (scores + added)?;
    // Rows that see no key are zeros.
    let most = scores.max_keepdim(D::Minus1)?.maximum(f32::MIN)?;
    let weights = scores.broadcast_sub(&most)?.exp()?;
    let sum = weights.sum_keepdim(D::Minus1)?.maximum(f32::MIN_POSITIVE)?;
    weights.broadcast_div(&sum)?.matmul(&v)?.transpose(0, 1)?.contiguous()
}

fn random(shape: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::randn(0_f32, 1.0, shape, &Device::Cpu)?.to_dtype(dtype)
}

fn expect_close(found: &Tensor, expected: &Tensor, tolerance: f32) -> Result<()> {
    assert_eq!(found.dims(), expected.dims());
    assert!(found.is_contiguous());
    let found = found.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let expected = expected.flatten_all()?.to_vec1::<f32>()?;
    for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
        // A NaN is not close.
        assert!((found - expected).abs() <= tolerance, "element {at}: {found}, expected {expected}");
    }
    Ok(())
}

fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 2e-3,
        _ => 2e-2,
    }
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Packed queries, keys and values of sequences of these lengths.
struct Packed {
    qkv: [Tensor; 3],
    lengths: [Vec<usize>; 2],
}

impl Packed {
    fn new(lengths: [&[usize]; 2], dtype: DType) -> Result<Self> {
        let [total_q, total_k] = lengths.map(|lengths| lengths.iter().sum());
        let [heads, kv_heads] = HEADS;
        let q = random(&[total_q, heads, DIM], dtype)?;
        let kv = || random(&[total_k, kv_heads, DIM], dtype);
        Ok(Self { qkv: [q, kv()?, kv()?], lengths: lengths.map(<[usize]>::to_vec) })
    }

    fn seqlens(&self) -> Result<[Tensor; 2]> {
        let cumulative = |lengths: &[usize]| {
            let ends = lengths.iter().scan(0, |end, &length| {
                *end += length as u32;
                Some(*end)
            });
            let values: Vec<u32> = std::iter::once(0).chain(ends).collect();
            Tensor::new(values, &Device::Cpu)
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
    for dtype in DTYPES {
        let packed = Packed::new([&[5, 40, 1, 0, 70], &[9, 40, 3, 4, 50]], dtype)?;
        let ([q, k, v], [seqlens_q, seqlens_k], [most_q, most_k]) = (&packed.qkv, packed.seqlens()?, packed.longest());
        for causal in [false, true] {
            let found = flash_attn_varlen(q, k, v, &seqlens_q, &seqlens_k, most_q, most_k, SCALE, causal)?;
            assert_eq!(found.dtype(), dtype);
            let rule = Rule { right: causal.then_some(0), ..Rule::default() };
            expect_close(&found, &packed.expected(rule)?, tolerance(dtype))?;
        }
    }
    Ok(())
}

#[test]
fn packed_rows_with_windows_slopes_and_a_cap() -> Result<()> {
    let packed = Packed::new([&[5, 40, 1, 70], &[9, 40, 3, 50]], DType::F32)?;
    let ([q, k, v], [seqlens_q, seqlens_k], [most_q, most_k]) = (&packed.qkv, packed.seqlens()?, packed.longest());
    let slopes = alibi_slopes(HEADS[0]);
    let alibi = Tensor::new(&slopes[..], &Device::Cpu)?;
    for [left, right] in [[Some(7), Some(3)], [Some(0), None], [None, Some(12)], [None, None]] {
        let rule = Rule { left, right, ..Rule::default() };
        let found = flash_attn_varlen_windowed(q, k, v, &seqlens_q, &seqlens_k, most_q, most_k, SCALE, left, right)?;
        expect_close(&found, &packed.expected(rule)?, 1e-5)?;

        let rule = Rule { slopes: Some(&slopes), ..rule };
        let found = flash_attn_varlen_alibi_windowed(
            q, k, v, &alibi, &seqlens_q, &seqlens_k, most_q, most_k, SCALE, left, right,
        )?;
        expect_close(&found, &packed.expected(rule)?, 1e-5)?;

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
        expect_close(&found, &packed.expected(rule)?, 1e-5)?;
    }
    for causal in [false, true] {
        let found = flash_attn_varlen_alibi(q, k, v, &alibi, &seqlens_q, &seqlens_k, most_q, most_k, SCALE, causal)?;
        let rule = Rule { right: causal.then_some(0), slopes: Some(&slopes), ..Rule::default() };
        expect_close(&found, &packed.expected(rule)?, 1e-5)?;
    }
    Ok(())
}

#[test]
fn padded_tensors_without_a_mask() -> Result<()> {
    let (batch, seq) = (3, 33);
    let [heads, kv_heads] = HEADS;
    let q = random(&[batch, seq, heads, DIM], DType::F32)?;
    let (k, v) = (random(&[batch, seq, kv_heads, DIM], DType::F32)?, random(&[batch, seq, kv_heads, DIM], DType::F32)?);
    let slopes = alibi_slopes(heads);
    let alibi = Tensor::new(&slopes[..], &Device::Cpu)?;
    let expect = |found: &Tensor, rule: Rule<'_>| {
        for b in 0..batch {
            expect_close(&found.get(b)?, &reference(&q.get(b)?, &k.get(b)?, &v.get(b)?, SCALE, rule)?, 1e-5)?;
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
    let (meta, rows) = kept()?;
    let batch = rows.len();
    let [heads, kv_heads] = HEADS;
    for dtype in DTYPES {
        // Slices of one fused projection, and tensors that lie [B, H, S, D].
        let fused = poisoned(&random(&[batch, SEQ, heads + 2 * kv_heads, DIM], dtype)?, &rows)?;
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
                    let of_masked = values.index_select(&Tensor::new(of_masked, &Device::Cpu)?, 0)?;
                    assert!(of_masked.flatten_all()?.to_vec1::<f32>()?.iter().all(|value| value.to_bits() == 0));
                }
                if !kept.is_empty() {
                    let index = Tensor::new(kept.clone(), &Device::Cpu)?;
                    let of_kept = |x: &Tensor| x.get(b)?.contiguous()?.index_select(&index, 0);
                    let scale = 1.0 / (DIM as f32).sqrt();
                    let expected = reference(&of_kept(&q)?, &of_kept(&k)?, &of_kept(&v)?, scale, Rule::default())?;
                    expect_close(&values.index_select(&index, 0)?, &expected, tolerance(dtype))?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn an_attention_is_built_once_and_says_more() -> Result<()> {
    let (meta, rows) = kept()?;
    let q = random(&[rows.len(), SEQ, 4, DIM], DType::F32)?;
    let ranges = KeyRanges::causal([rows.len(), SEQ, SEQ]).unwrap();
    let attention = Attention::masked(&meta).with_ranges(&ranges).with_softmax_scale(SCALE);
    let found = attention.forward(&q, &q, &q)?;
    // The last row of the batch keeps every token.
    let last = q.get(2)?;
    let rule = Rule { right: Some(0), ..Rule::default() };
    expect_close(&found.get(2)?, &reference(&last, &last, &last, SCALE, rule)?, 1e-5)?;
    assert_eq!(found.flatten_all()?.to_vec1::<f32>()?, attention.forward(&q, &q, &q)?.flatten_all()?.to_vec1::<f32>()?);
    Ok(())
}

fn message(result: Result<Tensor>) -> String {
    result.map_or_else(|error| error.to_string(), |tensor| format!("no error, but a tensor {:?}", tensor.shape()))
}

#[test]
fn errors_name_the_argument() -> Result<()> {
    let (meta, rows) = kept()?;
    let batch = rows.len();
    let q = random(&[batch, SEQ, 4, DIM], DType::F32)?;
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

    let packed = Packed::new([&[5, 4], &[5, 4]], DType::F32)?;
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
    let (meta, rows) = kept()?;
    let q = Var::from_tensor(&random(&[rows.len(), SEQ, 4, DIM], DType::F32)?)?;
    let out = masked_attention(&q, &q, &q, &meta)?;
    let error = out.sum_all()?.backward().map(drop).unwrap_err().to_string();
    assert!(error.contains("varlen-fa"), "{error}");
    Ok(())
}
