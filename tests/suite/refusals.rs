//! Calls that are refused: the exact error, the argument's name in its message, and an output that nobody touched.
//!
//! `Error::Overlap` is not among them: an output that shares memory with an input cannot be written down in safe Rust where the
//! library owns the memory. A `TensorViewMut` borrows it mutably, so no `TensorView` of the same memory lives beside it. Memory
//! of the application's can be had twice; its trials are in `external_wgpu` and `external_cuda`.

use anyhow::{Context, Result, ensure};
use varlen_fa::{
    AttentionMask, BackendKind, CuSeqlens, DType, Device, Error, Kernel, KeyMask, KeyRanges, Layout, MaskedAttention,
    Path, ScoreModifiers, Tensor, TensorView, TensorViewMut, VarlenMeta, VarlenOptions, pack, pack_into, pack_qkv,
    pack_qkv_into, scatter_to_padded, scatter_to_padded_into, varlen_attention, varlen_attention_into,
};

use super::call::device_meta;
use super::memory::{download, narrow, sentinel, upload};
use super::trials::Trials;

pub fn register(trials: &mut Trials) {
    trials.once("refusals/none_for_the_call_that_the_others_spoil", the_call_itself_works);
    trials.once("refusals/ranks", ranks);
    trials.once("refusals/shapes", shapes);
    trials.once("refusals/heads", heads);
    trials.once("refusals/more_tokens_than_an_i32", more_tokens_than_an_i32);
    trials.once("refusals/head_dims", head_dims);
    trials.once("refusals/element_types", element_types);
    trials.once("refusals/masks_of_another_size", masks_of_another_size);
    trials.once("refusals/ranges_of_another_size", ranges_of_another_size);
    trials.once("refusals/documents", documents);
    trials.once("refusals/ranges_with_metadata_of_the_device", ranges_with_metadata_of_the_device);
    trials.once("refusals/biases", biases);
    trials.once("refusals/views_past_their_memory", views_past_their_memory);
    trials.once("refusals/inner_strides", inner_strides);
    trials.once("refusals/outputs_over_themselves", outputs_over_themselves);
    trials.once("refusals/score_modifiers", score_modifiers);
    trials.once("refusals/softmax_scales", softmax_scales);
    trials.once("refusals/forced_paths_and_kernels", forced_paths_and_kernels);
    trials.once("refusals/pack_and_scatter", pack_and_scatter);
    trials.once("refusals/packed_rows", packed_rows);
    trials.once("refusals/outputs_of_the_primitives", outputs_of_the_primitives);
    trials.once("refusals/another_device", another_device);
    trials.once("refusals/odd_places", odd_places);
}

const Q: [usize; 4] = [2, 6, 4, 16];
const KV: [usize; 4] = [2, 5, 2, 16];

/// Tensors of a call that works: ones.
struct Stage {
    device: Device,
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// A call to spoil in one place.
#[derive(Clone)]
struct Call<'a> {
    layer: MaskedAttention,
    q: TensorView<'a>,
    k: TensorView<'a>,
    v: TensorView<'a>,
    mask: AttentionMask<'a>,
}

fn ones(device: &Device, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    upload(device, dtype, &vec![narrow(1.0, dtype); shape.iter().product()], shape)
}

/// An output that nobody has written to.
fn untouched(device: &Device, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    upload(device, dtype, &vec![sentinel(dtype); shape.iter().product()], shape)
}

impl Stage {
    fn new(device: &Device) -> Result<Self> {
        let ones = |shape: &[usize]| ones(device, DType::F16, shape);
        Ok(Self { device: device.clone(), q: ones(&Q)?, k: ones(&KV)?, v: ones(&KV)? })
    }

    fn ones(&self, shape: &[usize]) -> Result<Tensor> {
        ones(&self.device, DType::F16, shape)
    }

    fn untouched(&self, shape: &[usize]) -> Result<Tensor> {
        untouched(&self.device, DType::F16, shape)
    }

    fn call(&self) -> Call<'_> {
        let (q, k, v) = (self.q.view(), self.k.view(), self.v.view());
        Call { layer: MaskedAttention::new(&self.device), q, k, v, mask: AttentionMask::none() }
    }
}

impl Call<'_> {
    /// `forward` and `forward_into` both fail with `expected`, and the output keeps its bits.
    fn is_refused(&self, expected: &Error) -> Result<()> {
        let Self { layer, q, k, v, mask } = self;
        expect(layer.forward(*q, *k, *v, *mask), expected).context("forward")?;
        self.is_refused_into((q.dtype(), &Q), whole, expected)
    }

    /// `forward_into` a view of a tensor of `shape` fails with `expected`, and the tensor keeps its bits.
    fn is_refused_into(
        &self,
        (dtype, shape): (DType, &[usize]),
        view: impl FnOnce(TensorViewMut<'_>) -> varlen_fa::Result<TensorViewMut<'_>>,
        expected: &Error,
    ) -> Result<()> {
        let Self { layer, q, k, v, mask } = self;
        let mut out = untouched(layer.device(), dtype, shape)?;
        expect(layer.forward_into(*q, *k, *v, *mask, view(out.view_mut())?), expected).context("forward_into")?;
        expect_untouched(&out)
    }
}

