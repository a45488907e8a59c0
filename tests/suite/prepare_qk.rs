//! QK-norm and rotary embedding of the segments of a joint layer.

use anyhow::{Context, Result, ensure};
use varlen_fa::{
    DType, Device, Error, KeyMask, Layout, QkNorm, QkSegment, Rotary, RotaryPairing, Tensor, TokenMask, VarlenMeta,
    prepare_qk,
};
use varlen_fa_testkit::{Pairs, Turn, prepared_head, random};

use super::memory::{download, narrow, poison, precision, sentinel, upload, widen};
use super::trials::Trials;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];
const EPS: f32 = 1e-6;

pub fn register(trials: &mut Trials) {
    trials.once("prepare_qk/refusals", refusals);
    register_kernels(trials);
}

/// The trials of the kernels alone.
pub fn register_kernels(trials: &mut Trials) {
    trials.once("prepare_qk/every_option", every_option);
    trials.once("prepare_qk/head_dims", head_dims);
    trials.once("prepare_qk/masks", masks);
    trials.once("prepare_qk/numbers_of_segments", numbers_of_segments);
    trials.once("prepare_qk/long", long);
    trials.once("prepare_qk/nan_stays_in_its_head", nan_stays_in_its_head);
    trials.once("prepare_qk/neither", neither);
    trials.once("prepare_qk/one_segment_has_more_than_another", one_segment_has_more_than_another);
}

/// How the rows of a tensor lie in a larger one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Whole,
    /// Between other tokens and heads.
    Inside,
    /// Between other elements too, from an odd position on.
    Odd,
    /// `[B, H, S, D]`.
    HeadsFirst,
}

const PLACES: [Place; 4] = [Place::Whole, Place::Inside, Place::Odd, Place::HeadsFirst];

impl Place {
    /// The larger tensor, and the layout of the `[B, S, H, D]` view in it.
    fn holder(self, [batch, seq, heads, dim]: [usize; 4]) -> Result<([usize; 4], Layout)> {
        let shape = match self {
            Self::Whole => [batch, seq, heads, dim],
            Self::Inside => [batch, seq + 2, heads + 1, dim],
            Self::Odd => [batch, seq + 1, heads + 1, dim + 3],
            Self::HeadsFirst => [batch, heads, seq, dim],
        };
        let holder = Layout::contiguous(&shape)?;
        let view = match self {
            Self::Whole => holder,
            Self::Inside => holder.slice(1, 1..seq + 1)?.slice(2, 1..heads + 1)?,
            Self::Odd => holder.slice(1, 0..seq)?.slice(2, 0..heads)?.slice(3, 1..dim + 1)?,
            Self::HeadsFirst => holder.permute(&[0, 2, 1, 3])?,
        };
        Ok((shape, view))
    }
}

/// A tensor inside a larger one.
struct Held {
    bits: Vec<u32>,
    shape: [usize; 4],
    layout: Layout,
}

impl Held {
    fn new(place: Place, shape: [usize; 4], around: u32, rows: &[u32]) -> Result<Self> {
        let (holder, layout) = place.holder(shape)?;
        let mut bits = vec![around; holder.iter().product()];
        for (at, row) in positions(&layout).zip(rows.chunks(shape[3])) {
            bits[at..][..row.len()].copy_from_slice(row);
        }
        Ok(Self { bits, shape: holder, layout })
    }

    fn upload(&self, device: &Device, dtype: DType) -> Result<Tensor> {
        upload(device, dtype, &self.bits, &self.shape)
    }

    /// The rows of a tensor that lies as this one, given that nothing was written around them.
    fn rows_of(&self, bits: &[u32]) -> Result<Vec<u32>> {
        let dim = self.layout.shape()[3];
        let mut rest = bits.to_vec();
        let mut rows = Vec::new();
        for at in positions(&self.layout) {
            rows.extend_from_slice(&bits[at..][..dim]);
            rest[at..][..dim].copy_from_slice(&self.bits[at..][..dim]);
        }
        let written = rest.iter().zip(&self.bits).position(|(now, before)| now != before);
        ensure!(written.is_none(), "element {written:?} around the rows was written");
        Ok(rows)
    }
}

