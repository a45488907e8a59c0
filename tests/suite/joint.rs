//! A joint layer in one call: QK-norm, rotary embedding and attention over segments. Against the
//! oracle, whose q and k are prepared by its own norm and rotation, and against the two operations
//! one after the other, bit by bit.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Completion;
use varlen_fa::{
    AttentionMask, AttentionOutputs, Config, DType, Device, DeviceChoice, JointAttention, JointPlan, JointSegment,
    KeyMask, Layout, MaskedAttention, Path, Plan, Preparation, QkNorm, QkSegment, Reason, Rotary, RotaryPairing,
    Tensor, TokenMask, VarlenMeta, prepare_qk,
};
use varlen_fa_testkit::{OracleShape, Pairs, Turn, prepared_head, random};

use super::call::{Call, Mask, tensor_shapes};
use super::check::Rules;
use super::head_dims::or_narrow;
use super::limits;
use super::memory::{download, narrow, poison, precision, sentinel, upload};
use super::rule::Rule;
use super::segments::Segment;
use super::trials::{Trials, Variant, is_emulated_gpu};

pub fn register(trials: &mut Trials) {
    trials.once("joint/refusals", refusals);
    trials.each_path("joint/layer", layer);
    trials.each_path("joint/cross", cross);
    trials.each_path_of_device_meta("joint/device_meta", device_meta);
    trials.each_kernel("joint/parts_that_are_absent", parts_that_are_absent);
    trials.each_kernel("joint/no_mask_and_key_masks", no_mask_and_key_masks);
    trials.each_kernel("joint/numbers_of_segments", numbers_of_segments);
    trials.each_kernel("joint/nothing_valid", nothing_valid);
    trials.each_kernel("joint/forced_dense", forced_dense);
    trials.each_kernel("joint/ranges", ranges);
    trials.each_kernel("joint/bias", bias);
}

const LENGTHS: [usize; 4] = [17, 0, 48, 35];
const SEQ: usize = 100;
const SHAPE: OracleShape = OracleShape { batch: 2, seq_q: SEQ, seq_k: SEQ, heads: 4, kv_heads: 2, head_dim: 32 };

fn shape(variant: &Variant) -> OracleShape {
    OracleShape { head_dim: or_narrow(variant, SHAPE.head_dim), ..SHAPE }
}
const EPS: f32 = 1e-6;

/// What is done to q and k of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Does {
    norm: bool,
    pairs: Option<Pairs>,
}

const NOTHING: Does = Does { norm: false, pairs: None };
const NORM: Does = Does { norm: true, pairs: None };
const TURN: Does = Does { norm: false, pairs: Some(Pairs::Apart) };
const BOTH: Does = Does { norm: true, pairs: Some(Pairs::Neighbours) };

/// A segment's weights and tables.
struct Part {
    does: Does,
    seq: usize,
    weights: [Vec<f32>; 2],
    tables: [Vec<f32>; 2],
}

impl Part {
    fn random(seed: u64, does: Does, seq: usize, dim: usize) -> Self {
        let weights = [0, 1].map(|stream| random::normal_stream(seed, stream, dim));
        let angles = random::normal_stream(seed, 2, seq * (dim / 2));
        let tables = [f32::cos, f32::sin].map(|of| angles.iter().map(|&angle| of(3.0 * angle)).collect());
        Self { does, seq, weights, tables }
    }

    /// A head of q or k of a token.
    fn prepared(&self, which: usize, token: usize, head: &[f32]) -> Vec<f64> {
        let half = head.len() / 2;
        let norm = self.does.norm.then_some((&self.weights[which][..], EPS));
        let [cos, sin] = self.tables.each_ref().map(|table| &table[token * half..][..half]);
        prepared_head(head, norm, self.does.pairs.map(|pairs| Turn { cos, sin, pairs }))
    }
}

/// A part's weights and tables on the device.
struct Numbers {
    does: Does,
    weights: [Tensor; 2],
    tables: [Tensor; 2],
}

