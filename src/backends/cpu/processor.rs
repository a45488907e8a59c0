//! The instruction sets that this processor has: vectors, and instructions for products of bf16 on
//! top of them.

use super::bf16_pairs::Bf16Pairs;
use super::isa::{Vectorized, Vectors};
use crate::config::CpuIsa;

/// An instruction set that this processor has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Processor {
    vectors: Vectors,
    bf16: Option<Bf16Pairs>,
}

impl Processor {
    /// Every instruction set of this processor, the best one first. The last one is part of every
    /// processor.
    pub fn all() -> impl Iterator<Item = Self> {
        Vectors::all().flat_map(|vectors| {
            let bf16 = Bf16Pairs::of(vectors);
            bf16.map(|bf16| Self { vectors, bf16: Some(bf16) }).into_iter().chain([Self { vectors, bf16: None }])
        })
    }

    pub fn isa(self) -> CpuIsa {
        self.bf16.map_or(self.vectors.isa(), Bf16Pairs::isa)
    }

    /// The instructions for products of bf16, if it has them.
    pub fn bf16(self) -> Option<Bf16Pairs> {
        self.bf16
    }

    /// Runs the work, compiled for the instruction set's vectors.
    #[inline(always)]
    pub fn dispatch<W: Vectorized>(self, work: W) -> W::Output {
        self.vectors.dispatch(work)
    }

    /// Runs a loop that the compiler makes SIMD code of.
    #[inline(always)]
    pub fn vectorize<R>(self, work: impl FnOnce() -> R) -> R {
        self.vectors.vectorize(work)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::backends::cpu::isa::RegisterTile;
    use crate::backends::cpu::operands::Operand;

    /// The weights of scores, each in all lanes, as words of two, and one product of each word. The
    /// lanes of the products are the output.
    struct Weights<'a> {
        pairs: Bf16Pairs,
        scores: &'a [f32],
        factors: f32,
    }

    impl Vectorized for Weights<'_> {
        type Output = Vec<Vec<f32>>;
        #[inline(always)]
        fn run<S: RegisterTile>(self, simd: S) -> Self::Output {
            let mut rows: Vec<_> = self.scores.iter().map(|&score| [simd.splat_f32s(score)]).collect();
            self.pairs.weigh(simd, &mut rows, 0, |score| score);
            let products = rows.iter().take(self.scores.len().div_ceil(2)).map(|row| {
                let mut lanes = vec![0.0; S::F32_LANES];
                let product = self.pairs.mul_add(simd, row[0], simd.splat_f32s(self.factors), simd.splat_f32s(0.0));
                S::as_mut_simd_f32s(&mut lanes).0[0] = product;
                lanes
            });
            products.collect()
        }
    }

    /// Weights are rounded to the nearest, ties to even, as `half` rounds them; each meets its own
    /// factor; NaN and infinities go their way, and numbers below 2⁻¹²⁶ are 0.
    #[test]
    fn weights_are_rounded_and_meet_their_own_value() {
        let tiny = f32::MIN_POSITIVE;
        let scores = [
            [1.0, 0.0],
            [0.0, 1.0],
            [1.0 + 2f32.powi(-8), 0.0],
            [1.0 + 3.0 * 2f32.powi(-8), 0.0],
            [0.3, 0.7],
            [f32::NAN, 0.0],
            [f32::INFINITY, 1.0],
            [tiny, 0.0],
            [tiny / 2.0, 0.0],
        ];
        let factors = [3.0, 5.0];
        for processor in Processor::all() {
            let Some(pairs) = processor.bf16() else { continue };
            // A last row without a neighbour.
            let rows = [scores.as_flattened(), &[0.9]].concat();
            let [low, high] = factors.map(|factor| u32::from(bf16::from_f32(factor).to_bits()));
            let sums = pairs.dispatch(Weights { pairs, scores: &rows, factors: f32::from_bits(low | high << 16) });
            assert_eq!(sums.len(), scores.len() + 1);
            let rounded = |score: f32| bf16::from_f32(if score.abs() < tiny { 0.0 } else { score }).to_f32();
            for (pair, sums) in scores.iter().chain(&[[0.9, 0.0]]).zip(sums) {
                let want = rounded(pair[0]).mul_add(factors[0], rounded(pair[1]) * factors[1]);
                for sum in sums {
                    assert!(sum == want || sum.is_nan() && want.is_nan(), "{processor:?} {pair:?}: {sum} {want}");
                }
            }
        }
    }
}