/// Where the rows of a `[B, S, H, D]` view start, in their order.
fn positions(layout: &Layout) -> impl Iterator<Item = usize> + use<> {
    let (shape, strides) = (layout.shape().to_vec(), layout.strides().to_vec());
    let offset = layout.offset();
    let rows = if shape[3] == 0 { 0 } else { shape[0] * shape[1] * shape[2] };
    (0..rows).map(move |row| {
        let (b, s, h) = (row / (shape[1] * shape[2]), row / shape[2] % shape[1], row % shape[2]);
        (offset + b as u64 * strides[0] + s as u64 * strides[1] + h as u64 * strides[2]) as usize
    })
}

/// What a trial computes.
#[derive(Debug, Clone)]
struct Spec {
    dtype: DType,
    batch: usize,
    /// Of q and of k.
    heads: [usize; 2],
    dim: usize,
    lengths: Vec<usize>,
    norm: bool,
    pairs: Option<Pairs>,
    /// Columns of the tables.
    half: usize,
    /// Whether tables and weights are of f32 whatever the tensors are.
    in_f32: bool,
    /// Whether batch rows have tables of their own.
    batched: bool,
    /// `[B, S]` of all segments.
    keep: Option<Vec<bool>>,
    /// Of the first segment; others have the next ones.
    place: usize,
}

impl Spec {
    fn new(dtype: DType, heads: [usize; 2], dim: usize, lengths: &[usize]) -> Self {
        Self {
            dtype,
            batch: 2,
            heads,
            dim,
            lengths: lengths.to_vec(),
            norm: true,
            pairs: Some(Pairs::Neighbours),
            half: dim / 2,
            in_f32: true,
            batched: false,
            keep: None,
            place: 0,
        }
    }

    fn total(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn number_dtype(&self) -> DType {
        if self.in_f32 { DType::F32 } else { self.dtype }
    }
}

/// The tensors of a segment on the host.
struct Segment {
    seq: usize,
    first: usize,
    /// Bits of q and k, masked rows poisoned.
    rows: [Vec<u32>; 2],
    weights: [Vec<f32>; 2],
    /// Cosines and sines.
    tables: [Vec<f32>; 2],
}

impl Segment {
    fn random(spec: &Spec, index: usize) -> Self {
        let (seq, first) = (spec.lengths[index], spec.lengths[..index].iter().sum());
        let seed = 500 + 10 * index as u64;
        let rows = [0, 1].map(|which| {
            let values = random::normal_rounded(
                seed,
                which as u64,
                spec.batch * seq * spec.heads[which] * spec.dim,
                precision(spec.dtype),
            );
            let mut bits: Vec<u32> = values.into_iter().map(|value| narrow(value, spec.dtype)).collect();
            for (place, row) in bits.chunks_mut(spec.dim.max(1)).enumerate() {
                let token = place / spec.heads[which];
                if !is_kept(spec, token / seq, first + token % seq) {
                    row.iter_mut().enumerate().for_each(|(at, bits)| *bits = poison(place + at, spec.dtype));
                }
            }
            bits
        });
        let numbers = precision(spec.number_dtype());
        let weights = [2, 3].map(|stream| random::normal_rounded(seed, stream, spec.dim, numbers));
        let rows_of_tables = if spec.batched { spec.batch * seq } else { seq };
        let angles = random::normal_stream(seed, 4, rows_of_tables * spec.half);
        let mut tables = [f32::cos, f32::sin].map(|of| angles.iter().map(|&angle| of(3.0 * angle)).collect::<Vec<_>>());
        tables.iter_mut().for_each(|table| numbers.round_all(table));
        Self { seq, first, rows, weights, tables }
    }