/// The whole tensor as the output.
fn whole(out: TensorViewMut<'_>) -> varlen_fa::Result<TensorViewMut<'_>> {
    Ok(out)
}

fn expect<T>(result: varlen_fa::Result<T>, expected: &Error) -> Result<()> {
    let error = result.err().with_context(|| format!("expected {expected:?}, got no error"))?;
    ensure!(error == *expected, "expected {expected:?}, got {error:?}");
    let (message, argument) = (error.to_string(), argument(&error));
    ensure!(message.contains(&format!("`{argument}`")), "{message:?} does not name `{argument}`");
    Ok(())
}

/// The argument that an error is about.
fn argument(error: &Error) -> &'static str {
    match error {
        Error::Rank { argument, .. }
        | Error::Shape { argument, .. }
        | Error::UnsupportedDType { argument, .. }
        | Error::DTypeMismatch { argument, .. }
        | Error::InnerStride { argument, .. }
        | Error::Misaligned { argument, .. }
        | Error::BufferTooSmall { argument, .. }
        | Error::Overlap { argument, .. }
        | Error::SelfOverlap { argument, .. }
        | Error::MaskSize { argument, .. }
        | Error::MaskRow { argument, .. }
        | Error::RangesSize { argument, .. }
        | Error::CuSeqlens { argument, .. }
        | Error::ScoreModifier { argument, .. }
        | Error::TooLarge { argument, .. }
        | Error::DeviceMismatch { argument, .. }
        | Error::NotApplicable { argument, .. } => argument,
        Error::Broadcast { .. } => "bias",
        Error::HeadsNotDivisible { .. } => "k",
        Error::HeadDim { .. } => "q",
        Error::SoftmaxScale { .. } => "softmax_scale",
        _ => "an argument",
    }
}

fn expect_untouched(out: &Tensor) -> Result<()> {
    let sentinel = sentinel(out.dtype());
    ensure!(download(out)?.iter().all(|&bits| bits == sentinel), "a refused call wrote to its output");
    Ok(())
}

fn shape_error(argument: &'static str, expected: &[usize], got: &[usize]) -> Error {
    Error::Shape { argument, expected: expected.to_vec(), got: got.to_vec() }
}

fn the_call_itself_works(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let Call { layer, q, k, v, mask } = stage.call();
    let mut out = stage.untouched(&Q)?;
    layer.forward_into(q, k, v, mask, &mut out)?;
    // Means of ones.
    ensure!(download(&out)? == download(&stage.q)?, "forward_into");
    ensure!(download(&layer.forward(q, k, v, mask)?.out)? == download(&stage.q)?, "forward");
    Ok(())
}

fn ranks(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let flat = stage.ones(&[2, 6, 64])?;
    let rank = |argument, expected| Error::Rank { argument, expected, got: 3 };
    Call { q: flat.view(), ..stage.call() }.is_refused(&rank("q", "4: [B, S, H, D]"))?;
    Call { k: flat.view(), ..stage.call() }.is_refused(&rank("k", "4: [B, S, Hkv, D]"))?;
    Call { v: flat.view(), ..stage.call() }.is_refused(&shape_error("v", &KV, &[2, 6, 64]))?;
    stage.call().is_refused_into((DType::F16, &[2, 6, 64]), whole, &shape_error("out", &Q, &[2, 6, 64]))
}

fn shapes(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    for got in [[1, 5, 2, 16], [3, 5, 2, 16], [2, 5, 2, 8], [2, 5, 2, 24]] {
        let other = stage.ones(&got)?;
        let expected = [2, got[1], got[2], 16];
        Call { k: other.view(), ..stage.call() }.is_refused(&shape_error("k", &expected, &got))?;
    }
    for got in [[1, 5, 2, 16], [2, 4, 2, 16], [2, 6, 2, 16], [2, 5, 1, 16], [2, 5, 4, 16], [2, 5, 2, 8]] {
        let other = stage.ones(&got)?;
        Call { v: other.view(), ..stage.call() }.is_refused(&shape_error("v", &KV, &got))?;
    }
    for got in [[1, 6, 4, 16], [2, 5, 4, 16], [2, 7, 4, 16], [2, 6, 2, 16], [2, 6, 4, 8], [2, 4, 6, 16]] {
        stage.call().is_refused_into((DType::F16, &got), whole, &shape_error("out", &Q, &got))?;
    }
    Ok(())
}

fn heads(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    for num_kv_heads in [0, 3, 5, 8] {
        let kv = stage.ones(&[2, 5, num_kv_heads, 16])?;
        let call = Call { k: kv.view(), v: kv.view(), ..stage.call() };
        call.is_refused(&Error::HeadsNotDivisible { num_heads: 4, num_kv_heads })?;
    }
    Ok(())
}

/// `batch · seq` past an `i32`, without a mask that would refuse it; all tokens lie in one place.
fn more_tokens_than_an_i32(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let one = stage.ones(&[1, 1, 1, 8])?;
    let (few, many) = ([65_536, 1, 1, 8], [65_536, 32_768, 1, 8]);
    let few = one.view().with_layout(Layout::strided(&few, &[0, 0, 0, 1], 0)?);
    let many = one.view().with_layout(Layout::strided(&many, &[0, 0, 0, 1], 0)?);
    let limit = i32::MAX as u64;
    let too_large =
        |argument| Error::TooLarge { argument, limit_name: "an i32 of batch · seq", limit, got: limit + 1 };
    let call = Call { q: few, k: many, v: many, ..stage.call() };
    call.is_refused(&too_large("k"))?;
    let call = Call { q: many, k: few, v: few, ..stage.call() };
    expect(call.layer.forward(call.q, call.k, call.v, call.mask), &too_large("q"))
}