impl Numbers {
    fn upload(device: &Device, part: &Part) -> Result<Self> {
        let (dim, half) = (part.weights[0].len(), part.weights[0].len() / 2);
        let tensor = |values: &[f32], shape: &[usize]| Tensor::from_slice(device, values, shape);
        let ([q, k], [cos, sin]) = (&part.weights, &part.tables);
        Ok(Self {
            does: part.does,
            weights: [tensor(q, &[dim])?, tensor(k, &[dim])?],
            tables: [tensor(cos, &[part.seq, half])?, tensor(sin, &[part.seq, half])?],
        })
    }

    fn give<'a>(&'a self, mut segment: QkSegment<'a>) -> QkSegment<'a> {
        if self.does.norm {
            segment = segment.with_norm(QkNorm::new(&self.weights[0], &self.weights[1], EPS));
        }
        let pairing = match self.does.pairs {
            None => return segment,
            Some(Pairs::Neighbours) => RotaryPairing::Interleaved,
            Some(Pairs::Apart) => RotaryPairing::Halves,
        };
        segment.with_rotary(Rotary::new(&self.tables[0], &self.tables[1], pairing))
    }
}

/// A joint layer, and the attention call that its prepared q and k make.
struct Layer {
    /// q and k before they are prepared.
    raw: [Vec<f32>; 2],
    parts: Vec<Part>,
    call: Call,
}

/// Whether q and k are replaced, or stay while others are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    InPlace,
    Copied,
}

/// The tensors of one run.
struct Memory {
    numbers: Vec<Numbers>,
    /// q and k before, where they stay.
    sources: Option<[Vec<Segment>; 2]>,
    /// q and k that attention reads.
    qk: [Vec<Segment>; 2],
    v: Vec<Segment>,
    outs: Vec<Segment>,
}

/// What a run wrote: the output, and q and k as attention read them.
#[derive(PartialEq, Eq)]
struct Written {
    out: Vec<u32>,
    qk: [Vec<u32>; 2],
}

impl Layer {
    /// Segments of these lengths, of which each does what `does` says in turn.
    fn random(shape: OracleShape, mask: Mask, dtype: DType, lengths: &[usize], does: &[Does], seed: u64) -> Self {
        let mut call = Call::random(shape, mask, dtype, seed);
        let raw = [call.values[0].clone(), call.values[1].clone()];
        let part = |(index, &seq): (usize, &usize)| {
            Part::random(900 + index as u64, does[index % does.len()], seq, shape.head_dim)
        };
        let parts: Vec<Part> = lengths.iter().enumerate().map(part).collect();
        let places: Vec<(&Part, usize)> =
            parts.iter().flat_map(|part| (0..part.seq).map(move |token| (part, token))).collect();
        for (which, heads) in [shape.heads, shape.kv_heads].into_iter().enumerate() {
            for (at, row) in call.values[which].chunks_mut(shape.head_dim).enumerate() {
                let (part, token) = places[at / heads % shape.seq_q];
                let prepared = part.prepared(which, token, row);
                row.iter_mut().zip(prepared).for_each(|(value, prepared)| *value = prepared as f32);
                precision(dtype).round_all(row);
            }
        }
        Self { raw, parts, call }
    }

    /// Memory of a tensor in segments; rows of tokens that do not count hold NaN, as all around
    /// them. `values` are missing in what is yet to be written.
    fn cut(&self, device: &Device, input: usize, values: Option<&[f32]>, is_output: bool) -> Result<Vec<Segment>> {
        let dtype = self.call.dtype;
        let shape = tensor_shapes(self.call.shape)[input];
        let [_, seq, heads, dim] = shape;
        let lengths: Vec<usize> = self.parts.iter().map(|part| part.seq).collect();
        let keep = [self.call.mask.query_keep(), self.call.mask.key_keep(), self.call.mask.key_keep()][input];
        let row = |b: usize, s: usize, h: usize| {
            let is_kept = keep.is_none_or(|keep| keep[b * seq + s]);
            values.filter(|_| is_kept).map(|values| &values[((b * seq + s) * heads + h) * dim..][..dim])
        };
        let around = |at: usize| if is_output { sentinel(dtype) } else { poison(at, dtype) };
        Segment::cut(device, dtype, (shape, &lengths), around, row)
    }

