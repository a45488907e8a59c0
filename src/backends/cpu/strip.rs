//! The arithmetic: strips of queries against a tile of keys. Plain panels come in, of f32 or of pairs
//! of 16-bit numbers (`operands`); what element type and which rows of which tensor they came from
//! is the business of `tiles`.
//!
//! A *panel* is `[len][width]`, row-major, one query per column. A strip's panels are a few SIMD
//! vectors wide. With queries in the lanes, both products take their second operand, elements of K
//! and of V, one scalar after another, and the softmax never crosses lanes; the weights leave it in
//! the layout in which the second product wants them. What is scalar lies in *blocks*
//! `[len][scalars]`, `RegisterTile::SCALARS` side by side, so that a product reads two streams:
//!
//! ```text
//!    scores[key][lane]  = Σ_d  keys[block][d][key] · q[d][lane]             SCALARS keys at a time
//!    acc[d][lane]       = acc[d][lane] · factor[lane]
//!                       + Σ_key values[block][key][d] · weight[key][lane]   as many columns
//! ```

use std::ops::Range;

use super::isa::{AtWidth, RegisterTile, Vectorized};
use super::operands::Operand;
use super::processor::Processor;
use super::softcap::{Softcap, capped};
use super::softmax::{Running, biased};

/// Tiles have a multiple of 8 columns, which is no multiple of 6: what is left over is one or two
/// blocks of as many columns.
pub(super) const NARROW: usize = 4;

/// Columns of a tile: the head dimension, made a multiple of 8 by columns of zeros.
pub(super) fn tile_columns(head_dim: usize) -> usize {
    head_dim.next_multiple_of(2 * NARROW)
}

/// Blocks of columns of the values: wide ones of `scalars` columns, then narrow ones of [`NARROW`].
#[derive(Debug, Clone, Copy)]
pub(super) struct ColumnBlocks {
    /// Wide blocks.
    wide: usize,
    scalars: usize,
}

impl ColumnBlocks {
    /// As many wide ones as leave a multiple of [`NARROW`]; `head_dim`, the columns of a tile, is a
    /// multiple of 8.
    fn new(head_dim: usize, scalars: usize) -> Self {
        let most = head_dim / scalars;
        let wide = (0..=most).rev().find(|wide| (head_dim - wide * scalars).is_multiple_of(NARROW)).unwrap_or(0);
        Self { wide, scalars }
    }

    /// Where the value of a column and key lies, in blocks of `stride` keys.
    #[cfg(test)]
    fn place(self, column: usize, key: usize, stride: usize) -> usize {
        let wide = self.wide_columns();
        let (start, columns) = if column < wide { (0, self.scalars) } else { (wide, NARROW) };
        let block = (column - start) / columns * columns;
        (start + block) * stride + key * columns + (column - start) % columns
    }

    /// Columns of the wide blocks; narrow ones follow.
    pub fn wide_columns(self) -> usize {
        self.wide * self.scalars
    }
}

/// Lanes of a query tile, in strips.
#[derive(Debug, Clone, Copy)]
pub(super) struct Strips {
    lanes: usize,
    /// Lanes of a SIMD vector.
    vector: usize,
    /// Vectors of the widest strip.
    vectors: usize,
    /// Scalars of a product.
    scalars: usize,
}

/// No strips, of the processor's vectors, and the fewest of them.
struct NoStrips;

impl Vectorized for NoStrips {
    type Output = (Strips, usize);
    #[inline(always)]
    fn run<S: RegisterTile>(self, _: S) -> Self::Output {
        let none = Strips { lanes: 0, vector: S::F32_LANES, vectors: S::VECTORS, scalars: S::SCALARS };
        (none, S::FEWEST_VECTORS)
    }
}

impl Strips {
    /// For `queries` queries; the last vector may have lanes to spare. Where queries see different
    /// keys, narrow strips compute fewer keys that only some of their queries see.
    pub fn new(processor: Processor, queries: usize, queries_differ: bool) -> Self {
        let (none, fewest) = processor.dispatch(NoStrips);
        let vectors = if queries_differ { fewest } else { none.vectors };
        Self { lanes: queries.next_multiple_of(none.vector), vectors, ..none }
    }

    pub fn lanes(self) -> usize {
        self.lanes
    }

    /// Keys that lie side by side in a block.
    pub fn block_keys(self) -> usize {
        self.scalars
    }

    /// The blocks of the values.
    pub fn columns(self, head_dim: usize) -> ColumnBlocks {
        ColumnBlocks::new(head_dim, self.scalars)
    }

