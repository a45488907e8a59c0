//! q, k, v and the output in segments along S: the bits of the call on whole tensors, wherever each segment lies and however each
//! tensor is cut; where a kernel's tiles end with the segments, its result to rounding.

use anyhow::{Context, Result, ensure};
use varlen_fa::{
    AttentionMask, AttentionOutputs, DType, Device, Error, Kernel, KeyMask, MaskedAttention, Path, Plan, Segments,
    SegmentsMut, Tensor, TensorView, TensorViewMut, VarlenMeta, merge_attention_into,
};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask, tensor_shapes};
use super::check::Rules;
use super::head_dims::{few, or_narrow};
use super::layouts::ODD;
use super::lse::{self, LseMemory};
use super::memory::{download, narrow, poison, precision, sentinel, upload};
use super::placement::Placement;
use super::rule::Rule;
use super::trials::{Trials, Variant, is_emulated_gpu};

pub fn register(trials: &mut Trials) {
    trials.once("segments/refusals", refusals);
    trials.each_path("segments/numbers_and_lengths", numbers_and_lengths);
    trials.each_path("segments/joint_layer", joint_layer);
    trials.each_path("segments/cross", cross);
    trials.each_path("segments/lse", with_lse);
    trials.each_path_with_ranges("segments/ranges", ranges);
    trials.each_path_of_device_meta("segments/device_meta", device_meta);
    trials.each_kernel("segments/no_mask_and_key_masks", no_mask_and_key_masks);
    trials.each_kernel("segments/head_dim_of_odd_length", head_dim_of_odd_length);
    trials.each_kernel_with_bias("segments/bias", bias);
    trials.each_kernel("segments/forward", forward);
    trials.each_dtype("segments/nothing_to_see", nothing_to_see);
}

/// Lengths of the segments before the last one.
const LENGTHS: [usize; 7] = [16, 1, 0, 17, 63, 15, 65];
const SEQ: usize = 300;
const SHAPE: OracleShape = OracleShape { batch: 2, seq_q: SEQ, seq_k: SEQ, heads: 4, kv_heads: 2, head_dim: 32 };

fn shape(variant: &Variant) -> OracleShape {
    OracleShape { head_dim: or_narrow(variant, SHAPE.head_dim), ..SHAPE }
}

const PLACES: [Placement; 6] =
    [Placement::CONTIGUOUS, Placement::ROOM_AROUND, ODD[0], Placement::HEADS_OUTSIDE, ODD[1], Placement::TURNED];

/// The lengths of the segments of q, k, v and the output.
#[derive(Debug, Clone)]
struct Cuts([Vec<usize>; 4]);

impl Cuts {
    /// `count` segments of each, of other lengths in each.
    fn of(call: &Call, count: usize) -> Self {
        let OracleShape { seq_q, seq_k, .. } = call.shape;
        Self([(0, seq_q), (1, seq_k), (3, seq_k), (5, seq_q)].map(|(first, seq)| {
            let mut left = seq;
            let before = (0..count - 1).map(|at| {
                let length = LENGTHS[(first + at) % LENGTHS.len()].min(left);
                left -= length;
                length
            });
            let mut lengths: Vec<_> = before.collect();
            lengths.push(left);
            lengths
        }))
    }
}

/// A part of a tensor, in memory of its own.
pub struct Segment {
    memory: Tensor,
    placement: Placement,
    shape: [usize; 4],
    /// Tokens before it.
    first: usize,
}