    fn memory(&self, device: &Device, form: Form) -> Result<Memory> {
        let rows = |which: usize, is_output| self.cut(device, which, Some(&self.raw[which]), is_output);
        let nothing = |which: usize| self.cut(device, which, None, true);
        let (sources, qk) = match form {
            Form::InPlace => (None, [rows(0, true)?, rows(1, true)?]),
            Form::Copied => (Some([rows(0, false)?, rows(1, false)?]), [nothing(0)?, nothing(1)?]),
        };
        Ok(Memory {
            numbers: self.parts.iter().map(|part| Numbers::upload(device, part)).collect::<Result<_>>()?,
            sources,
            qk,
            v: self.cut(device, 2, Some(&self.call.values[2]), false)?,
            outs: nothing(0)?,
        })
    }

    /// One call.
    fn run(&self, layer: &MaskedAttention, mask: AttentionMask<'_>, form: Form) -> Result<(JointPlan, Written)> {
        let mut memory = self.memory(layer.device(), form)?;
        let (segments, others) = memory.segments()?;
        let segments = segments.into_iter().zip(others);
        let segments = segments.map(|(qk, (v, out))| Ok(JointSegment::new(qk, v.view()?, out.view_mut()?)));
        let segments = segments.collect::<Result<Vec<_>>>()?;
        let plan = JointAttention::from(layer.clone()).forward_into(segments, mask)?;
        Ok((plan, self.read(&memory)?))
    }

    /// The two operations, one after the other.
    fn run_apart(
        &self,
        layer: &MaskedAttention,
        (tokens, mask): (TokenMask<'_>, AttentionMask<'_>),
        form: Form,
    ) -> Result<(Plan, Written)> {
        let mut memory = self.memory(layer.device(), form)?;
        prepare_qk(layer.device(), memory.segments()?.0, tokens)?;
        let Memory { qk, v, outs, .. } = &mut memory;
        let inputs = [&qk[0], &qk[1], v].map(|segments| segments.iter().map(Segment::view).collect::<Result<Vec<_>>>());
        let [q, k, v] = inputs;
        let out = outs.iter_mut().map(Segment::view_mut).collect::<Result<Vec<_>>>()?;
        let plan = layer.forward_into(q?, k?, v?, mask, AttentionOutputs::new(out))?;
        Ok((plan, self.read(&memory)?))
    }

    /// What was written, given that nothing was around it.
    fn read(&self, memory: &Memory) -> Result<Written> {
        let shapes = tensor_shapes(self.call.shape);
        let read = |input: usize, segments: &[Segment]| {
            let mut bits = vec![0; shapes[input].iter().product()];
            segments.iter().try_for_each(|it| it.read_into(self.call.dtype, shapes[input][1], &mut bits))?;
            anyhow::Ok(bits)
        };
        Ok(Written { out: read(0, &memory.outs)?, qk: [read(0, &memory.qk[0])?, read(1, &memory.qk[1])?] })
    }

    /// Runs the layer under its call's mask in both forms, and judges each. `prepares` is what
    /// happens to q and k.
    fn check(&self, variant: &Variant, prepares: Preparation) -> Result<()> {
        let reference = self.call.reference(usize::MAX)?;
        let keep = self.call.mask.query_keep();
        let tokens = match prepares {
            Preparation::ValidTokens => Some(keep.context("a mask of tokens")?),
            _ => None,
        };
        let OracleShape { batch, seq_q, .. } = self.call.shape;
        let tokens = tokens.map(|keep| KeyMask::from_bool(batch, seq_q, keep)).transpose()?;
        for form in [Form::InPlace, Form::Copied] {
            let (joint, apart) = self.call.under_mask(variant, |mask| {
                let (plan, joint) = self.run(&variant.layer(), mask, form)?;
                let tokens = || tokens.as_ref().map_or_else(TokenMask::all, TokenMask::from);
                let (attention, apart) = self.run_apart(&variant.layer(), (tokens(), mask), form)?;
                ensure!(plan.attention == attention, "{plan}, but apart {attention}");
                ensure!(plan.preparation == prepares, "expected {prepares:?}, got {plan}");
                Ok((attention, (joint, apart)))
            })?;
            self.call.judge(&joint.out, &reference, Rules::standard(variant.dtype)).with_context(|| {
                let same = |is_same| if is_same { "the same" } else { "other" };
                let (out, qk) = (same(joint.out == apart.out), same(joint.qk == apart.qk));
                format!("{form:?}; the two operations apart give {out} output and {qk} q and k")
            })?;
            ensure!(joint == apart, "{form:?}: other bits than of both operations");
            if prepares == Preparation::ValidTokens {
                self.expect_untouched(&joint)?;
            }
        }
        Ok(())
    }

