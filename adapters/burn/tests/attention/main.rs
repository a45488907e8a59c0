//! Attention on burn's tensors, compared with an oracle in f64 and with burn's own attention, on each backend of this build.

#![expect(clippy::unwrap_used, clippy::single_range_in_vec_init, reason = "tests")]

mod support;
#[cfg(feature = "wgpu")]
mod wgpu;

use std::ops::Range;

use burn_nn::attention::{MhaInput, MultiHeadAttention, MultiHeadAttentionConfig};
use burn_tensor::module::attention as burn_attention;
use burn_tensor::ops::AttentionModuleOptions;
use burn_tensor::{Bool, DType, Device, Distribution, Tensor, TensorData};
use varlen_fa_burn::varlen_fa::{
    AttentionMask, CuSeqlens, KeyMask, KeyRanges, ScoreModifiers, VarlenMeta, VarlenOptions,
};
use varlen_fa_burn::{Error, key_mask, masked_attention, varlen_attention};

use crate::support::{devices, expect_close, oracle, tolerance};

const SEQ: usize = 40;
const DIM: usize = 24;
/// Heads of the queries, and of keys and values.
const HEADS: [usize; 2] = [4, 2];
const SCALE: f32 = 0.3;

/// Valid tokens of each batch row: padding on the right, on the left, everywhere, in a hole, nowhere.
const KEPT: [&[Range<usize>]; 5] = [&[0..17], &[23..40], &[], &[0..7, 20..31], &[0..40]];

fn is_kept(b: usize, s: usize) -> bool {
    KEPT[b].iter().any(|run| run.contains(&s))
}

/// burn's padding mask of `KEPT`: true where there is padding.
fn padding(device: &Device) -> Tensor<2, Bool> {
    let flags: Vec<bool> = (0..KEPT.len() * SEQ).map(|at| !is_kept(at / SEQ, at % SEQ)).collect();
    Tensor::from_data(TensorData::new(flags, [KEPT.len(), SEQ]), device)
}