impl Segment {
    /// The parts of a tensor whose rows are given by batch row, token and head; memory that no row fills holds what `around` says.
    pub fn cut<'v>(
        device: &Device,
        dtype: DType,
        (whole, lengths): ([usize; 4], &[usize]),
        around: impl Fn(usize) -> u32,
        row: impl Fn(usize, usize, usize) -> Option<&'v [f32]>,
    ) -> Result<Vec<Self>> {
        let [batch, _, heads, dim] = whole;
        let mut first = 0;
        let mut segments = Vec::new();
        for (index, &len) in lengths.iter().enumerate() {
            let shape = [batch, len, heads, dim];
            // A device may refuse whole tensors at odd places.
            let placement = if lengths.len() == 1 { Placement::ROOM_AROUND } else { PLACES[index % PLACES.len()] };
            let mut bits: Vec<u32> = (0..placement.memory_len(shape)).map(&around).collect();
            for (at, start) in placement.rows(shape).into_iter().enumerate() {
                let (b, s, h) = (at / heads / len, first + at / heads % len, at % heads);
                if let Some(row) = row(b, s, h) {
                    bits[start..].iter_mut().zip(row).for_each(|(bits, &value)| *bits = narrow(value, dtype));
                }
            }
            let memory = upload(device, dtype, &bits, &placement.memory_shape(shape))?;
            segments.push(Self { memory, placement, shape, first });
            first += len;
        }
        Ok(segments)
    }

    /// The part.
    pub fn view(&self) -> Result<TensorView<'_>> {
        self.placement.view(self.memory.view(), self.shape)
    }

    /// The part, to write.
    pub fn view_mut(&mut self) -> Result<TensorViewMut<'_>> {
        self.placement.view_mut(self.memory.view_mut(), self.shape)
    }

    /// Copies the rows to their places in the whole, `[B, S, H, D]`; an error if anything around them was written.
    pub fn read_into(&self, dtype: DType, seq: usize, whole: &mut [u32]) -> Result<()> {
        let [_, len, heads, dim] = self.shape;
        let mut bits = download(&self.memory)?;
        for (at, start) in self.placement.rows(self.shape).into_iter().enumerate() {
            let (b, s, h) = (at / heads / len, self.first + at / heads % len, at % heads);
            let row = &mut bits[start..start + dim];
            whole[((b * seq + s) * heads + h) * dim..][..dim].copy_from_slice(row);
            row.fill(sentinel(dtype));
        }
        let written = bits.iter().position(|&bits| bits != sentinel(dtype));
        ensure!(written.is_none(), "element {written:?} around the segment at {} was written", self.first);
        Ok(())
    }
}

impl Call {
    /// The call on segments, as `run_with` is on whole tensors.
    fn run_in_segments(
        &self,
        variant: &Variant,
        mask: AttentionMask<'_>,
        Cuts(cuts): &Cuts,
        lse: Option<TensorViewMut<'_>>,
    ) -> Result<(Plan, Vec<u32>)> {
        let (device, dtype) = (&variant.device, self.dtype);
        let shapes = tensor_shapes(self.shape);
        let keeps = [self.mask.query_keep(), self.mask.key_keep(), self.mask.key_keep()];
        let cut = |input: usize| {
            let [_, seq, heads, dim] = shapes[input];
            let row = |b, s, h| {
                let is_kept = keeps[input].is_none_or(|keep| keep[b * seq + s]);
                is_kept.then(|| &self.values[input][((b * seq + s) * heads + h) * dim..][..dim])
            };
            Segment::cut(device, dtype, (shapes[input], &cuts[input]), |at| poison(at, dtype), row)
        };
        let inputs = [cut(0)?, cut(1)?, cut(2)?];
        let mut outputs = Segment::cut(device, dtype, (shapes[0], &cuts[3]), |_| sentinel(dtype), |_, _, _| None)?;
        let mut layer = variant.layer();
        if let Some(scale) = self.scale {
            layer = layer.with_softmax_scale(scale);
        }
        let views = |input: usize| inputs[input].iter().map(Segment::view).collect::<Result<Vec<_>>>();
        let out = outputs.iter_mut().map(Segment::view_mut).collect::<Result<Vec<_>>>()?;
        let mut into = AttentionOutputs::new(out);
        if let Some(lse) = lse {
            into = into.with_lse(lse);
        }
        let plan = layer.forward_into(views(0)?, views(1)?, views(2)?, mask, into).context("forward_into")?;
        let mut bits = vec![0; shapes[0].iter().product()];
        outputs.iter().try_for_each(|segment| segment.read_into(dtype, shapes[0][1], &mut bits))?;
        let is_cut = cuts.iter().any(|lengths| lengths.len() > 1);
        ensure!(is_cut || !plan.copies_segments, "{plan}, without segments");
        Ok((plan, bits))
    }

    /// Judges the call on whole tensors, and compares those on segments with it, bit by bit.
    pub fn check_segments(&self, variant: &Variant, numbers: &[usize]) -> Result<()> {
        let whole = self.run(&variant.with_longest_tiles())?;
        self.judge(&whole, &self.reference(usize::MAX)?, Rules::standard(self.dtype))?;
        for cuts in numbers.iter().map(|&count| Cuts::of(self, count)) {
            let result = self.under_mask(variant, |mask| {
                let (plan, bits) = self.run_in_segments(variant, mask, &cuts, None)?;
                Ok((plan, (plan, bits)))
            });
            let (plan, bits) = result.with_context(|| format!("{cuts:?}"))?;
            self.expect_result(&plan, &bits, &whole, &cuts)?;
        }
        Ok(())
    }