fn head_dims(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    for got in [0, 513, 520, 1024] {
        let x = stage.ones(&[2, 6, 4, got])?;
        let call = Call { q: x.view(), k: x.view(), v: x.view(), ..stage.call() };
        let expected = Error::HeadDim { got };
        expect(call.layer.forward(call.q, call.k, call.v, call.mask), &expected)?;
        call.is_refused_into((DType::F16, &[2, 6, 4, got]), whole, &expected)?;
    }
    Ok(())
}

fn element_types(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let mismatch = |argument, got| Error::DTypeMismatch { argument, expected: DType::F16, got };
    for got in [DType::Bf16, DType::F32] {
        let kv = ones(device, got, &KV)?;
        Call { k: kv.view(), ..stage.call() }.is_refused(&mismatch("k", got))?;
        Call { v: kv.view(), ..stage.call() }.is_refused(&mismatch("v", got))?;
        stage.call().is_refused_into((got, &Q), whole, &mismatch("out", got))?;
    }
    for got in [DType::F32, DType::F16, DType::Bf16] {
        let taken = device.capabilities().dtypes;
        if !taken.contains(&got) {
            let (q, kv) = (ones(device, got, &Q)?, ones(device, got, &KV)?);
            let expected = Error::UnsupportedDType {
                argument: "q",
                device: device.name().to_owned(),
                expected: taken.to_vec(),
                got,
            };
            Call { q: q.view(), k: kv.view(), v: kv.view(), ..stage.call() }.is_refused(&expected)?;
        }
    }
    Ok(())
}

fn masks_of_another_size(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let size = |argument, expected, got| Error::MaskSize { argument, expected, got };
    let meta = |[batch, seq]: [usize; 2]| VarlenMeta::from_key_mask(&KeyMask::all(batch, seq)?);
    for got in [[2, 4], [2, 6], [1, 5], [3, 5], [5, 2], [1, 10]] {
        let mask = KeyMask::all(got[0], got[1])?;
        Call { mask: AttentionMask::key(&mask), ..stage.call() }.is_refused(&size("mask", [2, 5], got))?;
        let (query, key) = (meta([2, 6])?, meta(got)?);
        let cross = AttentionMask::varlen_cross(&query, &key);
        Call { mask: cross, ..stage.call() }.is_refused(&size("key metadata", [2, 5], got))?;
    }
    for got in [[2, 5], [2, 7], [1, 6], [3, 6], [6, 2]] {
        let (query, key) = (meta(got)?, meta([2, 5])?);
        let cross = AttentionMask::varlen_cross(&query, &key);
        Call { mask: cross, ..stage.call() }.is_refused(&size("query metadata", [2, 6], got))?;
    }
    // One metadata for queries and keys of different lengths: one of the two does not fit.
    let (six, five) = (meta([2, 6])?, meta([2, 5])?);
    Call { mask: AttentionMask::varlen(&six), ..stage.call() }.is_refused(&size("key metadata", [2, 5], [2, 6]))?;
    Call { mask: AttentionMask::varlen(&five), ..stage.call() }.is_refused(&size("query metadata", [2, 6], [2, 5]))
}

fn ranges_of_another_size(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let size = |expected: &str, got: &str| Error::RangesSize {
        argument: "ranges",
        expected: expected.to_owned(),
        got: got.to_owned(),
    };
    let keys = KeyMask::from_lengths(5, &[3, 4])?;
    let meta = |seq| VarlenMeta::from_key_mask(&KeyMask::from_lengths(seq, &[3, 4])?);
    let (query, key) = (meta(6)?, meta(5)?);
    let cross = AttentionMask::varlen_cross(&query, &key);
    for mask in [AttentionMask::none(), AttentionMask::key(&keys), cross] {
        for got in [[2, 5, 5], [2, 6, 6], [2, 6, 4], [1, 6, 5], [3, 6, 5], [2, 5, 6], [0, 6, 5]] {
            let ranges = KeyRanges::causal(got)?;
            let expected = size("[B, Sq, Sk] = [2, 6, 5]", &format!("[B, Sq, Sk] = {got:?}"));
            Call { mask: mask.with_ranges(&ranges), ..stage.call() }.is_refused(&expected)?;
        }
        let (six, five) = (CuSeqlens::new(&[0, 6, 12])?, CuSeqlens::new(&[0, 5, 10])?);
        let packed = KeyRanges::causal((&six, &five))?;
        let expected = size("[B, Sq, Sk] = [2, 6, 5]", "2 packed sequences of 12 queries and 10 keys");
        Call { mask: mask.with_ranges(&packed), ..stage.call() }.is_refused(&expected)?;
    }

    let (q, kv) = (stage.ones(&[7, 4, 16])?, stage.ones(&[9, 2, 16])?);
    let (cu_q, cu_k) = (CuSeqlens::new(&[0, 3, 7])?, CuSeqlens::new(&[0, 9, 9])?);
    let fits = "2 packed sequences of 7 queries and 9 keys";
    // As many rows of each side, but other sequences.
    let other = CuSeqlens::new(&[0, 4, 7])?;
    for (ranges, got) in [
        (KeyRanges::causal((&other, &cu_k))?, fits),
        (KeyRanges::causal((&cu_q, &cu_q))?, "2 packed sequences of 7 queries and 7 keys"),
        (KeyRanges::causal([2, 7, 9])?, "[B, Sq, Sk] = [2, 7, 9]"),
    ] {
        let options = VarlenOptions::default().with_ranges(&ranges);
        let mut out = stage.untouched(&[7, 4, 16])?;
        let views = [q.view(), kv.view(), kv.view()];
        let refused = varlen_attention_into(device, views, &cu_q, &cu_k, options, &mut out, None::<&mut Tensor>);
        expect(refused, &size(fits, got))?;
        expect_untouched(&out)?;
    }
    Ok(())
}