    /// The width that no strip of a tile of as many lanes or fewer exceeds.
    pub fn widest(self) -> usize {
        self.lanes.min(self.vectors * self.vector)
    }

    /// The lanes of each strip: as few strips as can be, of about the same width.
    pub fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        let vectors = self.lanes / self.vector;
        let count = vectors.div_ceil(self.vectors);
        let first = move |strip| vectors * strip / count * self.vector;
        (0..count).map(move |strip| first(strip)..first(strip + 1))
    }
}

/// Where the panel of a strip lies among the panels `[len]` of all strips.
pub(super) fn panel(lanes: &Range<usize>, len: usize) -> Range<usize> {
    lanes.start * len..lanes.end * len
}

/// One tile of keys and values, gathered, in words of [`Operand::PER_WORD`] elements.
#[derive(Debug, Clone)]
pub(super) struct KeyTile<'a> {
    /// Blocks `[words of head_dim][SCALARS]` of as many keys; the last one may have keys to spare,
    /// of any value.
    pub keys: &'a [f32],
    /// Blocks `[value_stride][columns]`, of as many columns as [`ColumnBlocks`] says. What lacks in
    /// the last word of keys is 0.
    pub values: &'a [f32],
    pub value_stride: usize,
    pub len: usize,
    /// The keys that are computed, from a whole block of keys on.
    pub part: Range<usize>,
    /// Panels `[len]` to add to the scaled scores.
    pub bias: Option<&'a [f32]>,
    /// Which of the part each query sees; all of it where there are no limits.
    pub seen: Option<Limits<'a>>,
    /// Whether no value of the tile is NaN or infinite.
    pub values_are_finite: bool,
}

/// The keys of a tile that each query of a strip sees, from the tile's start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits<'a> {
    pub firsts: &'a [f32],
    pub ends: &'a [f32],
    /// First and end of the keys that all of them see, from the start of the part; equal where there are none.
    pub common: [usize; 2],
}

/// Attention of one strip of a query tile to one tile of keys.
pub(super) struct Step<'a> {
    pub columns: ColumnBlocks,
    pub lanes: Range<usize>,
    pub head_dim: usize,
    /// Panels `[words of head_dim]`.
    pub q: &'a [f32],
    /// Panels `[head_dim]`: the output so far, relative to `max`, not yet divided by `sum`.
    pub acc: &'a mut [f32],
    pub max: &'a mut [f32],
    pub sum: &'a mut [f32],
    /// One panel of scratch, as long as whole blocks of keys.
    pub scores: &'a mut [f32],
    pub tile: KeyTile<'a>,
    /// The factor on the scores, positive.
    pub scale: f32,
    /// Takes the place of the factor.
    pub softcap: Option<Softcap>,
}

impl<O: Operand> Vectorized for (O, Step<'_>) {
    type Output = ();
    #[inline(always)]
    fn run<S: RegisterTile>(self, simd: S) {
        simd.run_at_width(self.1.lanes.len() / S::F32_LANES, self);
    }
}

