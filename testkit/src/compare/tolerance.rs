//! The tolerance rules.

use super::error::{CompareError, check_len, place};
use super::value::Value;
use crate::precision::Precision;

/// How far a value may be from its reference: `atol + rtol · |reference|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// The share of the reference.
    pub rtol: f64,
    /// The part that does not depend on it.
    pub atol: f64,
}

impl Tolerance {
    /// The fixed tolerance of a working precision, for standard normal inputs.
    ///
    /// The 16-bit ones are weak on long sequences: over `n` keys the outputs themselves have a deviation near
    /// `sqrt(e / n)`, 0.025 at 4352 keys, which is half the atol of bf16. Check [`check_field_rule`] or
    /// [`check_relative`] as well.
    pub fn fixed(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self { rtol: 1e-4, atol: 1e-5 },
            Precision::F16 => Self { rtol: 5e-3, atol: 1e-2 },
            Precision::Bf16 => Self { rtol: 1e-2, atol: 5e-2 },
        }
    }
}

/// Limits of [`check_field_rule`] and [`check_relative`], which see an error that is small everywhere, as one missing key of
/// thousands. Both take the inputs for standard normal, and scores for moderate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yardsticks {
    /// Added to twice the error of a naive run, as a share of the largest reference.
    pub field: f64,
    /// Limit of `‖out − reference‖ / ‖reference‖`.
    pub relative: f64,
}

impl Yardsticks {
    /// Those of a kernel with f32 intermediates.
    ///
    /// Twice the rounding of the output is all that such a kernel adds; in f32 there is the device's own exponential, which
    /// Vulkan allows a few dozen units in the last place.
    pub fn standard(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self { field: 1e-5, relative: 2e-5 },
            Precision::F16 => Self { field: 2.0 * 2f64.powi(-11), relative: 2e-3 },
            Precision::Bf16 => Self { field: 2.0 * 2f64.powi(-8), relative: 1.5e-2 },
        }
    }
}

/// The error of a whole tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ErrorStats {
    /// The largest difference; NaN if any is.
    pub max_abs: f64,
    /// `‖out − reference‖ / ‖reference‖`; of an all-zero reference, 0 if the output is too, else infinite.
    pub rel: f64,
    /// The place of the largest difference, or of the first NaN: `[batch, seq, head, dim]`.
    pub worst: [usize; 4],
}

impl ErrorStats {
    /// Measures `out` against `reference`.
    ///
    /// # Errors
    /// [`CompareError::Length`] if one of them does not fit `shape`.
    pub fn measure<T: Value, R: Value>(
        case: &str,
        shape: [usize; 4],
        out: &[T],
        reference: &[R],
    ) -> Result<Self, CompareError> {
        check_len(case, "out", &shape, out.len())?;
        check_len(case, "reference", &shape, reference.len())?;
        let (mut max_abs, mut worst) = (0.0f64, 0);
        let (mut error, mut norm) = (0.0, 0.0);
        for (flat, (out, reference)) in out.iter().zip(reference).enumerate() {
            let difference = (out.widen() - reference.widen()).abs();
            error += difference * difference;
            norm += reference.widen() * reference.widen();
            // The first NaN stays: nothing exceeds it.
            if difference > max_abs || (difference.is_nan() && !max_abs.is_nan()) {
                (max_abs, worst) = (difference, flat);
            }
        }
        let rel = if error == 0.0 { 0.0 } else { (error / norm).sqrt() };
        let worst = if out.is_empty() { [0; 4] } else { place(shape, worst) };
        Ok(Self { max_abs, rel, worst })
    }
}

/// The fixed rule: every element within `atol + rtol · |reference|`.
///
/// # Errors
/// [`CompareError::NotClose`] at the element that exceeds its bound by most.
pub fn check_close<T: Value, R: Value>(
    case: &str,
    shape: [usize; 4],
    out: &[T],
    reference: &[R],
    tolerance: Tolerance,
) -> Result<ErrorStats, CompareError> {
    let stats = ErrorStats::measure(case, shape, out, reference)?;
    let bound = |reference: f64| tolerance.atol + tolerance.rtol * reference.abs();
    check_bounds(case, "fixed", shape, out, reference, bound)?;
    Ok(stats)
}