/// Documents in two pieces, and documents of one side of cross-attention.
fn documents(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let expected = Error::MaskRow {
        argument: "document_ids",
        row: 1,
        expected: "the tokens of a document together".to_owned(),
        got: "document 2 in two places".to_owned(),
    };
    let two_places = [1, 1, 2, 2, 3, 2, 1, 2, 0, 0];
    expect(VarlenMeta::from_document_ids(2, 5, &two_places), &expected)?;
    expect(KeyRanges::from_document_ids(2, 5, &two_places), &expected)?;

    // Ranges of other sizes beside documents of one's own.
    let meta = VarlenMeta::from_document_ids(2, 6, &[1; 12])?;
    let other = KeyRanges::causal([2, 6, 5])?;
    let expected = Error::RangesSize {
        argument: "ranges",
        expected: "[B, Sq, Sk] = [2, 6, 6]".to_owned(),
        got: "[B, Sq, Sk] = [2, 6, 5]".to_owned(),
    };
    let mask = AttentionMask::varlen(&meta).with_ranges(&other);
    Call { k: stage.q.view(), v: stage.q.view(), mask, ..stage.call() }.is_refused(&expected)?;

    let of_documents = |seq| VarlenMeta::from_document_ids(2, seq, &vec![1; 2 * seq]);
    let plain = |seq| VarlenMeta::from_key_mask(&KeyMask::all(2, seq)?);
    let expected = Error::NotApplicable {
        argument: "mask",
        got: "metadata of documents in cross-attention".to_owned(),
        why: "documents are for self-attention; give cross-attention ranges of its own".to_owned(),
    };
    for (query, key) in
        [(of_documents(6)?, plain(5)?), (plain(6)?, of_documents(5)?), (of_documents(6)?, of_documents(5)?)]
    {
        Call { mask: AttentionMask::varlen_cross(&query, &key), ..stage.call() }.is_refused(&expected)?;
    }
    Ok(())
}

/// Where no kernel takes ranges with metadata of a GPU the error says so, whatever kernel the plan asks. What the CPU device builds
/// is the host's.
fn ranges_with_metadata_of_the_device(device: &Device) -> Result<libtest_mimic::Completion> {
    let stage = Stage::new(device)?;
    let (query, key) = (device_meta(device, 2, 6, &[true; 12])?, device_meta(device, 2, 5, &[true; 10])?);
    let ranges = KeyRanges::causal([2, 6, 5])?;
    let mask = AttentionMask::varlen_cross(&query, &key).with_ranges(&ranges);
    let call = Call { mask, ..stage.call() };
    let kernels = &device.capabilities().kernels;
    let takes_them = kernels.iter().any(|kernel| kernel.has_ranges() && kernel.takes_all_with_device_meta());
    if device.capabilities().backend == BackendKind::Cpu || takes_them {
        // The first query comes before the first key and sees none; the others' rows are means of ones.
        let out = download(&call.layer.forward(call.q, call.k, call.v, mask)?.out)?;
        let one = narrow(1.0, DType::F16);
        let expected = |at: usize| if (at / 64).is_multiple_of(6) { 0 } else { one };
        ensure!(out.iter().enumerate().all(|(at, &bits)| bits == expected(at)), "got {out:?}");
        return Ok(libtest_mimic::Completion::Completed);
    }
    let error = call.layer.forward(call.q, call.k, call.v, mask).err().context("it was computed")?;
    let Error::NotApplicable { argument: "kernel", why, .. } = &error else { anyhow::bail!("got {error:?}") };
    ensure!(why.contains("key ranges need metadata that was built on the host"), "got {why}");
    call.is_refused(&error)?;
    Ok(libtest_mimic::Completion::Completed)
}

fn biases(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let full = vec![2, 4, 6, 5];
    let shapes: [&[usize]; 9] =
        [&[4], &[6], &[6, 4], &[5, 6], &[3, 1, 1, 5], &[2, 2, 6, 5], &[2, 4, 5, 6], &[0], &[2, 1, 1, 10]];
    for got in shapes {
        let bias = ones(device, DType::F32, got)?;
        let expected = Error::Broadcast { expected: full.clone(), got: got.to_vec() };
        Call { mask: AttentionMask::bias(bias.view()), ..stage.call() }.is_refused(&expected)?;
    }
    let bias = ones(device, DType::Bf16, &[5])?;
    let expected = Error::DTypeMismatch { argument: "bias", expected: DType::F16, got: DType::Bf16 };
    Call { mask: AttentionMask::bias(bias.view()), ..stage.call() }.is_refused(&expected)?;
    // One element short, whether counted from the start or by strides.
    let bias = ones(device, DType::F32, &[2 * 4 * 6 * 5])?;
    let layout = Layout::strided(&[2, 4, 6, 5], &[120, 30, 5, 1], 4)?;
    let expected = Error::BufferTooSmall { argument: "bias", expected: 4 * 244, got: 4 * 240 };
    Call { mask: AttentionMask::bias(bias.view().with_layout(layout)), ..stage.call() }.is_refused(&expected)
}