    /// The results for q or k, `[B, S, H, D]`; none where the token is masked.
    fn expected(&self, spec: &Spec, which: usize) -> Vec<Option<Vec<f64>>> {
        let heads = spec.heads[which];
        let head = |place: usize| {
            let (b, s) = (place / heads / self.seq, place / heads % self.seq);
            let bits = &self.rows[which][place * spec.dim..][..spec.dim];
            let row = if spec.batched { b * self.seq + s } else { s };
            let turn = spec.pairs.map(|pairs| {
                let [cos, sin] = self.tables.each_ref().map(|table| &table[row * spec.half..][..spec.half]);
                Turn { cos, sin, pairs }
            });
            let values: Vec<f32> = bits.iter().map(|&bits| widen(bits, spec.dtype)).collect();
            let norm = spec.norm.then_some((&self.weights[which][..], EPS));
            is_kept(spec, b, self.first + s).then(|| prepared_head(&values, norm, turn))
        };
        (0..spec.batch * self.seq * heads).map(head).collect()
    }
}

fn is_kept(spec: &Spec, b: usize, token: usize) -> bool {
    spec.keep.as_ref().is_none_or(|keep| keep[b * spec.total() + token])
}

/// Weights and tables of a segment on the device.
struct Numbers {
    weights: [Tensor; 2],
    tables: [Tensor; 2],
}

impl Numbers {
    fn upload(device: &Device, spec: &Spec, segment: &Segment) -> Result<Self> {
        let dtype = spec.number_dtype();
        let tensor = |values: &[f32], shape: &[usize]| {
            let bits: Vec<u32> = values.iter().map(|&value| narrow(value, dtype)).collect();
            upload(device, dtype, &bits, shape)
        };
        let shape = if spec.batched { vec![spec.batch, segment.seq, spec.half] } else { vec![segment.seq, spec.half] };
        let [q, k] = &segment.weights;
        let [cos, sin] = &segment.tables;
        Ok(Self {
            weights: [tensor(q, &[spec.dim])?, tensor(k, &[spec.dim])?],
            tables: [tensor(cos, &shape)?, tensor(sin, &shape)?],
        })
    }