/// The field's rule: `max|out − reference| ≤ 2 · max|low_precision − reference| + atol`, where `low_precision` is a
/// naive run in the working precision.
///
/// # Errors
/// [`CompareError::NotClose`] at the element that exceeds the bound by most; [`CompareError::NotFinite`] if
/// `low_precision` or `reference` is not finite, since the bound would then hold for anything.
pub fn check_field_rule<T: Value, R: Value>(
    case: &str,
    shape: [usize; 4],
    out: &[T],
    low_precision: &[f32],
    reference: &[R],
    atol: f64,
) -> Result<ErrorStats, CompareError> {
    let stats = ErrorStats::measure(case, shape, out, reference)?;
    check_len(case, "low_precision", &shape, low_precision.len())?;
    check_finite(case, "reference", shape, reference)?;
    check_finite(case, "low_precision", shape, low_precision)?;
    let yardstick = ErrorStats::measure(case, shape, low_precision, reference)?;
    let bound = 2.0 * yardstick.max_abs + atol;
    check_bounds(case, "field's", shape, out, reference, |_| bound)?;
    Ok(stats)
}

/// The whole tensor's rule: `‖out − reference‖ ≤ bound · ‖reference‖`. It catches an error that is small everywhere.
///
/// # Errors
/// [`CompareError::Relative`] with the place of the largest difference.
pub fn check_relative<T: Value, R: Value>(
    case: &str,
    shape: [usize; 4],
    out: &[T],
    reference: &[R],
    bound: f64,
) -> Result<ErrorStats, CompareError> {
    let stats = ErrorStats::measure(case, shape, out, reference)?;
    if stats.rel <= bound {
        return Ok(stats);
    }
    Err(CompareError::Relative { case: case.to_owned(), at: stats.worst, got: stats.rel, bound })
}

fn check_finite<R: Value>(
    case: &str,
    argument: &'static str,
    shape: [usize; 4],
    values: &[R],
) -> Result<(), CompareError> {
    match values.iter().position(|value| !value.widen().is_finite()) {
        None => Ok(()),
        Some(flat) => Err(CompareError::NotFinite {
            case: case.to_owned(),
            argument,
            at: place(shape, flat),
            got: values[flat].widen(),
        }),
    }
}