/// Views whose layout reaches past the memory, by a row or by an offset.
fn views_past_their_memory(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let bytes = |shape: [usize; 4]| 2 * shape.iter().product::<usize>() as u64;
    let too_small = |argument, shape: [usize; 4], by| Error::BufferTooSmall {
        argument,
        expected: bytes(shape) + by,
        got: bytes(shape),
    };
    let shifted = |shape: [usize; 4]| {
        let [_, s, h, d] = shape.map(|size| size as u64);
        Layout::strided(&shape, &[s * h * d, h * d, d, 1], 16)
    };
    let (q, kv) = (shifted(Q)?, shifted(KV)?);
    Call { q: stage.q.view().with_layout(q), ..stage.call() }.is_refused(&too_small("q", Q, 32))?;
    Call { k: stage.k.view().with_layout(kv), ..stage.call() }.is_refused(&too_small("k", KV, 32))?;
    Call { v: stage.v.view().with_layout(kv), ..stage.call() }.is_refused(&too_small("v", KV, 32))?;
    stage.call().is_refused_into((DType::F16, &Q), |out| Ok(out.with_layout(q)), &too_small("out", Q, 32))?;
    // Batch rows that are one row of heads too far apart.
    let apart = Layout::strided(&Q, &[7 * 64, 64, 16, 1], 0)?;
    Call { q: stage.q.view().with_layout(apart), ..stage.call() }.is_refused(&too_small("q", Q, 2 * 64))?;
    stage.call().is_refused_into((DType::F16, &Q), |out| Ok(out.with_layout(apart)), &too_small("out", Q, 2 * 64))?;
    // A batch row near 2^60: no arithmetic overflows on the way to the error.
    let far = Layout::strided(&Q, &[1 << 59, 64, 16, 1], 0)?;
    let expected = Error::BufferTooSmall { argument: "q", expected: 2 * ((1 << 59) + 6 * 64), got: bytes(Q) };
    Call { q: stage.q.view().with_layout(far), ..stage.call() }.is_refused(&expected)
}

fn inner_strides(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let inner = |argument, got| Error::InnerStride { argument, got };
    // [B, S, D, H] in memory.
    let turned = |shape: [usize; 4]| stage.ones(&[shape[0], shape[1], shape[3], shape[2]]);
    let (q, kv) = (turned(Q)?, turned(KV)?);
    let order = [0, 1, 3, 2];
    Call { q: q.view().permute(&order)?, ..stage.call() }.is_refused(&inner("q", 4))?;
    Call { k: kv.view().permute(&order)?, ..stage.call() }.is_refused(&inner("k", 2))?;
    Call { v: kv.view().permute(&order)?, ..stage.call() }.is_refused(&inner("v", 2))?;
    stage.call().is_refused_into((DType::F16, &[2, 6, 16, 4]), |out| out.permute(&order), &inner("out", 4))?;
    // Every element of a row the same one.
    let broadcast = Layout::strided(&Q, &[6 * 64, 64, 16, 0], 0)?;
    Call { q: stage.q.view().with_layout(broadcast), ..stage.call() }.is_refused(&inner("q", 0))
}

fn outputs_over_themselves(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    for strides in [[0, 64, 16, 1], [6 * 64, 0, 16, 1], [6 * 64, 64, 0, 1], [6 * 64, 64, 8, 1], [64, 64, 16, 1]] {
        let layout = Layout::strided(&Q, &strides, 0)?;
        let expected = Error::SelfOverlap { argument: "out", shape: Q.to_vec(), strides: strides.to_vec() };
        stage.call().is_refused_into((DType::F16, &Q), |out| Ok(out.with_layout(layout)), &expected)?;
    }
    // Inputs may: rows that all heads or all batch rows share are views like any other.
    let shared = Layout::strided(&KV, &[0, 16, 0, 1], 0)?;
    let Call { layer, q, mask, .. } = stage.call();
    layer.forward(q, stage.k.view().with_layout(shared), stage.v.view().with_layout(shared), mask)?;
    Ok(())
}

fn softmax_scales(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    for got in [f32::INFINITY, f32::NEG_INFINITY] {
        let call = stage.call();
        let layer = call.layer.clone().with_softmax_scale(got);
        Call { layer, ..call }.is_refused(&Error::SoftmaxScale { got })?;
    }
    // A NaN equals nothing, not even the NaN in the error.
    let Call { layer, q, k, v, mask } = stage.call();
    let mut out = stage.untouched(&Q)?;
    let error = layer.with_softmax_scale(f32::NAN).forward_into(q, k, v, mask, &mut out).err();
    ensure!(matches!(&error, Some(Error::SoftmaxScale { got }) if got.is_nan()), "got {error:?}");
    ensure!(error.is_some_and(|error| error.to_string().contains("`softmax_scale`")));
    expect_untouched(&out)
}

fn score_modifiers(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let refused = |modifiers: ScoreModifiers, argument, expected: &str, got: &str| {
        let Call { layer, q, k, v, mask } = stage.call();
        let expected = Error::ScoreModifier { argument, expected: expected.to_owned(), got: got.to_owned() };
        Call { layer, q, k, v, mask: mask.with_modifiers(&modifiers) }.is_refused(&expected)
    };
    let none = ScoreModifiers::new;
    for (softcap, got) in [(-1.0, "-1"), (f32::INFINITY, "inf"), (f32::NAN, "NaN")] {
        refused(none().with_softcap(softcap), "softcap", "a finite number, 0 for none or more", got)?;
    }
    let heads = format!("a number for each of {} query heads", Q[2]);
    refused(none().with_alibi([0.5]), "alibi", &heads, "1")?;
    refused(none().with_sinks([]), "sinks", &heads, "0")?;
    let mut values = [0.5; Q[2]];
    values[1] = f32::INFINITY;
    refused(none().with_alibi(values), "alibi", "finite numbers", "inf for head 1")?;
    refused(none().with_sinks(values), "sinks", "finite numbers or −∞", "inf for head 1")?;
    Ok(())
}