    fn give<'a>(&'a self, spec: &Spec, mut segment: QkSegment<'a>) -> QkSegment<'a> {
        if spec.norm {
            segment = segment.with_norm(QkNorm::new(&self.weights[0], &self.weights[1], EPS));
        }
        let pairing = match spec.pairs {
            None => return segment,
            Some(Pairs::Neighbours) => RotaryPairing::Interleaved,
            Some(Pairs::Apart) => RotaryPairing::Halves,
        };
        segment.with_rotary(Rotary::new(&self.tables[0], &self.tables[1], pairing))
    }
}

/// Computes in place and into other tensors, and compares both with the oracle and with one another.
fn check(device: &Device, spec: &Spec) -> Result<()> {
    let mask = spec.keep.as_ref().map(|keep| KeyMask::from_bool(spec.batch, spec.total(), keep)).transpose()?;
    let mask = || mask.as_ref().map_or_else(TokenMask::all, TokenMask::from);
    let segments: Vec<_> = (0..spec.lengths.len()).map(|index| Segment::random(spec, index)).collect();
    let numbers = segments.iter().map(|segment| Numbers::upload(device, spec, segment)).collect::<Result<Vec<_>>>()?;
    let hold = |step: usize, rows: &dyn Fn(&Segment, usize) -> Vec<u32>| -> Result<Vec<[Held; 2]>> {
        let pair = |(index, segment): (usize, &Segment)| {
            let of = |which: usize| {
                let shape = [spec.batch, segment.seq, spec.heads[which], spec.dim];
                let place = PLACES[(spec.place + step * (index + which)) % PLACES.len()];
                Held::new(place, shape, sentinel(spec.dtype), &rows(segment, which))
            };
            Ok([of(0)?, of(1)?])
        };
        segments.iter().enumerate().map(pair).collect()
    };
    let upload = |held: &[[Held; 2]]| -> Result<Vec<[Tensor; 2]>> {
        held.iter().map(|[q, k]| Ok([q.upload(device, spec.dtype)?, k.upload(device, spec.dtype)?])).collect()
    };
    let inputs = hold(1, &|segment, which| segment.rows[which].clone())?;
    // In other places than the inputs.
    let outputs = hold(3, &|segment, which| vec![sentinel(spec.dtype); segment.rows[which].len()])?;

    let mut in_place = upload(&inputs)?;
    let calls = in_place.iter_mut().zip(&inputs).zip(&numbers).map(|(([q, k], held), numbers)| {
        let [q, k] = [q.view_mut().with_layout(held[0].layout), k.view_mut().with_layout(held[1].layout)];
        numbers.give(spec, QkSegment::in_place(q, k))
    });
    prepare_qk(device, calls.collect::<Vec<_>>(), mask())?;

    let sources = upload(&inputs)?;
    let mut copies = upload(&outputs)?;
    let calls = sources.iter().zip(&inputs).zip(copies.iter_mut().zip(&outputs)).zip(&numbers);
    let calls = calls.map(|((([q, k], held), ([q_out, k_out], held_out)), numbers)| {
        let [q, k] = [q.view().with_layout(held[0].layout), k.view().with_layout(held[1].layout)];
        let q_out = q_out.view_mut().with_layout(held_out[0].layout);
        let k_out = k_out.view_mut().with_layout(held_out[1].layout);
        numbers.give(spec, QkSegment::copied(q, k, q_out, k_out))
    });
    prepare_qk(device, calls.collect::<Vec<_>>(), mask())?;

    for (index, segment) in segments.iter().enumerate() {
        for which in [0, 1] {
            let place = format!("segment {index}, {}", ["q", "k"][which]);
            let rows = inputs[index][which].rows_of(&download(&in_place[index][which])?).context(place.clone())?;
            let copied = outputs[index][which].rows_of(&download(&copies[index][which])?).context(place.clone())?;
            ensure!(download(&sources[index][which])? == inputs[index][which].bits, "{place}: an input was written");
            let expected = segment.expected(spec, which);
            for (at, expected) in expected.iter().enumerate() {
                let of = at * spec.dim..(at + 1) * spec.dim;
                let (row, copied) = (&rows[of.clone()], &copied[of.clone()]);
                let Some(expected) = expected else {
                    ensure!(*row == segment.rows[which][of], "{place}: masked row {at} was written");
                    ensure!(
                        copied.iter().all(|&bits| bits == sentinel(spec.dtype)),
                        "{place}: masked row {at} was copied"
                    );
                    continue;
                };
                ensure!(row == copied, "{place}: row {at} differs from the one in place: {row:x?}, {copied:x?}");
                judge(row, expected, spec.dtype).with_context(|| format!("{place}, row {at}"))?;
            }
        }
    }
    Ok(())
}

/// A row was computed in f32 and rounded once.
fn judge(row: &[u32], expected: &[f64], dtype: DType) -> Result<()> {
    // Half of the last place.
    let (unit, smallest) = match dtype {
        DType::F16 => (2.0_f64.powi(-11), 2.0_f64.powi(-25)),
        DType::Bf16 => (2.0_f64.powi(-8), 0.0),
        _ => (2.0_f64.powi(-24), 0.0),
    };
    let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
    for (at, (&bits, &expected)) in row.iter().zip(expected).enumerate() {
        let got = f64::from(widen(bits, dtype));
        let bound = 1.001 * unit * expected.abs() + smallest + 4e-6 * largest;
        let is_near = (got - expected).abs() <= bound;
        ensure!(is_near, "element {at}: expected {expected}, got {got}, allowed {bound:e}");
    }
    Ok(())
}

fn every_option(device: &Device) -> Result<()> {
    let mut number = 0;
    for dtype in DTYPES {
        for norm in [false, true] {
            for pairs in [None, Some(Pairs::Neighbours), Some(Pairs::Apart)] {
                // The whole head, parts of it whose halves start at words or between, and nothing.
                for half in [16, 8, 5, 0] {
                    number += 1;
                    let mut spec = Spec::new(dtype, [[4, 2], [3, 3], [2, 1]][number % 3], 32, &[17, 0, 1, 15]);
                    (spec.norm, spec.pairs, spec.half) = (norm, pairs, half);
                    (spec.in_f32, spec.batched, spec.place) = (number % 2 == 0, number / 2 % 2 == 0, number);
                    let keep = |token: usize| !(token * 7 + number).is_multiple_of(5);
                    spec.keep = (number % 3 != 0).then(|| (0..2 * spec.total()).map(keep).collect());
                    check(device, &spec).with_context(|| format!("{spec:?}"))?;
                    if pairs.is_none() {
                        break;
                    }
                }
            }
        }
    }
    Ok(())
}

fn head_dims(device: &Device) -> Result<()> {
    for dtype in DTYPES {
        for (number, dim) in [1, 2, 3, 7, 8, 24, 59, 64, 72, 128, 136, 257, 512].into_iter().enumerate() {
            let mut spec = Spec::new(dtype, [3, 1], dim, &[5, 2]);
            (spec.place, spec.in_f32, spec.batch) = (number, number % 2 == 0, 1);
            spec.pairs = Some([Pairs::Apart, Pairs::Neighbours][number % 2]);
            check(device, &spec).with_context(|| format!("{spec:?}"))?;
        }
    }
    Ok(())
}

/// All, none, runs across the borders of segments, and a batch row without a token.
fn masks(device: &Device) -> Result<()> {
    let lengths = [15, 1, 17, 40];
    let total = lengths.iter().sum::<usize>();
    let keeps: [&dyn Fn(usize, usize) -> bool; 6] = [
        &|_, _| true,
        &|_, _| false,
        &|b, _| b == 1,
        &|_, token| (10..20).contains(&token),
        &|b, token| token < [40, 16][b],
        &|b, token| (token + b) % 32 == 31,
    ];
    for dtype in DTYPES {
        for keep in keeps {
            let mut spec = Spec::new(dtype, [2, 1], 24, &lengths);
            spec.keep = Some((0..2 * total).map(|at| keep(at / total, at % total)).collect());
            check(device, &spec).with_context(|| format!("{spec:?}"))?;
        }
    }
    // Metadata does what its mask does.
    let mask = KeyMask::from_lengths(6, &[4, 0])?;
    let meta = VarlenMeta::from_key_mask(&mask)?;
    let bits: Vec<u32> = random::normal(530, 2 * 6 * 8).into_iter().map(f32::to_bits).collect();
    let weight = upload(device, DType::F32, &bits[..8], &[8])?;
    let run = |mask: TokenMask<'_>| {
        let mut tensors =
            [upload(device, DType::F32, &bits, &[2, 6, 1, 8])?, upload(device, DType::F32, &bits, &[2, 6, 1, 8])?];
        let [q, k] = &mut tensors;
        prepare_qk(device, [QkSegment::in_place(q, k).with_norm(QkNorm::new(&weight, &weight, EPS))], mask)?;
        download(&tensors[0])
    };
    let by_mask = run((&mask).into())?;
    ensure!(by_mask == run((&meta).into())?, "metadata and its mask differ");
    ensure!(by_mask[..32].iter().zip(&bits).all(|(now, before)| now != before), "valid rows were not written");
    ensure!(by_mask[32..] == bits[32..], "masked rows were written");
    Ok(())
}