fn meta(device: &Device) -> VarlenMeta {
    VarlenMeta::from_key_mask(&key_mask(padding(device)).unwrap()).unwrap()
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// q, k and v of `KEPT`'s batch, `[B, H, S, D]`.
fn qkv(device: &Device) -> [Tensor<4>; 3] {
    let [heads, kv_heads] = HEADS;
    let of = |heads| random([KEPT.len(), heads, SEQ, DIM], device);
    [of(heads), of(kv_heads), of(kv_heads)]
}

/// NaN where a row is masked.
fn poisoned(x: &Tensor<4>) -> Tensor<4> {
    let [batch, heads, seq, dim] = x.dims();
    let mask = padding(&x.device()).reshape([batch, 1, seq, 1]).expand([batch, heads, seq, dim]);
    x.clone().mask_fill(mask, f32::NAN)
}

/// The element types that a device has and the library takes.
fn dtypes(device: &Device) -> Vec<DType> {
    let all = [DType::F32, DType::F16, DType::BF16];
    all.into_iter().filter(|&dtype| device.supports_dtype(dtype)).collect()
}

/// The same values in memory of their own, row-major.
fn anew(x: Tensor<4>) -> Tensor<4> {
    let (device, dtype) = (x.device(), x.dtype());
    Tensor::<4>::from_data(x.into_data(), &device).cast(dtype)
}

/// The same values, laid out in other ways.
fn layouts(x: &Tensor<4>) -> Vec<(&'static str, Tensor<4>)> {
    let [_, heads, _, dim] = x.dims();
    let by_token = x.clone().swap_dims(1, 2);
    let fused = Tensor::cat(vec![by_token.clone().zeros_like(), by_token.clone(), by_token], 2);
    let inner = Tensor::cat(vec![x.clone().zeros_like(), x.clone()], 3);
    vec![
        ("contiguous", x.clone()),
        ("a part of a fused projection", fused.narrow(2, heads, heads).swap_dims(1, 2)),
        ("the second half of longer rows", inner.narrow(3, dim, dim)),
        ("transposed rows: copied", anew(x.clone().swap_dims(2, 3)).swap_dims(2, 3)),
        ("flipped: copied on Flex", anew(x.clone().flip([1])).flip([1])),
    ]
}

#[test]
fn masked_batches_of_any_layout_and_type_with_nan_in_the_padding() {
    for (name, device) in devices() {
        let meta = meta(&device);
        for dtype in dtypes(&device) {
            let tensors = qkv(&device).map(|x| x.cast(dtype));
            let expected = oracle(&tensors, 1.0 / (DIM as f64).sqrt(), |b, i, j| is_kept(b, i) && is_kept(b, j));
            let [q, k, v] = tensors.each_ref().map(|x| layouts(&poisoned(x)));
            for (((layout, q), (_, k)), (_, v)) in q.into_iter().zip(k).zip(v) {
                println!("{name}, {dtype:?}, {layout}");
                let out = masked_attention(q, k, v, AttentionMask::varlen(&meta), None).unwrap();
                assert_eq!(out.dtype(), dtype);
                expect_close(&out, &expected, tolerance(dtype), |_, _| true);
                // Exactly zero, and not nearly.
                let zeros = out.mask_fill(padding(&device).bool_not().reshape([KEPT.len(), 1, SEQ, 1]), 0.0);
                let bits: Vec<f32> = zeros.to_data().iter::<f32>().collect();
                assert!(bits.iter().all(|value| value.to_bits() == 0));
            }
        }
    }
}

#[test]
fn a_key_mask_is_burns_own_attention_under_the_padding_mask() {
    for (name, device) in devices() {
        println!("{name}");
        let [heads, _] = HEADS;
        // burn's row of no kept key is not defined: that row of the batch is left out.
        let keep = Tensor::<1, burn_tensor::Int>::from_ints([0, 1, 3, 4], &device);
        let padding = padding(&device).int().select(0, keep).bool();
        let mask = key_mask(padding.clone()).unwrap();
        let [q, k, v] = [(); 3].map(|()| random([4, heads, SEQ, DIM], &device));
        let of_burn = padding.reshape([4, 1, 1, SEQ]).expand([4, heads, SEQ, SEQ]);
        let options = AttentionModuleOptions { scale: Some(f64::from(SCALE)), ..Default::default() };
        let expected = burn_attention(q.clone(), k.clone(), v.clone(), Some(of_burn), None, options);
        let found = masked_attention(q, k, v, AttentionMask::key(&mask), Some(SCALE)).unwrap();
        expect_close(&found, &support::Values::of(&expected), 2e-5, |_, _| true);
    }
}

#[test]
fn causal_attention_is_burns_own() {
    for (name, device) in devices() {
        println!("{name}");
        let [q, k, v] = [(); 3].map(|()| random([2, 3, SEQ, DIM], &device));
        let options = AttentionModuleOptions { is_causal: true, softcap: Some(2.0), ..Default::default() };
        let expected = burn_attention(q.clone(), k.clone(), v.clone(), None, None, options);
        let ranges = KeyRanges::causal([2, SEQ, SEQ]).unwrap();
        let cap = ScoreModifiers::default().with_softcap(2.0);
        let mask = AttentionMask::none().with_ranges(&ranges).with_modifiers(&cap);
        let found = masked_attention(q, k, v, mask, None).unwrap();
        expect_close(&found, &support::Values::of(&expected), 2e-5, |_, _| true);
    }
}

#[test]
fn windows_within_a_padding_mask() {
    for (name, device) in devices() {
        println!("{name}");
        let tensors = qkv(&device);
        let meta = meta(&device);
        let window = KeyRanges::window([KEPT.len(), SEQ, SEQ], Some(5), Some(2)).unwrap();
        let expected =
            oracle(&tensors, f64::from(SCALE), |b, i, j| is_kept(b, i) && is_kept(b, j) && j + 5 >= i && j <= i + 2);
        let [q, k, v] = tensors;
        let mask = AttentionMask::varlen(&meta).with_ranges(&window);
        let found = masked_attention(q, k, v, mask, Some(SCALE)).unwrap();
        expect_close(&found, &expected, 1e-5, |_, _| true);
    }
}

#[test]
fn cross_attention_of_unlike_lengths() {
    for (name, device) in devices() {
        println!("{name}");
        let lengths = [[3, 9, 0], [20, 0, 7]];
        let of = |seq, lengths| VarlenMeta::from_key_mask(&KeyMask::from_lengths(seq, lengths).unwrap()).unwrap();
        let (query, key) = (of(9, &lengths[0]), of(20, &lengths[1]));
        let tensors =
            [random([3, 4, 9, DIM], &device), random([3, 4, 20, DIM], &device), random([3, 4, 20, DIM], &device)];
        let expected = oracle(&tensors, 1.0 / (DIM as f64).sqrt(), |b, i, j| i < lengths[0][b] && j < lengths[1][b]);
        let [q, k, v] = tensors;
        let found = masked_attention(q, k, v, AttentionMask::varlen_cross(&query, &key), None).unwrap();
        expect_close(&found, &expected, 1e-5, |_, _| true);
    }
}

#[test]
fn packed_rows() {
    for (name, device) in devices() {
        println!("{name}");
        let lengths = [5, 40, 0, 1, 33];
        let total = lengths.iter().sum();
        let sequences = CuSeqlens::from_lengths(&lengths).unwrap();
        let of: Vec<usize> = lengths.iter().enumerate().flat_map(|(at, &length)| vec![at; length]).collect();
        let [heads, kv_heads] = HEADS;
        let [q, k, v] = [heads, kv_heads, kv_heads].map(|heads| random([total, heads, DIM], &device));
        // One batch row in which each token sees its sequence.
        let as_batch = [&q, &k, &v].map(|x| x.clone().unsqueeze::<4>().swap_dims(1, 2));
        let expected = oracle(&as_batch, f64::from(SCALE), |_, i, j| of[i] == of[j]);
        let options = VarlenOptions::default().with_softmax_scale(SCALE);
        let found = varlen_attention(q, k, v, &sequences, &sequences, options).unwrap();
        assert_eq!(found.dims(), [total, heads, DIM]);
        expect_close(&found.unsqueeze::<4>().swap_dims(1, 2), &expected, 1e-5, |_, _| true);
    }
}

/// The layer's context by our attention: `[B, S, d_model]`.
fn our_context(layer: &MultiHeadAttention, x: &Tensor<3>, meta: &VarlenMeta) -> Tensor<3> {
    let [batch, seq, width] = x.dims();
    let by_head = |linear: &burn_nn::Linear| {
        linear.forward(x.clone()).reshape([batch, seq, layer.n_heads, layer.d_k]).swap_dims(1, 2)
    };
    let (q, k, v) = (by_head(&layer.query), by_head(&layer.key), by_head(&layer.value));
    let out = masked_attention(q, k, v, AttentionMask::varlen(meta), None).unwrap();
    layer.output.forward(out.swap_dims(1, 2).reshape([batch, seq, width]))
}

#[test]
fn burns_multi_head_attention_on_valid_rows() {
    for (name, device) in devices() {
        println!("{name}");
        let layer = MultiHeadAttentionConfig::new(96, 4).with_dropout(0.0).init(&device);
        let x = random([KEPT.len(), SEQ, 96], &device);
        let expected = layer.forward(MhaInput::self_attn(x.clone()).mask_pad(padding(&device))).context;
        let found = our_context(&layer, &x, &meta(&device));
        let [found, expected] = [found, expected].map(|x| x.unsqueeze_dim::<4>(1));
        expect_close(&found, &support::Values::of(&expected), 2e-5, is_kept);
    }
}

#[test]
fn empty_tensors() {
    for (name, device) in devices() {
        println!("{name}");
        for [batch, seq] in [[0, 5], [2, 0]] {
            let q = Tensor::<4>::zeros([batch, 2, seq, 8], &device);
            let out = masked_attention(q.clone(), q.clone(), q, AttentionMask::none(), None).unwrap();
            assert_eq!(out.dims(), [batch, 2, seq, 8]);
        }
    }
}

fn message<const D: usize>(result: Result<Tensor<D>, Error>) -> String {
    result.map_or_else(|error| error.to_string(), |tensor| format!("no error, but a tensor {:?}", tensor.dims()))
}

#[test]
fn errors_name_the_argument() {
    for (name, device) in devices() {
        println!("{name}");
        let meta = meta(&device);
        let batch = KEPT.len();
        let of = |shape| random(shape, &device);
        let said = |q, k, v, expected: &str| {
            let message = message(masked_attention(q, k, v, AttentionMask::varlen(&meta), None));
            assert!(message.contains(expected), "{message:?} does not say {expected:?}");
        };
        let q = of([batch, 4, SEQ, DIM]);
        // Shapes are said in burn's order.
        let expected = format!("`v`: expected shape [{batch}, 4, {SEQ}, {DIM}], got [{batch}, 4, 9, {DIM}]");
        said(q.clone(), q.clone(), of([batch, 4, 9, DIM]), &expected);
        said(q.clone(), of([batch, 3, SEQ, DIM]), of([batch, 3, SEQ, DIM]), "`k`: num_kv_heads");
        said(q.clone(), of([batch, 4, SEQ, 16]), of([batch, 4, SEQ, 16]), "`k`: expected shape");
        said(q.clone(), q.clone().cast(DType::F16), q.clone(), "`k`");
        let long = of([2, 2, 5, 513]);
        said(long.clone(), long.clone(), long, "`q`: head_dim");
        let short = of([batch, 4, 9, DIM]);
        said(short.clone(), short.clone(), short, "expected a mask of [batch, sequence]");
        if device.supports_dtype(DType::F64) {
            let wide = q.clone().cast(DType::F64);
            said(wide.clone(), wide.clone(), wide, "`q`: expected elements of type f32, f16 or bf16, got f64");
        }

        let sequences = CuSeqlens::from_lengths(&[5, 4]).unwrap();
        let rows = random([8, 4, DIM], &device);
        let message = message(varlen_attention(
            rows.clone(),
            rows.clone(),
            rows,
            &sequences,
            &sequences,
            VarlenOptions::default(),
        ));
        assert!(message.contains("cu_seqlens"), "{message}");
    }
}

#[test]
fn autodiff_tensors_are_refused() {
    for (name, device) in devices() {
        println!("{name}");
        let x = random([1, 2, 8, 16], &device.clone().autodiff()).require_grad();
        let plain = random([1, 2, 8, 16], &device);
        let message_of = |q, k| message(masked_attention(q, k, plain.clone(), AttentionMask::none(), None));
        let of_q = message_of(x.clone(), plain.clone());
        assert!(of_q.contains("`q`: expected a float tensor of burn's") && of_q.contains("autodiff"), "{of_q}");
        let of_k = message_of(plain.clone(), x);
        assert!(of_k.contains("`k`: expected a float tensor"), "{of_k}");
    }
}

/// That the layouts are what they are called.
#[cfg(feature = "flex")]
#[test]
fn layouts_differ_on_flex() {
    let x = random([2, 3, 5, 8], &Device::flex());
    let strides = layouts(&x).into_iter().map(|(_, x)| {
        let x = x.try_into_primitive::<burn_flex::Flex>().unwrap();
        (x.layout().strides().to_vec(), x.layout().start_offset())
    });
    let expected = [
        ([120, 40, 8, 1], 0),
        ([360, 8, 72, 1], 24),
        ([240, 80, 16, 1], 8),
        ([120, 40, 1, 5], 0),
        ([120, -40, 8, 1], 80),
    ];
    assert_eq!(strides.collect::<Vec<_>>(), expected.map(|(strides, offset)| (strides.to_vec(), offset)));
}

/// Nothing is moved by what a layer does next.
#[cfg(feature = "flex")]
#[test]
fn on_flex_the_result_lies_as_layers_want_it() {
    let q = random([2, 4, 9, 16], &Device::flex());
    let out = masked_attention(q.clone(), q.clone(), q, AttentionMask::none(), None).unwrap();
    let lying = out.swap_dims(1, 2).try_into_primitive::<burn_flex::Flex>().unwrap();
    assert!(lying.is_contiguous() && lying.is_unique());
}