fn forced_paths_and_kernels(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let meta = |seq| VarlenMeta::from_key_mask(&KeyMask::from_lengths(seq, &[3, 4])?);
    let (query, key, keys) = (meta(6)?, meta(5)?, KeyMask::from_lengths(5, &[3, 4])?);
    let bias = ones(device, DType::F32, &[5])?;
    let varlen = AttentionMask::varlen_cross(&query, &key);
    let is_refused = |path: Path, mask| -> Result<()> {
        let call = stage.call();
        let call = Call { layer: call.layer.clone().with_path(path), mask, ..call };
        let error =
            call.layer.forward(call.q, call.k, call.v, mask).err().with_context(|| format!("{path} was taken"))?;
        let Error::NotApplicable { argument: "path", got, why } = &error else {
            anyhow::bail!("{path}: got {error:?}")
        };
        ensure!(got == path.name() && !why.is_empty(), "{path}: got {error:?}");
        call.is_refused(&error)
    };
    for mask in [AttentionMask::none(), AttentionMask::bias(bias.view())] {
        for path in [Path::Fused, Path::Packed, Path::Zero] {
            is_refused(path, mask)?;
        }
    }
    is_refused(Path::Zero, varlen)?;
    is_refused(Path::Zero, AttentionMask::key(&keys))?;
    for &kernel in Kernel::ALL {
        if device.capabilities().kernels.contains(&kernel) {
            too_wide_for(kernel, &stage)?;
            continue;
        }
        let call = stage.call();
        let call = Call { layer: call.layer.clone().with_kernel(kernel), ..call };
        let error = call.layer.forward(call.q, call.k, call.v, call.mask).err().context("a foreign kernel ran")?;
        let Error::NotApplicable { argument: "kernel", got, .. } = &error else { anyhow::bail!("got {error:?}") };
        ensure!(got == kernel.name(), "got {error:?}");
        call.is_refused(&error)?;
        let cu = CuSeqlens::new(&[0])?;
        let q = stage.ones(&[0, 1, 8])?;
        let options = VarlenOptions::default().with_kernel(kernel);
        expect(varlen_attention(device, [&q, &q, &q], &cu, &cu, options), &error)?;
    }
    Ok(())
}

/// The first head dimension that a kernel of the device does not have, if there is one: forced, it is refused; otherwise another
/// kernel takes the call.
fn too_wide_for(kernel: Kernel, stage: &Stage) -> Result<()> {
    let head_dim = kernel.max_head_dim() + 8;
    if head_dim > 512 {
        return Ok(());
    }
    let x = stage.ones(&[2, 6, 4, head_dim])?;
    let layer = MaskedAttention::new(&stage.device);
    let error = layer.clone().with_kernel(kernel).forward(&x, &x, &x, AttentionMask::none()).err();
    let error = error.with_context(|| format!("{kernel} ran at head_dim {head_dim}"))?;
    let is_refusal = matches!(&error, Error::NotApplicable { argument: "kernel", got, .. } if got == kernel.name());
    ensure!(is_refusal, "got {error:?}");
    let others = &stage.device.capabilities().kernels;
    match layer.forward(&x, &x, &x, AttentionMask::none()) {
        Ok(attended) => ensure!(attended.plan.kernel != kernel, "got {}", attended.plan),
        Err(error) => {
            ensure!(others.iter().all(|other| other.max_head_dim() < head_dim), "got {error:?}");
            ensure!(matches!(error, Error::NotApplicable { argument: "kernel", .. }), "got {error:?}");
        }
    }
    Ok(())
}

fn pack_and_scatter(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(6, &[3, 4])?)?;
    let flat = stage.ones(&[12, 4, 16])?;
    let rank = |argument, expected, got| Error::Rank { argument, expected, got };
    let size = |got| Error::MaskSize { argument: "meta", expected: [2, 5], got };
    expect(pack(device, &flat, &meta), &rank("padded", "4: [B, S, H, D]", 3))?;
    expect(pack(device, &stage.k, &meta), &size([2, 6]))?;
    expect(pack_qkv(device, &flat, &stage.q, &stage.q, &meta), &rank("q", "4: [B, S, H, D]", 3))?;
    expect(pack_qkv(device, &stage.q, &flat, &stage.q, &meta), &rank("k", "4: [B, S, H, D]", 3))?;
    expect(pack_qkv(device, &stage.q, &stage.q, &flat, &meta), &rank("v", "4: [B, S, H, D]", 3))?;
    expect(pack_qkv(device, &stage.q, &stage.k, &stage.q, &meta), &size([2, 6]))?;
    for got in [0, 513, 520] {
        let x = stage.ones(&[2, 6, 1, got])?;
        let error = pack(device, &x, &meta).err().context("a head dimension that no kernel takes")?;
        ensure!(error == Error::HeadDim { got }, "got {error:?}");
    }
    let turned = stage.ones(&[2, 6, 16, 4])?;
    let view = turned.view().permute(&[0, 1, 3, 2])?;
    expect(pack(device, view, &meta), &Error::InnerStride { argument: "padded", got: 4 })?;
    let past = Layout::strided(&Q, &[6 * 64, 64, 16, 1], 8)?;
    let expected = Error::BufferTooSmall { argument: "padded", expected: 2 * (2 * 6 * 64 + 8), got: 2 * 2 * 6 * 64 };
    expect(pack(device, stage.q.view().with_layout(past), &meta), &expected)?;

    expect(scatter_to_padded(device, &stage.q, &meta), &rank("packed", "3: [total_valid, H, D]", 4))?;
    for rows in [0, 6, 8] {
        let packed = stage.ones(&[rows, 4, 16])?;
        expect(scatter_to_padded(device, &packed, &meta), &shape_error("packed", &[7, 4, 16], &[rows, 4, 16]))?;
    }
    Ok(())
}