    /// The bits of the call on whole tensors, except where tiles end at other keys.
    fn expect_result(&self, plan: &Plan, bits: &[u32], whole: &[u32], cuts: &Cuts) -> Result<()> {
        let tiles_end_at_cuts = plan.kernel == Kernel::CudaSm90 && !plan.copies_segments;
        if !tiles_end_at_cuts {
            return self.expect_bits(bits, whole, cuts);
        }
        let judged = self.judge(bits, &self.reference(usize::MAX)?, Rules::standard(self.dtype));
        judged.with_context(|| format!("{cuts:?}"))
    }

    fn expect_bits(&self, bits: &[u32], whole: &[u32], cuts: &Cuts) -> Result<()> {
        let at = bits.iter().zip(whole).position(|(bits, whole)| bits != whole);
        let Some(at) = at else { return Ok(()) };
        let (heads, dim) = (self.shape.heads, self.shape.head_dim);
        anyhow::bail!(
            "{cuts:?}: token {}, head {}, element {}: {:#x}, of whole tensors {:#x}",
            at / dim / heads,
            at / dim % heads,
            at % dim,
            bits[at],
            whole[at]
        )
    }
}

/// How many segments: each number, or some of them where calls take long.
fn numbers(variant: &Variant) -> &'static [usize] {
    if is_emulated_gpu(&variant.device) { &[2, 8] } else { &[1, 2, 3, 4, 5, 6, 7, 8] }
}

fn keep(seed: u64, tokens: usize) -> Result<Vec<bool>> {
    Ok(random::bernoulli_mask(seed, tokens, 0.7)?)
}

fn numbers_and_lengths(variant: &Variant) -> Result<()> {
    Call::random(shape(variant), Mask::Varlen(keep(1, 2 * SEQ)?), variant.dtype, 1)
        .check_segments(variant, numbers(variant))?;
    // Lengths, with segments of padding alone: of 8 segments all but three, in the first batch row.
    let keep: Vec<_> = [40, 290].iter().flat_map(|&len| (0..SEQ).map(move |s| s < len)).collect();
    Call::random(shape(variant), Mask::Varlen(keep), variant.dtype, 2).check_segments(variant, &[8])
}

/// Text of some length in a segment of its own, which the mask cuts at the same place: the bits of the call on whole tensors, by
/// every kernel.
fn joint_layer(variant: &Variant) -> Result<()> {
    let text = 48;
    let keep: Vec<_> = [17, 40].iter().flat_map(|&len| (0..SEQ).map(move |s| s < len || s >= text)).collect();
    let call = Call::random(shape(variant), Mask::Varlen(keep), variant.dtype, 12);
    let whole = call.run(&variant.with_longest_tiles())?;
    let cuts = Cuts([(); 4].map(|()| vec![text, SEQ - text]));
    let bits = call.under_mask(variant, |mask| call.run_in_segments(variant, mask, &cuts, None))?;
    call.expect_bits(&bits, &whole, &cuts)
}

fn cross(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 3, seq_q: 75, seq_k: 131, ..shape(variant) };
    let mask = Mask::Cross { query: keep(3, 3 * 75)?, key: keep(4, 3 * 131)? };
    Call::random(shape, mask, variant.dtype, 3).check_segments(variant, &[2, 5])
}

/// A tile's length of text and one token more or less, beside every mask.
fn ranges(variant: &Variant) -> Result<()> {
    let counts = if is_emulated_gpu(&variant.device) { &[3][..] } else { &[2, 3, 8] };
    for rule in [Rule::Causal, Rule::Window(Some(20), Some(9)), Rule::Prefix(17)] {
        let mut call = Call::random(shape(variant), Mask::Varlen(keep(5, 2 * SEQ)?), variant.dtype, 4);
        call.rule = Some(rule);
        call.check_segments(variant, counts)?;
    }
    Ok(())
}

fn device_meta(variant: &Variant) -> Result<()> {
    Call::random(shape(variant), Mask::Device(keep(6, 2 * SEQ)?), variant.dtype, 5).check_segments(variant, &[2, 8])
}

