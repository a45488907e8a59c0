//! Exact comparisons: bit patterns, so that -0.0 is not +0.0 and a NaN equals itself.

use super::error::{CompareError, check_len, place};
use super::value::Value;

/// Checks that every element is +0.0.
///
/// # Errors
/// [`CompareError::NotZero`] at the first one that is not.
pub fn check_exact_zero<T: Value>(case: &str, shape: [usize; 4], out: &[T]) -> Result<(), CompareError> {
    check_len(case, "out", &shape, out.len())?;
    first_nonzero(case, shape, out, |_| true)
}

/// Checks that every element of a row which `keep` (`[batch, seq]`) drops is +0.0; kept rows may hold anything.
///
/// # Errors
/// [`CompareError::NotZero`] at the first one that is not.
pub fn check_masked_rows_zero<T: Value>(
    case: &str,
    shape: [usize; 4],
    out: &[T],
    keep: &[bool],
) -> Result<(), CompareError> {
    check_len(case, "out", &shape, out.len())?;
    check_len(case, "keep", &shape[..2], keep.len())?;
    first_nonzero(case, shape, out, |flat| !keep[flat / (shape[2] * shape[3])])
}

/// Checks that two tensors are the same, bit for bit.
///
/// # Errors
/// [`CompareError::BitsDiffer`] at the first place where they are not.
pub fn check_bits_equal<T: Value>(
    case: &str,
    shape: [usize; 4],
    out: &[T],
    expected: &[T],
) -> Result<(), CompareError> {
    check_len(case, "out", &shape, out.len())?;
    check_len(case, "expected", &shape, expected.len())?;
    let differs = |&flat: &usize| out[flat].bits() != expected[flat].bits();
    let mut differing = (0..out.len()).filter(differs);
    match differing.next() {
        None => Ok(()),
        Some(flat) => Err(CompareError::BitsDiffer {
            case: case.to_owned(),
            at: place(shape, flat),
            expected: expected[flat].bits(),
            got: out[flat].bits(),
            failing: 1 + differing.count(),
        }),
    }
}

fn first_nonzero<T: Value>(
    case: &str,
    shape: [usize; 4],
    out: &[T],
    checked: impl Fn(usize) -> bool,
) -> Result<(), CompareError> {
    let mut nonzero = (0..out.len()).filter(|&flat| out[flat].bits() != 0 && checked(flat));
    match nonzero.next() {
        None => Ok(()),
        Some(flat) => Err(CompareError::NotZero {
            case: case.to_owned(),
            at: place(shape, flat),
            got: out[flat].widen(),
            bits: out[flat].bits(),
            failing: 1 + nonzero.count(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn only_positive_zero_is_zero() {
        let shape = [1, 2, 1, 2];
        assert_eq!(check_exact_zero("case", shape, &[f16::ZERO; 4]), Ok(()));
        let error = check_exact_zero("case", shape, &[0.0f32, 0.0, -0.0, f32::NAN]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "case: at [0, 1, 0, 0]: expected +0.0 (bits 0), got -0e0 (bits 0x80000000); 2 such elements"
        );
        for bad in [bf16::NEG_ZERO, bf16::NAN, bf16::MIN_POSITIVE_SUBNORMAL] {
            let out = [bf16::ZERO, bf16::ZERO, bf16::ZERO, bad];
            assert!(check_exact_zero("case", shape, &out).is_err(), "{bad}");
        }
        assert!(check_exact_zero("case", shape, &[0.0f32; 3]).is_err());
    }

    #[test]
    fn masked_rows_alone_must_be_zero() {
        let (shape, keep) = ([2, 2, 1, 2], [true, false, false, true]);
        let mut out = [1.0f32, f32::NAN, 0.0, 0.0, 0.0, 0.0, -0.0, 2.0];
        assert_eq!(check_masked_rows_zero("case", shape, &out, &keep), Ok(()));
        out[5] = -0.0;
        let error = check_masked_rows_zero("case", shape, &out, &keep).unwrap_err();
        assert!(matches!(error, CompareError::NotZero { at: [1, 0, 0, 1], failing: 1, .. }), "{error:?}");
        let short = check_masked_rows_zero("case", shape, &out, &keep[..3]).unwrap_err();
        assert_eq!(short.to_string(), "case: keep: expected 4 elements, got 3");
    }

    #[test]
    fn bits_and_not_values_are_compared() {
        let shape = [1, 1, 1, 2];
        assert_eq!(check_bits_equal("case", shape, &[f32::NAN, 1.0], &[f32::NAN, 1.0]), Ok(()));
        let error = check_bits_equal("case", shape, &[1.0f32, 0.0], &[1.0, -0.0]).unwrap_err();
        assert_eq!(error.to_string(), "case: at [0, 0, 0, 1]: expected bits 0x80000000, got 0x0; 1 elements differ");
        assert!(check_bits_equal("case", shape, &[f16::ONE; 2], &[f16::ONE; 1]).is_err());
    }
}