fn numbers_of_segments(device: &Device) -> Result<()> {
    for count in 1..=8 {
        let lengths: Vec<usize> = [3, 0, 16, 1, 15, 17, 0, 2][..count].to_vec();
        let mut spec = Spec::new(DTYPES[count % 3], [2, 2], 16, &lengths);
        spec.place = count;
        spec.keep = Some((0..2 * spec.total()).map(|token| token % 4 != 1).collect());
        check(device, &spec).with_context(|| format!("{spec:?}"))?;
    }
    Ok(())
}

/// Enough for several threads, and for more workgroups than one.
fn long(device: &Device) -> Result<()> {
    for dtype in DTYPES {
        let mut spec = Spec::new(dtype, [6, 2], 128, &[33, 300]);
        spec.pairs = Some(Pairs::Apart);
        check(device, &spec)?;
    }
    Ok(())
}

/// Nine batch rows, of which some have no token, with tables of their own.
pub fn many_batch_rows(device: &Device) -> Result<()> {
    for dtype in DTYPES {
        let mut spec = Spec::new(dtype, [8, 2], 64, &[3, 13]);
        (spec.batch, spec.batched, spec.place) = (9, true, 1);
        spec.keep = Some((0..9 * 16).map(|at| !(3..5).contains(&(at / 16)) && at % 5 != 2).collect());
        check(device, &spec).with_context(|| format!("{spec:?}"))?;
    }
    Ok(())
}