fn no_mask_and_key_masks(variant: &Variant) -> Result<()> {
    for mask in [Mask::None, Mask::Key(keep(7, 2 * SEQ)?)] {
        Call::random(SHAPE, mask, variant.dtype, 6).check_segments(variant, numbers(variant))?;
    }
    // Around the tiles of every kernel.
    let shape = OracleShape { batch: 1, ..SHAPE };
    let call = Call::random(shape, Mask::None, variant.dtype, 7);
    let whole = call.run(&variant.with_longest_tiles())?;
    for tile in [16, 48, 64, 120, 128] {
        for text in [tile - 1, tile, tile + 1] {
            let cuts = Cuts([(); 4].map(|()| vec![text, SEQ - text]));
            let (plan, bits) = call.run_in_segments(variant, AttentionMask::none(), &cuts, None)?;
            call.expect_result(&plan, &bits, &whole, &cuts)?;
        }
        if is_emulated_gpu(&variant.device) {
            break;
        }
    }
    Ok(())
}

/// Heads that GPUs fill up.
fn head_dim_of_odd_length(variant: &Variant) -> Result<()> {
    let head_dim = if few(&variant.device, variant.kernel).is_some() { 69 } else { 59 };
    let shape = OracleShape { batch: 2, seq_q: 39, seq_k: 39, head_dim, ..SHAPE };
    Call::random(shape, Mask::Key(keep(8, 78)?), variant.dtype, 8).check_segments(variant, &[2, 4])
}

fn bias(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 2, seq_q: 37, seq_k: 70, ..SHAPE };
    let mut call = Call::random(shape, Mask::None, variant.dtype, 9);
    let values = random::normal_rounded(10, 0, 37 * 70, precision(variant.dtype));
    let bits: Vec<u32> = values.iter().map(|&value| narrow(value, variant.dtype)).collect();
    let tensor = upload(&variant.device, variant.dtype, &bits, &[37, 70])?;
    call.bias = Some(values.repeat(2 * 4));
    let (_, whole) = call.run_as(variant, AttentionMask::bias(&tensor))?;
    call.judge(&whole, &call.reference(usize::MAX)?, Rules::standard(variant.dtype))?;
    for cuts in [2, 4].map(|count| Cuts::of(&call, count)) {
        let (plan, bits) = call.run_in_segments(variant, AttentionMask::bias(&tensor), &cuts, None)?;
        ensure!(plan.path == Path::Dense, "{plan}");
        call.expect_bits(&bits, &whole, &cuts)?;
    }
    Ok(())
}

/// One log-sum-exp over all segments.
fn with_lse(variant: &Variant) -> Result<()> {
    let call = Call::random(SHAPE, Mask::Varlen(keep(11, 2 * SEQ)?), variant.dtype, 10);
    let whole = call.run(&variant.with_longest_tiles())?;
    let expected = call.reference_lse()?;
    for cuts in [2, 8].map(|count| Cuts::of(&call, count)) {
        let (plan, bits, values) = call.under_mask(variant, |mask| {
            let mut memory = LseMemory::new(&variant.device, [SHAPE.batch, SHAPE.heads, SEQ])?;
            let (plan, bits) = call.run_in_segments(variant, mask, &cuts, Some(memory.view()?))?;
            Ok((plan, (plan, bits, memory.read()?)))
        })?;
        call.expect_result(&plan, &bits, &whole, &cuts)?;
        lse::judge(&values, &expected)?;
    }
    Ok(())
}

/// `forward` makes one tensor; arrays and vectors of tensors and of views are segments, and parts of one tensor may be.
fn forward(variant: &Variant) -> Result<()> {
    let shape = OracleShape { batch: 1, seq_q: 75, seq_k: 75, ..SHAPE };
    let call = Call::random(shape, Mask::None, variant.dtype, 11);
    let tensors = [0, 1, 2].map(|input| {
        let bits: Vec<u32> = call.values[input].iter().map(|&value| narrow(value, variant.dtype)).collect();
        upload(&variant.device, variant.dtype, &bits, &tensor_shapes(shape)[input])
    });
    let [Ok(q), Ok(k), Ok(v)] = &tensors else { anyhow::bail!("no tensors: {tensors:?}") };
    let whole = download(&variant.layer().forward(q, k, v, AttentionMask::none())?.out)?;
    let parts = |tensor: &Tensor, at| -> Result<[Tensor; 2]> {
        let bits = download(tensor)?;
        let &[batch, seq, heads, dim] = tensor.shape() else { anyhow::bail!("rank") };
        let (text, image) = bits.split_at(at * heads * dim);
        let part = |bits, seq| upload(&variant.device, variant.dtype, bits, &[batch, seq, heads, dim]);
        Ok([part(text, at)?, part(image, seq - at)?])
    };
    let (q_parts, k_parts) = (parts(q, 30)?, parts(k, 30)?);
    let v_views = [0..30, 30..30, 30..75].map(|range| v.view().slice(1, range));
    let v_views: Vec<TensorView<'_>> = v_views.into_iter().collect::<Result<_, _>>()?;
    let layer = variant.layer().with_lse();
    let attended = layer.forward(q_parts.each_ref(), Segments::from_iter(&k_parts), v_views, AttentionMask::none())?;
    ensure!(attended.out.shape() == q.shape(), "{:?}", attended.out.shape());
    ensure!(attended.lse.as_ref().is_some_and(|lse| lse.shape() == [1, 4, 75]), "{:?}", attended.lse);
    ensure!(download(&attended.out)? == whole, "other bits than of whole tensors");
    // One segment is the tensor itself.
    let one = layer.forward([q], vec![k.view()], [v], AttentionMask::none())?;
    ensure!(!one.plan.copies_segments && download(&one.out)? == whole, "{}", one.plan);
    Ok(())
}