    /// Rows of tokens that the mask drops are as they were.
    fn expect_untouched(&self, written: &Written) -> Result<()> {
        let keep = self.call.mask.query_keep().context("a mask of tokens")?;
        let OracleShape { heads, kv_heads, head_dim, .. } = self.call.shape;
        for (bits, heads) in written.qk.iter().zip([heads, kv_heads]) {
            for (at, row) in bits.chunks(head_dim).enumerate().filter(|(at, _)| !keep[at / heads]) {
                ensure!(row.iter().all(|&bits| bits == sentinel(self.call.dtype)), "masked row {at} was written");
            }
        }
        Ok(())
    }
}

impl Memory {
    /// q and k of each segment as calls take them, and the other tensors.
    #[expect(clippy::type_complexity, reason = "a pair of lists")]
    fn segments(&mut self) -> Result<(Vec<QkSegment<'_>>, Vec<(&Segment, &mut Segment)>)> {
        let Self { numbers, sources, qk: [q, k], v, outs } = self;
        let mut segments = Vec::new();
        for (index, ((q, k), numbers)) in q.iter_mut().zip(k).zip(&*numbers).enumerate() {
            let (q, k) = (q.view_mut()?, k.view_mut()?);
            segments.push(numbers.give(match &*sources {
                None => QkSegment::in_place(q, k),
                Some([from_q, from_k]) => QkSegment::copied(from_q[index].view()?, from_k[index].view()?, q, k),
            }));
        }
        Ok((segments, v.iter().zip(outs).collect()))
    }
}

fn keep(seed: u64) -> Result<Vec<bool>> {
    Ok(random::bernoulli_mask(seed, 2 * SEQ, 0.7)?)
}

/// Holes across the borders of segments, of which each has its own norm and rotation.
fn layer(variant: &Variant) -> Result<()> {
    let does = [BOTH, NOTHING, NORM, TURN];
    let mask = Mask::Varlen(keep(21)?);
    Layer::random(shape(variant), mask, variant.dtype, &LENGTHS, &does, 21).check(variant, Preparation::ValidTokens)?;
    // Text that is padded to the right before an image, and a batch row without a token.
    let keep = [40, SEQ].iter().flat_map(|&len| (0..SEQ).map(move |s| len < SEQ && (s < 11 || s >= len))).collect();
    let layer = Layer::random(shape(variant), Mask::Varlen(keep), variant.dtype, &[40, 60], &[BOTH], 22);
    layer.check(variant, Preparation::ValidTokens)
}

/// Two metadata do not say which rows of q and k count together.
fn cross(variant: &Variant) -> Result<()> {
    let mask = Mask::Cross { query: keep(23)?, key: keep(24)? };
    Layer::random(shape(variant), mask, variant.dtype, &LENGTHS, &[BOTH, TURN], 23)
        .check(variant, Preparation::AllTokens)
}

/// Only the device knows which rows count, unless its memory is the host's.
fn device_meta(variant: &Variant) -> Result<()> {
    let is_on_host = variant.device.capabilities().backend == varlen_fa::BackendKind::Cpu;
    let prepares = if is_on_host { Preparation::ValidTokens } else { Preparation::AllTokens };
    Layer::random(shape(variant), Mask::Device(keep(25)?), variant.dtype, &LENGTHS, &[NORM, BOTH], 25)
        .check(variant, prepares)
}