fn nan_stays_in_its_head(device: &Device) -> Result<()> {
    let weight = Tensor::from_slice(device, &[1.0_f32; 16], &[16])?;
    for dtype in DTYPES {
        for norm in [false, true] {
            let mut bits = vec![narrow(1.0, dtype); 5 * 3 * 16];
            bits[7 * 16 + 2] = narrow(f32::NAN, dtype);
            let mut tensors =
                [upload(device, dtype, &bits, &[1, 5, 3, 16])?, upload(device, dtype, &bits, &[1, 5, 3, 16])?];
            let [q, k] = &mut tensors;
            let mut segment = QkSegment::in_place(q, k);
            if norm {
                segment = segment.with_norm(QkNorm::new(&weight, &weight, EPS));
            }
            prepare_qk(device, [segment], TokenMask::all())?;
            for (at, &bits) in download(&tensors[0])?.iter().enumerate() {
                let is_nan = if norm { at / 16 == 7 } else { at == 7 * 16 + 2 };
                ensure!(widen(bits, dtype).is_nan() == is_nan, "{dtype}, norm: {norm}: element {at}");
            }
        }
    }
    Ok(())
}

/// Without norm and rotation rows are copied bit for bit.
fn neither(device: &Device) -> Result<()> {
    for dtype in DTYPES {
        let mut spec = Spec::new(dtype, [2, 1], 40, &[9, 4]);
        (spec.norm, spec.pairs) = (false, None);
        check(device, &spec)?;
        let bits: Vec<u32> = random::normal(531, 80).into_iter().map(|value| narrow(value, dtype)).collect();
        let x = upload(device, dtype, &bits, &[1, 2, 1, 40])?;
        let mut outs = [Tensor::zeros(device, dtype, x.shape())?, Tensor::zeros(device, dtype, x.shape())?];
        let [q, k] = &mut outs;
        prepare_qk(device, [QkSegment::copied(&x, &x, q, k)], TokenMask::all())?;
        ensure!(download(&outs[0])? == bits && download(&outs[1])? == bits, "{dtype}: not a copy");
    }
    Ok(())
}

/// Each segment has what it was given, and no other's.
fn one_segment_has_more_than_another(device: &Device) -> Result<()> {
    let mut specs = [(); 3].map(|()| Spec::new(DType::F16, [2, 1], 32, &[6]));
    (specs[1].norm, specs[1].pairs) = (false, Some(Pairs::Apart));
    (specs[2].norm, specs[2].pairs) = (false, None);
    let segments = specs.each_ref().map(|spec| Segment::random(spec, 0));
    let mut tensors = Vec::new();
    let mut numbers = Vec::new();
    for (spec, segment) in specs.iter().zip(&segments) {
        let tensor = |which: usize| upload(device, spec.dtype, &segment.rows[which], &[2, 6, spec.heads[which], 32]);
        tensors.push([tensor(0)?, tensor(1)?]);
        numbers.push(Numbers::upload(device, spec, segment)?);
    }
    let calls = tensors.iter_mut().zip(&numbers).zip(&specs);
    let calls = calls.map(|(([q, k], numbers), spec)| numbers.give(spec, QkSegment::in_place(q, k)));
    prepare_qk(device, calls.collect::<Vec<_>>(), TokenMask::all())?;
    for (index, (spec, segment)) in specs.iter().zip(&segments).enumerate() {
        for which in [0, 1] {
            let bits = download(&tensors[index][which])?;
            for (row, expected) in bits.chunks(32).zip(segment.expected(spec, which)) {
                judge(row, &expected.context("a row without a mask")?, spec.dtype)
                    .with_context(|| format!("segment {index}"))?;
            }
        }
    }
    Ok(())
}