/// No valid token, no key, no query, and no row at all.
fn nothing_to_see(device: &Device, dtype: DType) -> Result<()> {
    let layer = MaskedAttention::new(device);
    let tensor = |seq| Tensor::zeros(device, dtype, &[2, seq, 4, 32]);
    let (text, image, none) = (tensor(3)?, tensor(5)?, tensor(0)?);
    let filled = |seq: usize| upload(device, dtype, &vec![sentinel(dtype); 2 * seq * 128], &[2, seq, 4, 32]);
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(2, 8, &[false; 16])?)?;
    let x = || [&text, &none, &image];
    let keyless = || [&none, &none];
    let mut outs = [filled(3)?, filled(0)?, filled(5)?];
    let mut check = |keys: Segments<'_>, mask: AttentionMask<'_>| -> Result<()> {
        outs[0] = filled(3)?;
        outs[2] = filled(5)?;
        let plan = layer.forward_into(x(), keys.clone(), keys, mask, outs.each_mut())?;
        ensure!(plan.path == Path::Zero && !plan.copies_segments, "{plan}");
        for out in &outs {
            ensure!(download(out)?.iter().all(|&bits| bits == 0), "{plan}: not zeros");
        }
        Ok(())
    };
    check(x().into(), AttentionMask::varlen(&meta))?;
    check(keyless().into(), AttentionMask::none())?;
    let mut empty = [filled(0)?, filled(0)?];
    layer.forward_into(keyless(), x(), x(), AttentionMask::none(), empty.each_mut())?;
    layer.forward_into(keyless(), keyless(), keyless(), AttentionMask::none(), empty.each_mut())?;
    let attended = layer.forward(keyless(), x(), x(), AttentionMask::none())?;
    ensure!(attended.out.shape() == [2, 0, 4, 32], "{:?}", attended.out.shape());
    Ok(())
}