/// Where a part is absent in all segments.
fn parts_that_are_absent(variant: &Variant) -> Result<()> {
    for does in [NORM, TURN, BOTH] {
        let layer = Layer::random(SHAPE, Mask::Varlen(keep(26)?), variant.dtype, &[30, 70], &[does], 26);
        layer.check(variant, Preparation::ValidTokens).with_context(|| format!("{does:?}"))?;
    }
    // Without both, q and k are attention's inputs as they are; those that go elsewhere are copied.
    let layer = Layer::random(SHAPE, Mask::None, variant.dtype, &[30, 70], &[NOTHING], 27);
    let reference = layer.call.reference(usize::MAX)?;
    for (form, prepares) in [(Form::InPlace, Preparation::Nothing), (Form::Copied, Preparation::AllTokens)] {
        let (plan, written) = layer.run(&variant.layer(), AttentionMask::none(), form)?;
        ensure!(plan.preparation == prepares, "{form:?}: {plan}");
        layer.call.judge(&written.out, &reference, Rules::standard(variant.dtype))?;
        let as_they_are = layer
            .raw
            .each_ref()
            .map(|values| values.iter().map(|&value| narrow(value, variant.dtype)).collect::<Vec<_>>());
        ensure!(written.qk == as_they_are, "{form:?}: q and k are not what they were");
    }
    Ok(())
}

/// Every token is prepared where attention computes every query.
fn no_mask_and_key_masks(variant: &Variant) -> Result<()> {
    let all = vec![true; 2 * SEQ];
    for mask in [Mask::None, Mask::Key(keep(28)?), Mask::Varlen(all)] {
        let layer = Layer::random(SHAPE, mask, variant.dtype, &LENGTHS, &[BOTH, NORM, TURN], 28);
        layer.check(variant, Preparation::AllTokens)?;
    }
    Ok(())
}

fn numbers_of_segments(variant: &Variant) -> Result<()> {
    let counts = if is_emulated_gpu(&variant.device) { &[1, 8][..] } else { &[1, 2, 3, 4, 5, 6, 7, 8] };
    for &count in counts {
        let mut lengths = [3, 0, 16, 1, 15, 17, 0, 2][..count].to_vec();
        lengths[count - 1] += SEQ - lengths.iter().sum::<usize>();
        let layer = Layer::random(SHAPE, Mask::Varlen(keep(29)?), variant.dtype, &lengths, &[BOTH, TURN, NORM], 29);
        layer.check(variant, Preparation::ValidTokens).with_context(|| format!("{lengths:?}"))?;
    }
    Ok(())
}

/// No token, and no row at all.
fn nothing_valid(variant: &Variant) -> Result<()> {
    // The path is the mask's.
    let free = MaskedAttention::new(&variant.device).with_kernel(variant.kernel);
    let none = vec![false; 2 * SEQ];
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(2, SEQ, &none)?)?;
    let layer = Layer::random(SHAPE, Mask::Varlen(none), variant.dtype, &LENGTHS, &[BOTH], 30);
    for form in [Form::InPlace, Form::Copied] {
        let (plan, written) = layer.run(&free, AttentionMask::varlen(&meta), form)?;
        ensure!((plan.preparation, plan.attention.path) == (Preparation::Nothing, Path::Zero), "{plan}");
        ensure!(written.out.iter().all(|&bits| bits == 0), "{plan}: not zeros");
        layer.expect_untouched(&written)?;
    }
    let empty = OracleShape { seq_q: 0, seq_k: 0, ..SHAPE };
    let layer = Layer::random(empty, Mask::None, variant.dtype, &[0, 0], &[BOTH], 31);
    let (plan, _) = layer.run(&free, AttentionMask::none(), Form::InPlace)?;
    ensure!((plan.preparation, plan.attention.path) == (Preparation::Nothing, Path::Zero), "{plan}");
    // Dropped keys alone: every query is prepared, and sees nothing.
    let mask = KeyMask::from_lengths(SEQ, &[0, 0])?;
    let layer = Layer::random(SHAPE, Mask::Key(vec![false; 2 * SEQ]), variant.dtype, &LENGTHS, &[BOTH], 32);
    let (plan, written) = layer.run(&free, AttentionMask::key(&mask), Form::InPlace)?;
    ensure!((plan.preparation, plan.attention.path) == (Preparation::AllTokens, Path::Zero), "{plan}");
    ensure!(written.out.iter().all(|&bits| bits == 0), "{plan}: not zeros");
    Ok(())
}

