//! The arithmetic: strips of queries against a tile of keys. Plain f32 panels come in; what element type and which rows of
//! which tensor they came from is the business of `tiles`.
//!
//! A *panel* is `[len][width]`, row-major, one query per column. A strip's panels are one to three SIMD vectors wide. With queries
//! in the lanes both products read their second operand, rows of K and of V, as broadcast scalars: neither needs K or V transposed
//! or packed, the softmax never crosses lanes, and the weights leave it in the layout in which the second product wants them.
//!
//! ```text
//!    scores[key][lane]  = Σ_d  keys[key][d] · q[d][lane]            4 or 8 keys at a time
//!    acc[d][lane]       = acc[d][lane] · factor[lane]
//!                       + Σ_key values[key][d] · weight[key][lane]  4 or 8 columns at a time
//! ```

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::softmax::Running;

/// Vectors of the widest strip: with products of 8 keys, 24 accumulators of the 32 registers of AVX-512 and NEON; with products
/// of 4, 8 of AVX2's 16, for with 12 the compiler spills one in the innermost loop.
const fn strip_vectors<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 3 } else { 2 }
}

/// Tiles of keys are padded to a multiple of this, and head dimensions are one.
pub(super) const KEY_BLOCK: usize = 8;

/// Columns of the values that lie together, so that a product that takes some columns of all rows reads them in one stream.
pub(super) const VALUE_BLOCK: usize = 8;

/// Lanes of a query tile, in strips.
#[derive(Debug, Clone, Copy)]
pub(super) struct Strips {
    lanes: usize,
    /// Lanes of a SIMD vector.
    vector: usize,
    /// Vectors of the widest strip.
    vectors: usize,
}

/// No strips, of the processor's vectors.
struct NoStrips;

impl WithSimd for NoStrips {
    type Output = Strips;
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Strips {
        Strips { lanes: 0, vector: S::F32_LANES, vectors: strip_vectors::<S>() }
    }
}

impl Strips {
    /// For `queries` queries; the last vector may have lanes to spare.
    pub fn new(arch: Arch, queries: usize) -> Self {
        let none = arch.dispatch(NoStrips);
        Self { lanes: queries.next_multiple_of(none.vector), ..none }
    }

    pub fn lanes(self) -> usize {
        self.lanes
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

/// One tile of keys and values, gathered.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeyTile<'a> {
    /// `[len padded to KEY_BLOCK][key_stride]`
    pub keys: &'a [f32],
    pub key_stride: usize,
    /// `[head_dim / VALUE_BLOCK][value_stride][VALUE_BLOCK]`: the columns of the values, `VALUE_BLOCK` at a time
    pub values: &'a [f32],
    pub value_stride: usize,
    pub len: usize,
    /// Panels `[len]` to add to the scaled scores.
    pub bias: Option<&'a [f32]>,
}

/// Attention of all strips of a query tile to one tile of keys.
pub(super) struct Step<'a> {
    pub strips: Strips,
    pub head_dim: usize,
    /// Panels `[head_dim]`.
    pub q: &'a [f32],
    /// Panels `[head_dim]`: the output so far, relative to `max`, not yet divided by `sum`.
    pub acc: &'a mut [f32],
    pub max: &'a mut [f32],
    pub sum: &'a mut [f32],
    /// One panel `[len padded to KEY_BLOCK]` of scratch.
    pub scores: &'a mut [f32],
    pub tile: KeyTile<'a>,
    /// The factor on the scores, positive.
    pub scale: f32,
}

impl WithSimd for Step<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for lanes in self.strips.ranges() {
            match (lanes.len() / S::F32_LANES, const { strip_vectors::<S>() }) {
                (1, 3) => self.strip::<S, 1, 8>(simd, &lanes),
                (2, 3) => self.strip::<S, 2, 8>(simd, &lanes),
                (_, 3) => self.strip::<S, 3, 8>(simd, &lanes),
                (1, _) => self.strip::<S, 1, 4>(simd, &lanes),
                _ => self.strip::<S, 2, 4>(simd, &lanes),
            }
        }
    }
}