impl<O: Operand> AtWidth for (O, Step<'_>) {
    #[inline(always)]
    fn run<S: RegisterTile, const W: usize, const N: usize>(self, simd: S) {
        let (operand, step) = self;
        let KeyTile { keys, values, value_stride, len, part, bias, seen, values_are_finite } = step.tile;
        let (lanes, head_dim, columns) = (&step.lanes, step.head_dim, step.columns);
        let words = head_dim / O::PER_WORD;
        let q = vectors::<S, W>(&step.q[panel(lanes, words)]);
        let scores = vectors_mut::<S, W>(step.scores);
        let (blocks, _) = scores.as_chunks_mut::<N>();
        let keys = keys.chunks_exact(N * words).skip(part.start / N);
        for (block, keys) in blocks[..part.len().div_ceil(N)].iter_mut().zip(keys) {
            *block = product::<S, O, W, N>(simd, operand, keys.as_chunks::<N>().0, q);
        }
        let scores = &mut scores[..part.len()];
        let mut scale = step.scale;
        if let Some(softcap) = step.softcap {
            for score in scores.iter_mut() {
                for score in score {
                    *score = capped(simd, *score, softcap);
                }
            }
            scale = 1.0;
        }
        if let Some(bias) = bias {
            let factor = simd.splat_f32s(scale);
            let bias = &vectors::<S, W>(&bias[panel(lanes, len)])[part.clone()];
            for (score, bias) in scores.iter_mut().zip(bias) {
                for w in 0..W {
                    score[w] = biased(simd, score[w], factor, bias[w]);
                }
            }
            scale = 1.0;
        }
        let [first_common, end_common] = seen.map_or([0; 2], |limits| limits.common);
        let mut seen = seen.and_then(|limits| Seen::<S, W>::new(limits, part.start));
        if let Some(seen) = &seen {
            let nothing = simd.splat_f32s(f32::NEG_INFINITY);
            for i in (0..first_common).chain(end_common..scores.len()) {
                for (w, score) in scores[i].iter_mut().enumerate() {
                    *score = simd.select_f32s(seen.sees(simd, i, w), *score, nothing);
                }
            }
        }
        let [max] = vectors_mut::<S, W>(&mut step.max[lanes.clone()]) else { return };
        let [sum] = vectors_mut::<S, W>(&mut step.sum[lanes.clone()]) else { return };
        let scale_log2 = (scale * std::f32::consts::LOG2_E).min(f32::MAX);
        let factor = Running::<S, W> { max, sum }.weigh(simd, operand, scores, scale_log2);
        let weights = &scores[..part.len().div_ceil(O::PER_WORD)];

        let (wide, narrow) =
            vectors_mut::<S, W>(&mut step.acc[panel(lanes, head_dim)]).split_at_mut(columns.wide_columns());
        let (wide_values, narrow_values) = values.split_at(columns.wide_columns() * value_stride);
        let values = Values { stride: value_stride, first: part.start / O::PER_WORD };
        let (start, end) = ([simd.splat_f32s(0.0); W], [simd.splat_f32s(part.end as f32); W]);
        if part.end < len && !part.len().is_multiple_of(O::PER_WORD) {
            // The last word has a value that is not of the part.
            seen = seen.or(Some(Seen { firsts: &start, ends: &end, start: part.start }));
        }
        let seen = seen.filter(|_| !values_are_finite);
        if let Some(seen) = &seen {
            accumulate_seen::<S, O, W, N>(simd, operand, weights, (wide_values, values), factor, wide, seen);
        } else {
            accumulate::<S, O, W, N>(simd, operand, weights, (wide_values, values), factor, wide);
        }
        if !N.is_multiple_of(NARROW) {
            if let Some(seen) = &seen {
                accumulate_seen::<S, O, W, NARROW>(
                    simd,
                    operand,
                    weights,
                    (narrow_values, values),
                    factor,
                    narrow,
                    seen,
                );
            } else {
                accumulate::<S, O, W, NARROW>(simd, operand, weights, (narrow_values, values), factor, narrow);
            }
        }
    }
}

/// Where rows of a block of values lie.
#[derive(Debug, Clone, Copy)]
struct Values {
    stride: usize,
    /// The first row that counts.
    first: usize,
}

/// The keys that each query of a strip sees.
struct Seen<'a, S: RegisterTile, const W: usize> {
    firsts: &'a [S::f32s; W],
    ends: &'a [S::f32s; W],
    /// The key of the first row of scores.
    start: usize,
}

impl<'a, S: RegisterTile, const W: usize> Seen<'a, S, W> {
    #[inline(always)]
    fn new(limits: Limits<'a>, start: usize) -> Option<Self> {
        let of_strip = |values| S::as_simd_f32s(values).0.as_chunks::<W>().0.first();
        Some(Self { firsts: of_strip(limits.firsts)?, ends: of_strip(limits.ends)?, start })
    }

    /// The lanes of vector `w` that see the key of row `i` of the scores.
    #[inline(always)]
    fn sees(&self, simd: S, i: usize, w: usize) -> S::m32s {
        let key = simd.splat_f32s((self.start + i) as f32);
        simd.and_m32s(simd.less_than_or_equal_f32s(self.firsts[w], key), simd.less_than_f32s(key, self.ends[w]))
    }
}

/// The sum over `i` of `scalars[i][n] · vectors[i][w]`.
#[inline(always)]
fn product<S: RegisterTile, O: Operand, const W: usize, const N: usize>(
    simd: S,
    operand: O,
    scalars: &[[f32; N]],
    vectors: &[[S::f32s; W]],
) -> [[S::f32s; W]; N] {
    let mut sums = [[simd.splat_f32s(0.0); W]; N];
    for (scalars, vectors) in scalars.iter().zip(vectors) {
        operand.add_products(simd, &mut sums, scalars, vectors);
    }
    sums
}

