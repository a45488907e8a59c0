//! The softmax of FlashAttention-2, a tile of keys at a time: running maximum, running sum, and the
//! factor that brings what was summed before to the new maximum (Dao 2023, arXiv:2307.08691,
//! section 3.1).
//!
//! Every SIMD lane is a query, so nothing here crosses lanes: what one row holds cannot reach
//! another.

use pulp::Simd;

use super::operands::Operand;

/// What a score below every f32 counts as where there is a bias. A bias of −∞ alone makes it −∞, so
/// that keys which the bias hides are told from scores that overflow.
pub(super) const OVERFLOWED: f32 = f32::MIN;
/// Lower biases but −∞ count as this one, so that the lowest floats, a common stand-in for −∞, do
/// not make scores overflow.
pub(super) const LOWEST_BIAS: f32 = -3.3e38;

/// A score times a positive factor, and the bias: −∞ where the bias is, else [`OVERFLOWED`] or more,
/// or NaN.
#[inline(always)]
pub(super) fn biased<S: Simd>(simd: S, score: S::f32s, factor: S::f32s, bias: S::f32s) -> S::f32s {
    let (nothing, lowest) = (simd.splat_f32s(f32::NEG_INFINITY), simd.splat_f32s(OVERFLOWED));
    let sum = simd.mul_add_e_f32s(score, factor, at_least(simd, LOWEST_BIAS, bias));
    // By a comparison that is false for NaN.
    let sum = simd.select_f32s(simd.less_than_f32s(sum, lowest), lowest, sum);
    simd.select_f32s(simd.equal_f32s(bias, nothing), nothing, sum)
}

/// What a strip of `W` vectors of queries carries from one tile of keys to the next.
pub(super) struct Running<'a, S: Simd, const W: usize> {
    /// Largest score so far, −∞ before the first key.
    pub max: &'a mut [S::f32s; W],
    /// Sum of `exp(scale · (score − max))` so far.
    pub sum: &'a mut [S::f32s; W],
}

impl<S: Simd, const W: usize> Running<'_, S, W> {
    /// Turns the scores of one tile, `[keys]` rows of a strip, to words of weights relative to the
    /// new maximum, in the first rows. Returns the factor for everything that was accumulated relative to the old one.
    ///
    /// `scale_log2` is positive: log₂e times the factor on the scores.
    #[inline(always)]
    pub fn weigh<O: Operand>(
        &mut self,
        simd: S,
        operand: O,
        scores: &mut [[S::f32s; W]],
        scale_log2: f32,
    ) -> [S::f32s; W] {
        let scale = simd.splat_f32s(scale_log2);
        let mut max = *self.max;
        for score in &*scores {
            for w in 0..W {
                max[w] = simd.max_f32s(score[w], max[w]);
            }
        }
        // A query all of whose scores so far are −∞, by its bias, has the maximum −∞; −∞ − −∞ would
        // be NaN where −∞ − 0 gives weight 0.
        let (zero, nothing) = (simd.splat_f32s(0.0), simd.splat_f32s(f32::NEG_INFINITY));
        let (mut shift, mut factor) = (max, max);
        for w in 0..W {
            shift[w] = simd.select_f32s(simd.equal_f32s(max[w], nothing), zero, max[w]);
            factor[w] = weight(simd, self.max[w], shift[w], scale);
        }
        for w in 0..W {
            // One vector after another: its constants and those of exp2 are as many as AVX2 has
            // registers.
            let mut sum = zero;
            operand.weigh(
                simd,
                scores,
                w,
                #[inline(always)]
                |score| {
                    let weight = weight(simd, score, shift[w], scale);
                    sum = simd.add_f32s(sum, weight);
                    weight
                },
            );
            self.sum[w] = simd.mul_add_e_f32s(self.sum[w], factor[w], sum);
        }
        *self.max = max;
        factor
    }
}

#[inline(always)]
fn weight<S: Simd>(simd: S, score: S::f32s, max: S::f32s, scale_log2: S::f32s) -> S::f32s {
    // Subtracted before it is scaled: exact where it counts, and never above 0 however large the
    // scores are.
    exp2(simd, simd.mul_f32s(simd.sub_f32s(score, max), scale_log2))
}