/// What `VARLEN_FA=0` sets: every pair of tokens is computed, and the same comes out.
fn forced_dense(variant: &Variant) -> Result<()> {
    let choice: DeviceChoice = variant.device.capabilities().backend.into();
    let device = limits::open(Config::default().with_device(choice).with_force_dense(true))?;
    let layer = MaskedAttention::new(&device).with_kernel(variant.kernel);
    let keep = keep(33)?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(2, SEQ, &keep)?)?;
    let joint = Layer::random(SHAPE, Mask::Varlen(keep), variant.dtype, &LENGTHS, &[BOTH, NORM], 33);
    for form in [Form::InPlace, Form::Copied] {
        let (plan, written) = joint.run(&layer, AttentionMask::varlen(&meta), form)?;
        ensure!((plan.attention.path, plan.attention.reason) == (Path::Dense, Reason::DenseForced), "got {plan}");
        ensure!(plan.preparation == Preparation::ValidTokens, "got {plan}");
        joint.call.judge(&written.out, &joint.call.reference(usize::MAX)?, Rules::standard(variant.dtype))?;
        joint.expect_untouched(&written)?;
    }
    Ok(())
}

fn ranges(variant: &Variant) -> Result<Completion> {
    if !variant.kernel.has_ranges() {
        return Ok(Completion::ignored_with("the kernel takes no key ranges"));
    }
    for rule in [Rule::Causal, Rule::Window(Some(20), Some(9))] {
        let mut layer = Layer::random(SHAPE, Mask::Varlen(keep(34)?), variant.dtype, &LENGTHS, &[BOTH], 34);
        layer.call.rule = Some(rule);
        layer.check(variant, Preparation::ValidTokens)?;
    }
    Ok(Completion::Completed)
}

fn bias(variant: &Variant) -> Result<Completion> {
    if !variant.kernel.has_bias() {
        return Ok(Completion::ignored_with("the kernel adds no bias"));
    }
    let mut layer = Layer::random(SHAPE, Mask::None, variant.dtype, &LENGTHS, &[BOTH, TURN], 35);
    let values = random::normal_rounded(36, 0, SEQ * SEQ, precision(variant.dtype));
    let bits: Vec<u32> = values.iter().map(|&value| narrow(value, variant.dtype)).collect();
    let tensor = upload(&variant.device, variant.dtype, &bits, &[SEQ, SEQ])?;
    layer.call.bias = Some(values.repeat(2 * 4));
    let (plan, written) = layer.run(&variant.layer(), AttentionMask::bias(&tensor), Form::InPlace)?;
    ensure!(plan.attention.path == Path::Dense, "{plan}");
    layer.call.judge(&written.out, &layer.call.reference(usize::MAX)?, Rules::standard(variant.dtype))?;
    Ok(Completion::Completed)
}

/// A call that one change makes wrong.
struct Refused<'a> {
    device: &'a Device,
    count: usize,
    /// v and the output of the second segment.
    others: [(DType, [usize; 4]); 2],
    /// k heads of all segments.
    kv_heads: usize,
    weight: usize,
    mask: [usize; 2],
    scale: f32,
}

impl<'a> Refused<'a> {
    fn new(device: &'a Device) -> Self {
        let others = [(DType::F16, [2, 5, 2, 16]), (DType::F16, [2, 5, 4, 16])];
        Self { device, count: 2, others, kv_heads: 2, weight: 16, mask: [2, 8], scale: 1.0 }
    }

    /// The message; nothing was written.
    fn error(&self) -> Result<String> {
        let Self { device, .. } = *self;
        let two = |dtype: DType, shape: &[usize]| {
            upload(device, dtype, &vec![narrow(2.0, dtype); shape.iter().product()], shape)
        };
        let weight = two(DType::F32, &[self.weight])?;
        let mut tensors = Vec::new();
        for index in 0..self.count {
            let seq = if index == 1 { 5 } else { 3 };
            let [v, out] = match index {
                1 => self.others,
                _ => [(DType::F16, [2, 3, self.kv_heads, 16]), (DType::F16, [2, 3, 4, 16])],
            };
            let [q, k] = [4, self.kv_heads].map(|heads| two(DType::F16, &[2, seq, heads, 16]));
            tensors.push([q?, k?, two(v.0, &v.1)?, two(out.0, &out.1)?]);
        }
        let layer = JointAttention::from(MaskedAttention::new(device).with_softmax_scale(self.scale));
        let meta = VarlenMeta::from_key_mask(&KeyMask::all(self.mask[0], self.mask[1])?)?;
        let segments = tensors.iter_mut().map(|[q, k, v, out]| {
            let norm = QkNorm::new(&weight, &weight, EPS);
            JointSegment::new(QkSegment::in_place(q, k).with_norm(norm), &*v, out)
        });
        let error = layer.forward_into(segments, AttentionMask::varlen(&meta)).err().context("the call was taken")?;
        for tensor in tensors.iter().flatten() {
            let two = narrow(2.0, tensor.dtype());
            ensure!(download(tensor)?.iter().all(|&bits| bits == two), "{error}: something was written");
        }
        Ok(error.to_string())
    }
}