/// Adds the weighted sum of blocks of `N` columns of the values to what was accumulated before.
#[inline(always)]
fn accumulate<S: RegisterTile, O: Operand, const W: usize, const N: usize>(
    simd: S,
    operand: O,
    weights: &[[S::f32s; W]],
    (values, Values { stride, first }): (&[f32], Values),
    factor: [S::f32s; W],
    acc: &mut [[S::f32s; W]],
) {
    let blocks = values.chunks_exact(N * stride);
    for (acc, values) in acc.as_chunks_mut::<N>().0.iter_mut().zip(blocks) {
        let sums = product::<S, O, W, N>(simd, operand, &values.as_chunks::<N>().0[first..], weights);
        for n in 0..N {
            for w in 0..W {
                acc[n][w] = simd.mul_add_e_f32s(acc[n][w], factor[w], sums[n][w]);
            }
        }
    }
}

/// [`accumulate`] where a value may be NaN or infinite: times a weight of 0 it would reach queries
/// that do not see its key.
#[inline(always)]
fn accumulate_seen<S: RegisterTile, O: Operand, const W: usize, const N: usize>(
    simd: S,
    operand: O,
    weights: &[[S::f32s; W]],
    (values, Values { stride, first }): (&[f32], Values),
    factor: [S::f32s; W],
    acc: &mut [[S::f32s; W]],
    seen: &Seen<'_, S, W>,
) {
    let zero = simd.splat_f32s(0.0);
    let blocks = values.chunks_exact(N * stride);
    for (acc, values) in acc.as_chunks_mut::<N>().0.iter_mut().zip(blocks) {
        for n in 0..N {
            for w in 0..W {
                let mut sum = zero;
                for (i, (weight, value)) in weights.iter().zip(&values.as_chunks::<N>().0[first..]).enumerate() {
                    let value = operand.keep(
                        simd,
                        simd.splat_f32s(value[n]),
                        #[inline(always)]
                        |element| seen.sees(simd, i * O::PER_WORD + element, w),
                    );
                    sum = operand.mul_add(simd, weight[w], value, sum);
                }
                acc[n][w] = simd.mul_add_e_f32s(acc[n][w], factor[w], sum);
            }
        }
    }
}

/// Divides the accumulated output of all strips by the sums; zeros where the sum is 0.
pub(super) struct Normalize<'a> {
    pub strips: Strips,
    pub head_dim: usize,
    pub acc: &'a mut [f32],
    pub sum: &'a [f32],
}

impl Vectorized for Normalize<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: RegisterTile>(self, simd: S) {
        let zero = simd.splat_f32s(0.0);
        for lanes in self.strips.ranges() {
            let (sums, _) = S::as_simd_f32s(&self.sum[lanes.clone()]);
            let (acc, _) = S::as_mut_simd_f32s(&mut self.acc[panel(&lanes, self.head_dim)]);
            for (w, &sum) in sums.iter().enumerate() {
                let is_empty = simd.equal_f32s(sum, zero);
                let inverse = simd.div_f32s(simd.splat_f32s(1.0), sum);
                for acc in acc.iter_mut().skip(w).step_by(sums.len()) {
                    *acc = simd.select_f32s(is_empty, zero, simd.mul_f32s(*acc, inverse));
                }
            }
        }
    }
}

#[inline(always)]
fn vectors<S: RegisterTile, const W: usize>(panel: &[f32]) -> &[[S::f32s; W]] {
    S::as_simd_f32s(panel).0.as_chunks::<W>().0
}

