//! The soft cap on scores: `cap · tanh(score / cap)`.

use pulp::Simd;

use super::softmax::exp2;

/// A cap, and what scores of `q·k` are multiplied by before the hyperbolic tangent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Softcap {
    pub cap: f32,
    /// Positive.
    pub factor: f32,
}

/// The capped score: ±`cap` for ±∞, NaN for NaN.
#[inline(always)]
pub(super) fn capped<S: Simd>(simd: S, score: S::f32s, Softcap { cap, factor }: Softcap) -> S::f32s {
    simd.mul_f32s(simd.splat_f32s(cap), tanh(simd, simd.mul_f32s(score, simd.splat_f32s(factor))))
}

/// The hyperbolic tangent, with a relative error of at most 3e-7.
///
/// Near 0 it is `x + x³·P(x²)`, where P interpolates at Chebyshev's nodes; the quotient of
/// exponentials would cancel there.
#[inline(always)]
fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const NEAR: f32 = 0.55;
    const COEFFICIENTS: [f32; 5] = [-0.333_333_3, 0.133_331_13, -0.053_909_43, 0.021_309_39, -0.006_610_228];

    let one = simd.splat_f32s(1.0);
    let magnitude = simd.abs_f32s(x);
    let power = exp2(simd, simd.mul_f32s(magnitude, simd.splat_f32s(-2.0 * std::f32::consts::LOG2_E)));
    let far = simd.div_f32s(simd.sub_f32s(one, power), simd.add_f32s(one, power));
    let square = simd.mul_f32s(x, x);
    let [c0, c1, c2, c3, c4] = COEFFICIENTS.map(|coefficient| simd.splat_f32s(coefficient));
    let high = simd.mul_add_e_f32s(simd.mul_add_e_f32s(c4, square, c3), square, c2);
    let all = simd.mul_add_e_f32s(simd.mul_add_e_f32s(high, square, c1), square, c0);
    let near = simd.mul_add_e_f32s(simd.mul_f32s(all, square), magnitude, magnitude);
    // By a comparison that is false for NaN, which `far` keeps.
    let value = simd.select_f32s(simd.less_than_f32s(magnitude, simd.splat_f32s(NEAR)), near, far);
    let sign = simd.and_u32s(simd.transmute_u32s_f32s(x), simd.splat_u32s(1 << 31));
    simd.transmute_f32s_u32s(simd.or_u32s(simd.transmute_u32s_f32s(value), sign))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backends::cpu::isa::{RegisterTile, Vectorized};
    use crate::backends::cpu::processor::Processor;

    struct Tanh<'a>(&'a mut [f32]);

    impl Vectorized for Tanh<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: RegisterTile>(self, simd: S) {
            let (vectors, rest) = S::as_mut_simd_f32s(self.0);
            assert!(rest.is_empty());
            for x in vectors {
                *x = tanh(simd, *x);
            }
        }
    }

    #[test]
    fn tanh_is_within_three_parts_in_ten_million() {
        let x: Vec<f32> = (1..=1 << 20).flat_map(|i| [1, -1].map(|sign| (i * sign) as f32 / 100_000.0)).collect();
        for processor in Processor::all() {
            let mut got = x.clone();
            processor.dispatch(Tanh(&mut got));
            for (&x, got) in x.iter().zip(got) {
                let want = f64::from(x).tanh();
                assert!(((f64::from(got) - want) / want).abs() < 3e-7, "{processor:?}: tanh({x}) is {want}, got {got}");
            }
        }
    }

    #[test]
    fn tanh_at_its_limits() {
        for processor in Processor::all() {
            let mut x = vec![0.0; 64];
            x[..6].copy_from_slice(&[f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-30, f32::NAN]);
            processor.dispatch(Tanh(&mut x));
            assert_eq!(x[..5], [1.0, -1.0, 1.0, -1.0, 1e-30], "{processor:?}");
            assert!(x[5].is_nan() && x[6] == 0.0, "{processor:?}");
        }
    }
}