/// Errors name segment and argument, whichever of the two operations refuses; nothing is written.
fn refusals(device: &Device) -> Result<()> {
    let expect = |expected: &str, change: &dyn Fn(&mut Refused<'_>)| {
        let mut call = Refused::new(device);
        change(&mut call);
        let got = call.error()?;
        ensure!(got.contains(expected), "expected {expected:?}, got {got:?}");
        anyhow::Ok(())
    };
    expect("`segments`: expected 1 to 8 segments, got 0", &|call| call.count = 0)?;
    expect("`segments`: expected 1 to 8 segments, got 9", &|call| call.count = 9)?;
    expect("`segments[0].q_weight`: expected shape [16], got [8]", &|call| call.weight = 8)?;
    expect("`segments[1].v`: expected shape [2, 5, 2, 16], got [2, 6, 2, 16]", &|call| call.others[0].1[1] = 6)?;
    expect("`segments[1].out`: expected shape [2, 5, 4, 16], got [2, 5, 3, 16]", &|call| call.others[1].1[2] = 3)?;
    expect("`segments[1].v`: expected element type f16, got bf16", &|call| call.others[0].0 = DType::Bf16)?;
    expect("`segments[1].out`: expected element type f16, got f32", &|call| call.others[1].0 = DType::F32)?;
    // What attention alone knows.
    expect("query metadata", &|call| call.mask = [2, 9])?;
    expect("NaN", &|call| call.scale = f32::NAN)?;
    expect("heads", &|call| {
        call.kv_heads = 3;
        call.others[0].1[2] = 3;
    })?;
    overlaps(device)
}

/// Of one segment too, v and the output are named by it; an output that lies over itself is refused
/// before q is prepared.
fn overlaps(device: &Device) -> Result<()> {
    let bits = vec![narrow(2.0, DType::F16); 32];
    let tensor = || upload(device, DType::F16, &bits, &[1, 4, 1, 8]);
    let (mut q, mut k, v, mut out) = (tensor()?, tensor()?, tensor()?, tensor()?);
    let ones = Tensor::from_slice(device, &[1.0_f32; 8], &[8])?;
    let over_itself = Layout::strided(&[1, 4, 1, 8], &[8, 4, 8, 1], 0)?;
    let outside = Layout::strided(&[1, 4, 1, 8], &[32, 8, 8, 1], 8)?;
    let mut refused = |v_layout: Option<Layout>, out_layout: Option<Layout>| -> Result<String> {
        let (v, out) = (v.view(), out.view_mut());
        let v = v_layout.map_or(v, |layout| v.with_layout(layout));
        let out = match out_layout {
            Some(layout) => out.with_layout(layout),
            None => out,
        };
        let qk = QkSegment::in_place(&mut q, &mut k).with_norm(QkNorm::new(&ones, &ones, EPS));
        let segment = JointSegment::new(qk, v, out);
        let error = JointAttention::new(device).forward_into([segment], AttentionMask::none()).err();
        ensure!(download(&q)? == bits && download(&k)? == bits, "{error:?}: something was prepared");
        Ok(error.context("the call was taken")?.to_string())
    };
    let got = refused(None, Some(over_itself))?;
    ensure!(got.contains("`segments[0].out`"), "{got}");
    let got = refused(Some(outside), None)?;
    ensure!(got.contains("`segments[0].v`"), "{got}");
    Ok(())
}