impl Step<'_> {
    #[inline(always)]
    fn strip<S: Simd, const W: usize, const N: usize>(&mut self, simd: S, lanes: &Range<usize>) {
        let KeyTile { keys, key_stride, values, value_stride, len, bias } = self.tile;
        let q = vectors::<S, W>(&self.q[panel(lanes, self.head_dim)]);
        let scores = vectors_mut::<S, W>(self.scores);
        let (blocks, _) = scores.as_chunks_mut::<N>();
        for (block, keys) in blocks[..len.div_ceil(N)].iter_mut().zip(keys.chunks_exact(N * key_stride)) {
            *block = score::<S, W, N>(simd, q, keys, key_stride);
        }
        let scores = &mut scores[..len];
        let mut scale = self.scale;
        if let Some(bias) = bias {
            let factor = simd.splat_f32s(scale);
            for (score, bias) in scores.iter_mut().zip(vectors::<S, W>(&bias[panel(lanes, len)])) {
                for w in 0..W {
                    score[w] = simd.mul_add_e_f32s(score[w], factor, bias[w]);
                }
            }
            scale = 1.0;
        }
        let [max] = vectors_mut::<S, W>(&mut self.max[lanes.clone()]) else { return };
        let [sum] = vectors_mut::<S, W>(&mut self.sum[lanes.clone()]) else { return };
        let scale_log2 = (scale * std::f32::consts::LOG2_E).min(f32::MAX);
        let factor = Running::<S, W> { max, sum }.weigh(simd, scores, scale_log2);
        let acc = vectors_mut::<S, W>(&mut self.acc[panel(lanes, self.head_dim)]);
        for (block, acc) in acc.as_chunks_mut::<N>().0.iter_mut().enumerate() {
            let column = block * N;
            let values =
                &values[column / VALUE_BLOCK * VALUE_BLOCK * value_stride..].as_chunks::<VALUE_BLOCK>().0[..len];
            accumulate::<S, W, N>(simd, scores, values, column % VALUE_BLOCK, factor, acc);
        }
    }
}

/// Scores of `N` keys.
#[inline(always)]
fn score<S: Simd, const W: usize, const N: usize>(
    simd: S,
    q: &[[S::f32s; W]],
    keys: &[f32],
    stride: usize,
) -> [[S::f32s; W]; N] {
    let keys: [&[f32]; N] = std::array::from_fn(|n| &keys[n * stride..][..q.len()]);
    let mut scores = [[simd.splat_f32s(0.0); W]; N];
    for (d, q) in q.iter().enumerate() {
        for n in 0..N {
            let key = simd.splat_f32s(keys[n][d]);
            for w in 0..W {
                scores[n][w] = simd.mul_add_e_f32s(q[w], key, scores[n][w]);
            }
        }
    }
    scores
}

/// `N` columns of the weighted sum of the values, the first being column `first` of the block.
#[inline(always)]
fn accumulate<S: Simd, const W: usize, const N: usize>(
    simd: S,
    weights: &[[S::f32s; W]],
    values: &[[f32; VALUE_BLOCK]],
    first: usize,
    factor: [S::f32s; W],
    acc: &mut [[S::f32s; W]; N],
) {
    let mut sums = [[simd.splat_f32s(0.0); W]; N];
    for (weight, values) in weights.iter().zip(values) {
        let values = &values[first..first + N];
        for n in 0..N {
            let value = simd.splat_f32s(values[n]);
            for w in 0..W {
                sums[n][w] = simd.mul_add_e_f32s(weight[w], value, sums[n][w]);
            }
        }
    }
    for n in 0..N {
        for w in 0..W {
            acc[n][w] = simd.mul_add_e_f32s(acc[n][w], factor[w], sums[n][w]);
        }
    }
}

/// Divides the accumulated output of all strips by the sums; zeros where no key was kept.
pub(super) struct Normalize<'a> {
    pub strips: Strips,
    pub head_dim: usize,
    pub acc: &'a mut [f32],
    pub sum: &'a [f32],
}