#[inline(always)]
fn vectors_mut<S: RegisterTile, const W: usize>(panel: &mut [f32]) -> &mut [[S::f32s; W]] {
    S::as_mut_simd_f32s(panel).0.as_chunks_mut::<W>().0
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::backends::cpu::operands::OneF32;

    /// Not random, but without a pattern that a wrong index could keep.
    fn value(i: usize, j: usize) -> f32 {
        ((i * 37 + j * 101 + 11) * 7919 % 1009) as f32 / 504.5 - 1.0
    }

    /// [`value`], or what a pair's element keeps of it.
    fn element<O: Operand>(i: usize, j: usize) -> f32 {
        if O::PER_WORD == 1 { value(i, j) } else { bf16::from_f32(value(i, j)).to_f32() }
    }

    /// A word of elements.
    fn word<O: Operand>(element: impl Fn(usize) -> f32) -> f32 {
        if O::PER_WORD == 1 {
            return element(0);
        }
        let [low, high] = [0, 1].map(|at| u32::from(bf16::from_f32(element(at)).to_bits()));
        f32::from_bits(low | high << 16)
    }

    /// Two key tiles, for every vector length and width of strip. Of the second one only a part counts;
    /// what comes after it is NaN.
    fn agrees_with_a_plain_softmax<O: Operand>(
        processor: Processor,
        operand: O,
        dispatch: impl Fn((O, Step<'_>)),
        tolerance: f64,
    ) {
        const DIM: usize = 24;
        /// Keys of the tiles, and of their parts.
        const LENS: [[usize; 2]; 2] = [[24, 24], [12, 9]];
        const STRIDE: usize = 26;
        let words = DIM / O::PER_WORD;
        for (queries, differ) in [1, 5, 48, 49, 70].into_iter().flat_map(|queries| [(queries, false), (queries, true)])
        {
            let strips = Strips::new(processor, queries, differ);
            let lanes = strips.lanes();
            let mut q = vec![0.0; lanes * words];
            for strip in strips.ranges() {
                let panel = &mut q[panel(&strip, words)];
                for (d, row) in panel.chunks_exact_mut(strip.len()).enumerate() {
                    row.iter_mut()
                        .zip(strip.clone())
                        .for_each(|(q, lane)| *q = word::<O>(|at| element::<O>(lane, d * O::PER_WORD + at)));
                }
            }
            let (mut acc, mut max, mut sum) =
                (vec![0.0; lanes * DIM], vec![f32::NEG_INFINITY; lanes], vec![0.0; lanes]);
            let mut scores = vec![f32::NAN; STRIDE * strips.widest()];
            let mut first = 0;
            for [len, part] in LENS {
                let mut keys = vec![f32::NAN; STRIDE * DIM];
                let mut values = vec![f32::NAN; STRIDE * DIM];
                let (block, columns) = (strips.block_keys(), strips.columns(DIM));
                let of = |key: usize, i: usize, j: usize| if key < part { element::<O>(i, j) } else { f32::NAN };
                for key in 0..len {
                    for d in 0..words {
                        keys[(key / block * words + d) * block + key % block] =
                            word::<O>(|at| of(key, first + key + 1000, d * O::PER_WORD + at));
                    }
                }
                for key in 0..len.div_ceil(O::PER_WORD) {
                    for d in 0..DIM {
                        values[columns.place(d, key, STRIDE)] = word::<O>(|at| {
                            let key = key * O::PER_WORD + at;
                            of(key, first + key + 2000, d)
                        });
                    }
                }
                for lanes in strips.ranges() {
                    let step = Step {
                        columns,
                        lanes,
                        head_dim: DIM,
                        q: &q,
                        acc: &mut acc,
                        max: &mut max,
                        sum: &mut sum,
                        scores: &mut scores,
                        tile: KeyTile {
                            keys: &keys,
                            values: &values,
                            value_stride: STRIDE,
                            len,
                            part: 0..part,
                            bias: None,
                            seen: None,
                            values_are_finite: part == len,
                        },
                        scale: 0.5,
                        softcap: None,
                    };
                    dispatch((operand, step));
                }
                first += part;
            }
            processor.dispatch(Normalize { strips, head_dim: DIM, acc: &mut acc, sum: &sum });
            for lane in 0..queries {
                let weights: Vec<f64> = (0..first)
                    .map(|key| {
                        let dot = |d| f64::from(element::<O>(lane, d)) * f64::from(element::<O>(key + 1000, d));
                        (0.5 * (0..DIM).map(dot).sum::<f64>()).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                let Some(strip) = strips.ranges().find(|strip| strip.contains(&lane)) else { unreachable!() };
                for d in 0..DIM {
                    let weighted = |key| weights[key] * f64::from(element::<O>(key + 2000, d));
                    let want = (0..first).map(weighted).sum::<f64>() / total;
                    let got = acc[panel(&strip, DIM)][d * strip.len() + lane - strip.start];
                    assert!(
                        (f64::from(got) - want).abs() < tolerance,
                        "{processor:?} {queries} {lane} {d}: {got} {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_vector_length_agrees_with_a_plain_softmax() {
        for processor in Processor::all() {
            agrees_with_a_plain_softmax(processor, OneF32, |step| processor.dispatch(step), 2e-6);
            if let Some(pairs) = processor.bf16() {
                // A weight is off by 2^-9 of its size at most.
                agrees_with_a_plain_softmax(processor, pairs, |step| pairs.dispatch(step), 2f64.powi(-9));
            }
        }
    }

    #[test]
    fn strips_cover_the_lanes_evenly() {
        for processor in Processor::all() {
            for (queries, differ) in (0..300).flat_map(|queries| [(queries, false), (queries, true)]) {
                let strips = Strips::new(processor, queries, differ);
                let mut end = 0;
                for lanes in strips.ranges() {
                    assert_eq!((lanes.start, lanes.len() % strips.vector), (end, 0));
                    assert!(!lanes.is_empty() && lanes.len() <= strips.widest());
                    end = lanes.end;
                }
                assert_eq!(end, strips.lanes());
                assert!(end >= queries && end < queries + strips.vector);
            }
        }
    }
}