/// Checks every element against a bound that may depend on its reference. Lengths were checked before.
fn check_bounds<T: Value, R: Value>(
    case: &str,
    rule: &'static str,
    shape: [usize; 4],
    out: &[T],
    reference: &[R],
    bound: impl Fn(f64) -> f64,
) -> Result<(), CompareError> {
    let mut failing = 0;
    let mut worst: Option<(f64, usize)> = None;
    for (flat, (value, expected)) in out.iter().zip(reference).enumerate() {
        let expected = expected.widen();
        let (difference, bound) = ((value.widen() - expected).abs(), bound(expected));
        // An infinite reference would have an infinite bound, which anything is within.
        if difference <= bound && expected.is_finite() {
            continue;
        }
        failing += 1;
        // NaN, or an infinity less another, is the worst there is.
        let excess = Some(difference - bound).filter(|excess| !excess.is_nan()).unwrap_or(f64::INFINITY);
        if worst.is_none_or(|(most, _)| excess > most) {
            worst = Some((excess, flat));
        }
    }
    let Some((_, flat)) = worst else { return Ok(()) };
    let (got, reference) = (out[flat].widen(), reference[flat].widen());
    let (at, bound, total) = (place(shape, flat), bound(reference), out.len());
    Err(CompareError::NotClose { case: case.to_owned(), rule, at, got, reference, bound, failing, total })
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    const SHAPE: [usize; 4] = [1, 2, 1, 2];
    const TIGHT: Tolerance = Tolerance { rtol: 0.0, atol: 0.25 };

    #[test]
    fn the_bound_is_inclusive_and_grows_with_the_reference() {
        let reference = [1.0f64, -2.0, 4.0, 0.0];
        let tolerance = Tolerance { rtol: 0.5, atol: 0.25 };
        let stats = check_close("case", SHAPE, &[1.75f32, -0.75, 6.25, 0.25], &reference, tolerance).unwrap();
        assert_eq!((stats.max_abs, stats.worst), (2.25, [0, 1, 0, 0]));
        let error = check_close("case", SHAPE, &[1.75f32, -0.75, 6.25, 0.375], &reference, tolerance).unwrap_err();
        assert_eq!(
            error.to_string(),
            "case: at [0, 1, 0, 1]: expected 0e0 within 2.5e-1, got 3.75e-1 (1 of 4 elements fail the fixed rule)"
        );
    }

    #[test]
    fn the_worst_element_is_named_and_all_are_counted() {
        let error = check_close("case", SHAPE, &[1f32, 0.0, 3.0, 2.0], &[0f32; 4], TIGHT).unwrap_err();
        assert!(matches!(error, CompareError::NotClose { at: [0, 1, 0, 0], got: 3.0, failing: 3, total: 4, .. }));
    }

    #[test]
    fn nan_passes_no_rule() {
        let (nan, loose) = (f32::NAN, Tolerance { rtol: f64::INFINITY, atol: f64::INFINITY });
        let (clean, dirty) = ([1f32; 4], [1.0, nan, 1.0, 9.0]);
        for (out, reference) in [(dirty, clean), (clean, dirty), (dirty, dirty)] {
            let error = check_close("case", SHAPE, &out, &reference, loose).unwrap_err();
            assert!(matches!(error, CompareError::NotClose { at: [0, 0, 0, 1], .. }), "{error}");
            assert!(check_relative("case", SHAPE, &out, &reference, f64::INFINITY).is_err());
            assert!(check_field_rule("case", SHAPE, &out, &clean, &reference, f64::INFINITY).is_err());
            let stats = ErrorStats::measure("case", SHAPE, &out, &reference).unwrap();
            assert!(stats.max_abs.is_nan() && stats.rel.is_nan());
            assert_eq!(stats.worst, [0, 0, 0, 1]);
        }
        assert!(check_field_rule("case", SHAPE, &clean, &dirty, &clean, 1.0).is_err());
    }

    #[test]
    fn infinities_pass_no_rule() {
        let infinite = [f32::INFINITY, 1.0, 1.0, 1.0];
        for out in [infinite, [1.0; 4]] {
            assert!(check_close("case", SHAPE, &out, &infinite, Tolerance::fixed(Precision::Bf16)).is_err());
            assert!(check_relative("case", SHAPE, &out, &infinite, 1.0).is_err());
        }
        assert!(check_close("case", SHAPE, &infinite, &[1f32; 4], Tolerance::fixed(Precision::Bf16)).is_err());
        let error = check_field_rule("case", SHAPE, &[5f32; 4], &infinite, &[1f32; 4], 0.0).unwrap_err();
        assert!(matches!(error, CompareError::NotFinite { argument: "low_precision", at: [0, 0, 0, 0], .. }));
    }

    #[test]
    fn the_fields_rule_allows_twice_the_naive_error() {
        let reference = [1f64; 4];
        let low = [1.0f32, 1.125, 1.0, 1.0];
        let rule = |worst: f32, atol| check_field_rule("case", SHAPE, &[1.0, 1.0, worst, 1.0], &low, &reference, atol);
        assert!(rule(1.25, 0.0).is_ok());
        assert!(rule(0.75, 0.0).is_ok());
        assert!(rule(1.375, 0.125).is_ok());
        let error = rule(1.3125, 0.0).unwrap_err();
        assert!(matches!(error, CompareError::NotClose { rule: "field's", at: [0, 1, 0, 0], bound: 0.25, .. }));
    }

    #[test]
    fn the_relative_rule_sees_small_errors_everywhere() {
        let (reference, out) = ([0.01f32; 4], [0.0f32; 4]);
        assert!(check_close("case", SHAPE, &out, &reference, Tolerance::fixed(Precision::Bf16)).is_ok());
        let error = check_relative("case", SHAPE, &out, &reference, 0.5).unwrap_err();
        assert!(matches!(error, CompareError::Relative { got, .. } if (got - 1.0).abs() < 1e-9), "{error}");
        let stats = check_relative("case", SHAPE, &[3f32, 4.0, 0.0, 0.0], &[0f32, 4.0, 0.0, 0.0], 1.0).unwrap();
        assert_eq!(stats.rel, 0.75);
        assert_eq!(check_relative("case", SHAPE, &out, &[0f32; 4], 0.0).unwrap().rel, 0.0);
        assert!(check_relative("case", SHAPE, &[1f32, 0.0, 0.0, 0.0], &[0f32; 4], 1e9).is_err());
    }

    #[test]
    fn lengths_must_fit_the_shape() {
        let error = check_close("case", SHAPE, &[f16::ONE; 3], &[1f64; 4], TIGHT).unwrap_err();
        assert_eq!(error.to_string(), "case: out: expected 4 elements, got 3");
        assert!(check_close("case", SHAPE, &[1f32; 4], &[1f64; 5], TIGHT).is_err());
        assert!(check_field_rule("case", SHAPE, &[1f32; 4], &[1f32; 3], &[1f64; 4], 0.0).is_err());
        let empty = check_close::<f32, f64>("case", [1, 0, 1, 2], &[], &[], TIGHT).unwrap();
        assert_eq!(empty, ErrorStats { max_abs: 0.0, rel: 0.0, worst: [0; 4] });
    }
}