fn packed_rows(device: &Device) -> Result<()> {
    let tensor = |shape: &[usize]| ones(device, DType::F16, shape);
    let (q, k, padded) = (tensor(&[7, 4, 16])?, tensor(&[9, 2, 16])?, tensor(&Q)?);
    let (cu_q, cu_k) = (CuSeqlens::new(&[0, 3, 7])?, CuSeqlens::new(&[0, 9, 9])?);
    let attend = |views: [TensorView<'_>; 3], cu_q: &CuSeqlens, cu_k: &CuSeqlens| {
        varlen_attention(device, views, cu_q, cu_k, VarlenOptions::default().with_lse())
    };
    attend([q.view(), k.view(), k.view()], &cu_q, &cu_k).context("the call that the others spoil")?;

    let rank = |argument, expected| Error::Rank { argument, expected, got: 4 };
    expect(attend([padded.view(), k.view(), k.view()], &cu_q, &cu_k), &rank("q", "3: [total_q, H, D]"))?;
    expect(attend([q.view(), padded.view(), k.view()], &cu_q, &cu_k), &rank("k", "3: [total_k, Hkv, D]"))?;
    expect(attend([q.view(), k.view(), q.view()], &cu_q, &cu_k), &shape_error("v", &[9, 2, 16], &[7, 4, 16]))?;

    let last = |argument, total: usize, got: &str| Error::CuSeqlens {
        argument,
        expected: format!("a last value of {total}, the number of packed rows"),
        got: got.to_owned(),
    };
    let views = [q.view(), k.view(), k.view()];
    expect(attend(views, &CuSeqlens::new(&[0, 3, 6])?, &cu_k), &last("cu_seqlens_q", 7, "6"))?;
    expect(attend(views, &CuSeqlens::new(&[0, 3, 8])?, &cu_k), &last("cu_seqlens_q", 7, "8"))?;
    expect(attend(views, &cu_q, &CuSeqlens::new(&[0, 0, 0])?), &last("cu_seqlens_k", 9, "0"))?;
    let expected = Error::CuSeqlens {
        argument: "cu_seqlens_k",
        expected: "as many sequences as cu_seqlens_q, 2".to_owned(),
        got: "3".to_owned(),
    };
    expect(attend(views, &cu_q, &CuSeqlens::new(&[0, 1, 2, 9])?), &expected)?;

    let three = tensor(&[9, 3, 16])?;
    let expected = Error::HeadsNotDivisible { num_heads: 4, num_kv_heads: 3 };
    expect(attend([q.view(), three.view(), three.view()], &cu_q, &cu_k), &expected)?;
    let (wide_q, wide_k) = (tensor(&[7, 4, 513])?, tensor(&[9, 2, 513])?);
    expect(attend([wide_q.view(), wide_k.view(), wide_k.view()], &cu_q, &cu_k), &Error::HeadDim { got: 513 })?;
    let options = VarlenOptions::default().with_softmax_scale(f32::INFINITY);
    let refused = varlen_attention(device, views, &cu_q, &cu_k, options);
    expect(refused, &Error::SoftmaxScale { got: f32::INFINITY })
}

/// Outputs that do not fit are refused by name, and keep their bits.
fn outputs_of_the_primitives(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(6, &[3, 4])?)?;
    let (q, packed) = (&stage.q, stage.ones(&[7, 4, 16])?);
    let mut good = [stage.untouched(&[7, 4, 16])?, stage.untouched(&[7, 4, 16])?, stage.untouched(&[7, 4, 16])?];

    let mut short = stage.untouched(&[6, 4, 16])?;
    let shape = |argument| shape_error(argument, &[7, 4, 16], &[6, 4, 16]);
    expect(pack_into(device, q, &meta, &mut short), &shape("packed"))?;
    for (at, name) in ["packed_q", "packed_k", "packed_v"].into_iter().enumerate() {
        let mut views = good.each_mut().map(Tensor::view_mut);
        views[at] = short.view_mut();
        expect(pack_qkv_into(device, q, q, q, &meta, views), &shape(name))?;
    }
    let mut flat = stage.untouched(&[7 * 4 * 16])?;
    let over = Layout::strided(&[7, 4, 16], &[48, 16, 1], 0)?;
    let expected = Error::SelfOverlap { argument: "packed", shape: vec![7, 4, 16], strides: vec![48, 16, 1] };
    expect(pack_into(device, q, &meta, flat.view_mut().with_layout(over)), &expected)?;

    let rank = Error::Rank { argument: "padded", expected: "4: [B, S, H, D]", got: 3 };
    expect(scatter_to_padded_into(device, &packed, &meta, &mut good[0]), &rank)?;
    let mut other = stage.untouched(&[2, 7, 4, 16])?;
    let size = Error::MaskSize { argument: "meta", expected: [2, 7], got: [2, 6] };
    expect(scatter_to_padded_into(device, &packed, &meta, &mut other), &size)?;

    let (cu, options) = (meta.cu_seqlens(), VarlenOptions::default());
    let views = [packed.view(), packed.view(), packed.view()];
    let mut lse = untouched(device, DType::F32, &[7, 4])?;
    let attend =
        |out: &mut Tensor, lse: &mut Tensor| varlen_attention_into(device, views, cu, cu, options, out, Some(lse));
    expect(attend(&mut short, &mut lse), &shape("out"))?;
    expect(attend(&mut good[0], &mut lse), &shape_error("lse", &[4, 7], &[7, 4]))?;
    let mut half = stage.untouched(&[4, 7])?;
    let expected = Error::DTypeMismatch { argument: "lse", expected: DType::F32, got: DType::F16 };
    expect(attend(&mut good[0], &mut half), &expected)?;

    let [a, b, c] = &good;
    for tensor in [&short, &flat, &other, &lse, &half, a, b, c] {
        expect_untouched(tensor)?;
    }
    Ok(())
}