/// Errors name segment and argument, and nothing is written.
fn refusals(device: &Device) -> Result<()> {
    let dtype = DType::F16;
    let filled = |shape: &[usize]| upload(device, dtype, &vec![sentinel(dtype); shape.iter().product()], shape);
    // q and out, k, v.
    let shapes = [[2, 3, 4, 32], [2, 5, 4, 32]];
    let of = |shapes: &[[usize; 4]]| shapes.iter().map(|shape| filled(shape)).collect::<Result<Vec<_>>>();
    let kv = [[2, 3, 2, 32], [2, 5, 2, 32]];
    let full = KeyMask::from_lengths(8, &[8, 7])?;
    let short = KeyMask::from_lengths(7, &[7, 7])?;
    let expect = |expected: &str, change: &dyn Fn(&mut [Vec<Tensor>; 4]) -> Result<()>, mask: &KeyMask| -> Result<()> {
        let mut tensors = [of(&shapes)?, of(&kv)?, of(&kv)?, of(&shapes)?];
        change(&mut tensors)?;
        let [q, k, v, out] = &mut tensors;
        let layer = MaskedAttention::new(device);
        let out_segments: SegmentsMut<'_> = out.iter_mut().collect();
        let result = layer.forward_into(
            q.iter().collect::<Segments<'_>>(),
            k.iter().collect::<Segments<'_>>(),
            v.iter().collect::<Segments<'_>>(),
            AttentionMask::key(mask),
            out_segments,
        );
        let Err(error) = result else { anyhow::bail!("expected {expected:?}, got a result") };
        let got = error.to_string();
        ensure!(got.contains(expected), "expected {expected:?}, got {got:?}");
        for out in out.iter().filter(|out| out.dtype() == dtype) {
            ensure!(download(out)?.iter().all(|&bits| bits == sentinel(dtype)), "{got}: something was written");
        }
        Ok(())
    };
    let nothing = |_: &mut [Vec<Tensor>; 4]| Ok(());
    for (input, name) in ["q", "k", "v", "out"].into_iter().enumerate() {
        let none = |tensors: &mut [Vec<Tensor>; 4]| {
            tensors[input].clear();
            Ok(())
        };
        expect(&format!("`{name}`: expected 1 to 8 segments, got 0"), &none, &full)?;
        let many = |tensors: &mut [Vec<Tensor>; 4]| {
            let empty = [2, 0, if name == "k" || name == "v" { 2 } else { 4 }, 32];
            while tensors[input].len() < 9 {
                tensors[input].push(filled(&empty)?);
            }
            Ok(())
        };
        expect(&format!("`{name}`: expected 1 to 8 segments, got 9"), &many, &full)?;
        let heads = if name == "k" || name == "v" { 2 } else { 4 };
        for shape in [[3, 5, heads, 32], [2, 5, 3, 32], [2, 5, heads, 16]] {
            let other = |tensors: &mut [Vec<Tensor>; 4]| {
                tensors[input][1] = filled(&shape)?;
                Ok(())
            };
            expect(&format!("`segments[1].{name}`: expected shape [2, 5, {heads}, 32], got {shape:?}"), &other, &full)?;
        }
        let flat = |tensors: &mut [Vec<Tensor>; 4]| {
            tensors[input][1] = filled(&[2, 5, 32 * heads])?;
            Ok(())
        };
        expect(&format!("`segments[1].{name}`: "), &flat, &full)?;
        let typed = |tensors: &mut [Vec<Tensor>; 4]| {
            tensors[input][1] = Tensor::zeros(device, DType::F32, &[2, 5, heads, 32])?;
            Ok(())
        };
        expect(&format!("`segments[1].{name}`: expected element type f16, got f32"), &typed, &full)?;
    }
    for (input, name, heads) in [(2, "v", 2), (3, "out", 4)] {
        let longer = |tensors: &mut [Vec<Tensor>; 4]| {
            tensors[input][1] = filled(&[2, 6, heads, 32])?;
            Ok(())
        };
        let expected = format!("`{name}`: expected shape [2, 8, {heads}, 32], got [2, 9, {heads}, 32]");
        expect(&expected, &longer, &full)?;
    }
    expect("`mask`: ", &nothing, &short)?;
    overlaps(device)?;
    // Merges write one tensor.
    let (out, lse) = (filled(&[2, 8, 4, 32])?, Tensor::zeros(device, DType::F32, &[2, 4, 8])?);
    let mut outs = [filled(&shapes[0])?, filled(&shapes[1])?];
    let error = merge_attention_into(device, &out, &lse, &out, &lse, outs.each_mut()).err();
    ensure!(matches!(error, Some(Error::SegmentCount { argument: "out", limit: 1, got: 2 })), "got {error:?}");
    Ok(())
}

/// An output that an input shares is refused by name; layouts outside of their memory too.
fn overlaps(device: &Device) -> Result<()> {
    let mut tensors = [(); 2].map(|()| Tensor::zeros(device, DType::F16, &[1, 4, 1, 8]));
    let [Ok(x), Ok(out)] = &mut tensors else { anyhow::bail!("no tensors: {tensors:?}") };
    let layer = MaskedAttention::new(device);
    let overlapping = varlen_fa::Layout::strided(&[1, 4, 1, 8], &[8, 4, 8, 1], 0)?;
    let mut other = Tensor::zeros(device, DType::F16, &[1, 4, 1, 8])?;
    let outs = [other.view_mut(), out.view_mut().with_layout(overlapping)];
    let error = layer.forward_into([&*x, &*x], &*x, &*x, AttentionMask::none(), outs).err();
    ensure!(matches!(error, Some(Error::SelfOverlap { argument: "segments[1].out", .. })), "got {error:?}");
    let outside = varlen_fa::Layout::strided(&[1, 4, 1, 8], &[32, 8, 8, 1], 8)?;
    let error = layer.forward([x.view(), x.view().with_layout(outside)], &*x, &*x, AttentionMask::none()).err();
    ensure!(matches!(error, Some(Error::BufferTooSmall { argument: "segments[1].q", .. })), "got {error:?}");
    Ok(())
}