/// What a refused call has, and one change makes wrong.
struct Refused<'a> {
    device: &'a Device,
    lengths: Vec<usize>,
    /// q and k of the second segment.
    shapes: [[usize; 4]; 2],
    dtypes: [DType; 2],
    weights: [(DType, Vec<usize>); 2],
    eps: f32,
    tables: [(DType, Vec<usize>); 2],
    /// Size of the mask.
    mask: [usize; 2],
    /// Of the second segment's q.
    out: Option<(DType, [usize; 4])>,
}

impl<'a> Refused<'a> {
    fn new(device: &'a Device) -> Self {
        Self {
            device,
            lengths: vec![3, 5],
            shapes: [[2, 5, 4, 16], [2, 5, 2, 16]],
            dtypes: [DType::F16; 2],
            weights: [(DType::F32, vec![16]), (DType::F16, vec![16])],
            eps: EPS,
            tables: [(DType::F32, vec![5, 4]), (DType::F32, vec![5, 4])],
            mask: [2, 8],
            out: None,
        }
    }

    /// The message; nothing was written.
    fn error(&self) -> Result<String> {
        let Self { device, .. } = *self;
        let ones = |dtype: DType, shape: &[usize]| {
            upload(device, dtype, &vec![narrow(2.0, dtype); shape.iter().product()], shape)
        };
        let others = |tensors: &(DType, Vec<usize>)| ones(tensors.0, &tensors.1);
        let [q_weight, k_weight] = [others(&self.weights[0])?, others(&self.weights[1])?];
        let [cos, sin] = [others(&self.tables[0])?, others(&self.tables[1])?];
        let mut tensors = Vec::new();
        for (index, &length) in self.lengths.iter().enumerate() {
            let (shapes, dtypes) = match index {
                1 => (self.shapes, self.dtypes),
                _ => ([[2, length, 4, 16], [2, length, 2, 16]], [DType::F16; 2]),
            };
            tensors.push([ones(dtypes[0], &shapes[0])?, ones(dtypes[1], &shapes[1])?]);
        }
        let source = ones(self.dtypes[0], &self.shapes[0])?;
        let source_k = ones(self.dtypes[1], &self.shapes[1])?;
        let (out_dtype, out_shape) = self.out.unwrap_or((self.dtypes[0], self.shapes[0]));
        let mut out = ones(out_dtype, &out_shape)?;
        let mask = KeyMask::all(self.mask[0], self.mask[1])?;
        let mut copy = self.out.map(|_| out.view_mut());
        let mut segments = Vec::new();
        for (index, [q, k]) in tensors.iter_mut().enumerate() {
            let segment = match copy.take_if(|_| index == 1) {
                Some(out) => QkSegment::copied(&source, &source_k, out, k),
                None => QkSegment::in_place(q, k),
            };
            segments.push(match index {
                1 => segment.with_norm(QkNorm::new(&q_weight, &k_weight, self.eps)).with_rotary(Rotary::new(
                    &cos,
                    &sin,
                    RotaryPairing::Halves,
                )),
                _ => segment,
            });
        }
        let error = prepare_qk(device, segments, &mask).err().context("the call was taken")?;
        for tensor in tensors.iter().flatten().chain([&out]) {
            let two = narrow(2.0, tensor.dtype());
            ensure!(download(tensor)?.iter().all(|&bits| bits == two), "{error}: something was written");
        }
        Ok(error.to_string())
    }
}