/// Tensors of the CPU device on another one, of a second device on the first, and the other way round.
fn another_device(device: &Device) -> Result<libtest_mimic::Completion> {
    let config = varlen_fa::Config::default();
    let backend = device.capabilities().backend;
    if backend == BackendKind::Cpu {
        let why = "there is one CPU device; the trials of other devices give it their tensors";
        return Ok(libtest_mimic::Completion::ignored_with(why));
    }
    let second = Device::with_config(device.config().with_device(backend.into()))?;
    let cpu = Device::with_config(config.with_device(varlen_fa::DeviceChoice::Cpu))?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(6, &[3, 4])?)?;
    let mut pairs = vec![(device, &cpu), (&cpu, device)];
    // One CUDA device is shared by all that ask for it, so tensors of the second are its own.
    if backend != BackendKind::Cuda {
        pairs.push((device, &second));
    }
    for (here, there) in pairs {
        let mismatch = |argument| Error::DeviceMismatch {
            argument,
            expected: here.name().to_owned(),
            got: there.name().to_owned(),
        };
        let (stage, foreign) = (Stage::new(here)?, Stage::new(there)?);
        Call { q: foreign.q.view(), ..stage.call() }.is_refused(&mismatch("q"))?;
        Call { k: foreign.k.view(), ..stage.call() }.is_refused(&mismatch("k"))?;
        Call { v: foreign.v.view(), ..stage.call() }.is_refused(&mismatch("v"))?;
        let bias = ones(there, DType::F16, &[5])?;
        Call { mask: AttentionMask::bias(bias.view()), ..stage.call() }.is_refused(&mismatch("bias"))?;
        let mut out = foreign.untouched(&Q)?;
        let Call { layer, q, k, v, mask } = stage.call();
        expect(layer.forward_into(q, k, v, mask, &mut out), &mismatch("out"))?;
        expect_untouched(&out)?;
        expect(pack(here, &foreign.q, &meta), &mismatch("padded"))?;
        let packed = foreign.ones(&[7, 4, 16])?;
        expect(scatter_to_padded(here, &packed, &meta), &mismatch("packed"))?;
        let cu = meta.cu_seqlens();
        let options = VarlenOptions::default();
        expect(varlen_attention(here, [&packed, &packed, &packed], cu, cu, options), &mismatch("q"))?;
    }
    Ok(libtest_mimic::Completion::Completed)
}

/// Rows of 16-bit elements that start at odd places: computed, or refused as misaligned, never garbage.
fn odd_places(device: &Device) -> Result<()> {
    let stage = Stage::new(device)?;
    let zeros = Tensor::zeros(device, DType::F16, &[2 * 6 * 4 * 17 + 1])?;
    for layout in [Layout::strided(&Q, &[6 * 64, 64, 16, 1], 1)?, Layout::strided(&Q, &[6 * 68, 68, 17, 1], 0)?] {
        let Call { layer, .. } = stage.call();
        let view = zeros.view().with_layout(layout);
        let is_misaligned = |error: &Error, argument| {
            matches!(error, Error::Misaligned { argument: got, .. } if *got == argument)
                && error.to_string().contains(&format!("`{argument}`"))
        };
        let mut out = stage.untouched(&Q)?;
        match layer.forward_into(view, view, view, AttentionMask::none(), &mut out) {
            Ok(_) => ensure!(download(&out)?.iter().all(|&bits| bits == 0), "attention over zeros is not zeros"),
            Err(error) => {
                ensure!(is_misaligned(&error, "q"), "got {error:?}");
                expect_untouched(&out)?;
            }
        }
        let mut holder = stage.untouched(&[2 * 6 * 4 * 17 + 1])?;
        let q = Tensor::zeros(device, DType::F16, &Q)?;
        match layer.forward_into(&q, &q, &q, AttentionMask::none(), holder.view_mut().with_layout(layout)) {
            Ok(_) => {
                let written = download(&holder)?.iter().filter(|&&bits| bits == 0).count();
                ensure!(written == Q.iter().product(), "{written} elements were written");
            }
            Err(error) => {
                ensure!(is_misaligned(&error, "out"), "got {error:?}");
                expect_untouched(&holder)?;
            }
        }
    }
    Ok(())
}