/// 2 to the power of `x ≤ 0`; 0 where that is under 2⁻¹²⁷ by more than half, 2⁰ is exactly 1, NaN
/// stays NaN. Relative error at most 8e-8 down to 2⁻¹²⁶.
///
/// `x` is split into an integer and a fraction in [−½, ½] by adding and taking away 1.5·2²³, which
/// rounds to an integer and leaves it in the low mantissa bits (Cody & Waite 1980). The fraction's
/// power is the minimax polynomial of degree 6 in relative error (Remez's exchange, 1.9e-9 before
/// the coefficients are rounded to f32). It is evaluated in pairs of terms (Estrin's scheme) but
/// for the constant term, which comes last: a shorter chain than Horner's, with the same last
/// rounding.
#[inline(always)]
pub(super) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const ROUNDER: f32 = 12_582_912.0;
    const COEFFICIENTS: [f32; 6] =
        [std::f32::consts::LN_2, 0.240_226_46, 0.055_503_286, 0.009_618_489, 0.001_339_993_1, 0.000_153_458_12];
    const ONE_BITS: u32 = 0x3f80_0000;

    // 2⁻¹²⁷ has the exponent bits of 0, and so has what is smaller after this.
    let x = at_least(simd, -127.0, x);
    let rounder = simd.splat_f32s(ROUNDER);
    let shifted = simd.add_f32s(x, rounder);
    let fraction = simd.sub_f32s(x, simd.sub_f32s(shifted, rounder));
    let square = simd.mul_f32s(fraction, fraction);
    let [c1, c2, c3, c4, c5, c6] = COEFFICIENTS;
    let (c1, c3, c5) = (simd.splat_f32s(c1), simd.splat_f32s(c3), simd.splat_f32s(c5));
    let low = simd.mul_add_e_f32s(simd.splat_f32s(c2), fraction, c1);
    let middle = simd.mul_add_e_f32s(simd.splat_f32s(c4), fraction, c3);
    let high = simd.mul_add_e_f32s(simd.splat_f32s(c6), fraction, c5);
    let slope = simd.mul_add_e_f32s(simd.mul_add_e_f32s(high, square, middle), square, low);
    let power = simd.mul_add_e_f32s(slope, fraction, simd.splat_f32s(1.0));
    // The integer goes to the exponent; ROUNDER's own bits fall out at the top.
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let scale = simd.transmute_f32s_u32s(simd.add_u32s(exponent, simd.splat_u32s(ONE_BITS)));
    // Multiplied, not added to the exponent bits, so that NaN stays NaN.
    simd.mul_f32s(power, scale)
}

/// The larger of both; NaN where `x` is NaN.
#[inline(always)]
fn at_least<S: Simd>(simd: S, least: f32, x: S::f32s) -> S::f32s {
    let least = simd.splat_f32s(least);
    if const { cfg!(target_arch = "x86_64") && S::F32_LANES > 1 } {
        // The instruction gives its second operand where one is NaN; elsewhere the rules differ.
        simd.max_f32s(least, x)
    } else {
        simd.select_f32s(simd.less_than_f32s(x, least), least, x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::cpu::isa::{RegisterTile, Vectorized};
    use crate::backends::cpu::processor::Processor;

    struct Exp2<'a>(&'a mut [f32]);

    impl Vectorized for Exp2<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: RegisterTile>(self, simd: S) {
            let (vectors, rest) = S::as_mut_simd_f32s(self.0);
            assert!(rest.is_empty());
            for x in vectors {
                *x = exp2(simd, *x);
            }
        }
    }

    fn exp2_of(processor: Processor, mut x: Vec<f32>) -> Vec<f32> {
        let count = x.len();
        x.resize(count.next_multiple_of(64), 0.0);
        processor.dispatch(Exp2(&mut x));
        x.truncate(count);
        x
    }

    #[test]
    fn exp2_is_within_one_part_in_ten_million() {
        let x: Vec<f32> = (0..4_000_000).map(|i| i as f32 * (-126.0 / 4_000_000.0)).collect();
        for processor in Processor::all() {
            let worst = x.iter().zip(exp2_of(processor, x.clone())).map(|(&x, got)| {
                let want = f64::from(x).exp2();
                ((f64::from(got) - want) / want).abs()
            });
            let worst = worst.fold(0.0, f64::max);
            assert!(worst < 1.2e-7, "{processor:?}: relative error {worst:e}");
        }
    }

    #[test]
    fn exp2_at_its_limits() {
        let odd_nan = f32::from_bits(0x7fc0_0001);
        let x =
            vec![0.0, -0.0, -1.0, -126.0, -126.501, -1e30, f32::MIN, f32::NEG_INFINITY, f32::NAN, odd_nan, -f32::NAN];
        for processor in Processor::all() {
            let got = exp2_of(processor, x.clone());
            assert_eq!(got[..8], [1.0, 1.0, 0.5, f32::MIN_POSITIVE, 0.0, 0.0, 0.0, 0.0], "{processor:?}");
            assert!(got[8..].iter().all(|value| value.is_nan()), "{processor:?}: {got:?}");
        }
    }
}