fn refusals(device: &Device) -> Result<()> {
    let expect = |expected: &str, change: &dyn Fn(&mut Refused<'_>)| {
        let mut call = Refused::new(device);
        change(&mut call);
        let got = call.error()?;
        ensure!(got.contains(expected), "expected {expected:?}, got {got:?}");
        anyhow::Ok(())
    };
    expect("`segments`: expected 1 to 8 segments, got 0", &|call| call.lengths = vec![])?;
    expect("`segments`: expected 1 to 8 segments, got 9", &|call| call.lengths = vec![5; 9])?;
    expect("`segments[1].q`: expected shape [2, 5, 4, 16], got [3, 5, 4, 16]", &|call| call.shapes[0][0] = 3)?;
    expect("`segments[1].q`: expected shape [2, 5, 4, 16], got [2, 5, 3, 16]", &|call| call.shapes[0][2] = 3)?;
    expect("`segments[1].q`: expected shape [2, 5, 4, 16], got [2, 5, 4, 32]", &|call| call.shapes[0][3] = 32)?;
    expect("`segments[1].k`: expected shape [2, 5, 2, 16], got [2, 6, 2, 16]", &|call| call.shapes[1][1] = 6)?;
    expect("`segments[1].k`: expected element type f16, got bf16", &|call| call.dtypes[1] = DType::Bf16)?;
    expect("`mask`: ", &|call| call.mask = [2, 9])?;
    expect("`segments[1].q_weight`: expected shape [16], got [8]", &|call| call.weights[0].1 = vec![8])?;
    expect("`segments[1].k_weight`: expected shape [16], got [1, 16]", &|call| call.weights[1].1 = vec![1, 16])?;
    expect("`segments[1].k_weight`: expected element type f16, got bf16", &|call| call.weights[1].0 = DType::Bf16)?;
    for eps in [-1e-9, f32::NAN, f32::INFINITY] {
        expect("`segments[1].eps`: must be finite and not negative", &|call| call.eps = eps)?;
    }
    expect("`segments[1].cos`: expected shape [5, 4], got [4, 4]", &|call| call.tables[0].1 = vec![4, 4])?;
    expect("`segments[1].cos`: expected shape [2, 5, 4], got [1, 5, 4]", &|call| call.tables[0].1 = vec![1, 5, 4])?;
    expect("`segments[1].sin`: expected shape [5, 4], got [5, 3]", &|call| call.tables[1].1 = vec![5, 3])?;
    expect("`segments[1].sin`: expected element type f32, got f16", &|call| call.tables[1].0 = DType::F16)?;
    expect("`segments[1].cos`: expected element type f16, got bf16", &|call| call.tables[0].0 = DType::Bf16)?;
    expect("`segments[1].cos`: [S, R/2] or [B, S, R/2] tables rotate", &|call| {
        call.tables = [(DType::F32, vec![5, 9]), (DType::F32, vec![5, 9])];
    })?;
    expect("`segments[1].q_out`: expected shape [2, 5, 4, 16], got [2, 5, 2, 16]", &|call| {
        call.out = Some((DType::F16, [2, 5, 2, 16]));
    })?;
    expect("`segments[1].q_out`: expected element type f16, got f32", &|call| {
        call.out = Some((DType::F32, [2, 5, 4, 16]));
    })?;
    let mut tensors = [Tensor::zeros(device, DType::F16, &[2, 4])?, Tensor::zeros(device, DType::F16, &[1, 2, 1, 8])?];
    let [q, k] = &mut tensors;
    let error = prepare_qk(device, [QkSegment::in_place(q, k)], TokenMask::all()).err();
    ensure!(matches!(error, Some(Error::Rank { argument: "segments[0].q", .. })), "got {error:?}");
    // Every element of an output has a place of its own.
    let mut tensors = [(); 2].map(|()| Tensor::zeros(device, DType::F16, &[1, 4, 1, 8]));
    let [Ok(q), Ok(k)] = &mut tensors else { anyhow::bail!("no tensors: {tensors:?}") };
    let overlapping = Layout::strided(&[1, 4, 1, 8], &[8, 4, 8, 1], 0)?;
    let error =
        prepare_qk(device, [QkSegment::in_place(q, k.view_mut().with_layout(overlapping))], TokenMask::all()).err();
    ensure!(matches!(error, Some(Error::SelfOverlap { argument: "segments[0].k", .. })), "got {error:?}");
    Ok(())
}