impl WithSimd for Normalize<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let zero = simd.splat_f32s(0.0);
        for lanes in self.strips.ranges() {
            let (sums, _) = S::as_simd_f32s(&self.sum[lanes.clone()]);
            let (acc, _) = S::as_mut_simd_f32s(&mut self.acc[panel(&lanes, self.head_dim)]);
            for (w, &sum) in sums.iter().enumerate() {
                // The sum is 0 only where no key was kept: the largest kept score has weight 1.
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
fn vectors<S: Simd, const W: usize>(panel: &[f32]) -> &[[S::f32s; W]] {
    S::as_simd_f32s(panel).0.as_chunks::<W>().0
}

#[inline(always)]
fn vectors_mut<S: Simd, const W: usize>(panel: &mut [f32]) -> &mut [[S::f32s; W]] {
    S::as_mut_simd_f32s(panel).0.as_chunks_mut::<W>().0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archs() -> Vec<Arch> {
        let mut archs = vec![Arch::Scalar, Arch::new()];
        #[cfg(target_arch = "x86_64")]
        archs.extend(pulp::x86::V3::try_new().map(Arch::V3));
        archs
    }

    /// Not random, but without a pattern that a wrong index could keep.
    fn value(i: usize, j: usize) -> f32 {
        ((i * 37 + j * 101 + 11) * 7919 % 1009) as f32 / 504.5 - 1.0
    }

    /// Two key tiles, for every vector length and width of strip.
    #[test]
    fn every_vector_length_agrees_with_a_plain_softmax() {
        const DIM: usize = 24;
        const LENS: [usize; 2] = [KEY_BLOCK, KEY_BLOCK + 3];
        const STRIDE: usize = 2 * KEY_BLOCK;
        for arch in archs() {
            for queries in [1, 5, 48, 49, 70] {
                let strips = Strips::new(arch, queries);
                let lanes = strips.lanes();
                let mut q = vec![0.0; lanes * DIM];
                for strip in strips.ranges() {
                    let panel = &mut q[panel(&strip, DIM)];
                    for (d, row) in panel.chunks_exact_mut(strip.len()).enumerate() {
                        row.iter_mut().zip(strip.clone()).for_each(|(q, lane)| *q = value(lane, d));
                    }
                }
                let (mut acc, mut max, mut sum) =
                    (vec![0.0; lanes * DIM], vec![f32::NEG_INFINITY; lanes], vec![0.0; lanes]);
                let mut scores = vec![f32::NAN; STRIDE * strips.widest()];
                let mut first = 0;
                for len in LENS {
                    let mut keys = vec![f32::NAN; STRIDE * DIM];
                    let mut values = vec![f32::NAN; STRIDE * DIM];
                    for key in 0..len {
                        for d in 0..DIM {
                            keys[key * DIM + d] = value(first + key + 1000, d);
                            let block = d / VALUE_BLOCK * STRIDE * VALUE_BLOCK;
                            values[block + key * VALUE_BLOCK + d % VALUE_BLOCK] = value(first + key + 2000, d);
                        }
                    }
                    arch.dispatch(Step {
                        strips,
                        head_dim: DIM,
                        q: &q,
                        acc: &mut acc,
                        max: &mut max,
                        sum: &mut sum,
                        scores: &mut scores,
                        tile: KeyTile {
                            keys: &keys,
                            key_stride: DIM,
                            values: &values,
                            value_stride: STRIDE,
                            len,
                            bias: None,
                        },
                        scale: 0.5,
                    });
                    first += len;
                }
                arch.dispatch(Normalize { strips, head_dim: DIM, acc: &mut acc, sum: &sum });
                for lane in 0..queries {
                    let weights: Vec<f64> = (0..first)
                        .map(|key| {
                            let dot = |d| f64::from(value(lane, d)) * f64::from(value(key + 1000, d));
                            (0.5 * (0..DIM).map(dot).sum::<f64>()).exp()
                        })
                        .collect();
                    let total: f64 = weights.iter().sum();
                    let Some(strip) = strips.ranges().find(|strip| strip.contains(&lane)) else { unreachable!() };
                    for d in 0..DIM {
                        let weighted = |key| weights[key] * f64::from(value(key + 2000, d));
                        let want = (0..first).map(weighted).sum::<f64>() / total;
                        let got = acc[panel(&strip, DIM)][d * strip.len() + lane - strip.start];
                        assert!((f64::from(got) - want).abs() < 2e-6, "{arch:?} {queries} {lane} {d}: {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn strips_cover_the_lanes_evenly() {
        for arch in archs() {
            for queries in 0..300 {
                let strips = Strips::new(arch, queries);
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
