//! How a comparison fails.

/// The case, the place `[batch, seq, head, dim]`, what was expected and what came.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// A slice that does not fit the shape.
    #[error("{case}: {argument}: expected {expected} elements, got {got}")]
    Length {
        /// The case.
        case: String,
        /// The slice.
        argument: &'static str,
        /// The product of the shape.
        expected: usize,
        /// Its length.
        got: usize,
    },
    /// A value too far from its reference; the place is that of the worst one.
    #[error(
        "{case}: at {at:?}: expected {reference:e} within {bound:e}, got {got:e} ({failing} of {total} elements fail the \
         {rule} rule)"
    )]
    NotClose {
        /// The case.
        case: String,
        /// The rule.
        rule: &'static str,
        /// Where.
        at: [usize; 4],
        /// The value.
        got: f64,
        /// What it should have been near.
        reference: f64,
        /// How near.
        bound: f64,
        /// How many elements fail.
        failing: usize,
        /// How many there are.
        total: usize,
    },
    /// An error, over the whole tensor, that is too large; the place is that of the largest difference.
    #[error("{case}: expected a relative error of at most {bound:e}, got {got:e} (largest difference at {at:?})")]
    Relative {
        /// The case.
        case: String,
        /// Where the largest difference is.
        at: [usize; 4],
        /// The relative error.
        got: f64,
        /// Its limit.
        bound: f64,
    },
    /// A reference that holds NaN or an infinity, so that nothing can be near it.
    #[error("{case}: {argument} at {at:?}: expected a finite value to compare with, got {got}")]
    NotFinite {
        /// The case.
        case: String,
        /// `reference` or `low_precision`.
        argument: &'static str,
        /// Where.
        at: [usize; 4],
        /// The value.
        got: f64,
    },
    /// A value that is not +0.0; the place is that of the first one.
    #[error("{case}: at {at:?}: expected +0.0 (bits 0), got {got:e} (bits {bits:#x}); {failing} such elements")]
    NotZero {
        /// The case.
        case: String,
        /// Where.
        at: [usize; 4],
        /// The value.
        got: f64,
        /// Its bit pattern.
        bits: u64,
        /// How many elements fail.
        failing: usize,
    },
    /// Two values whose bits differ; the place is that of the first ones.
    #[error("{case}: at {at:?}: expected bits {expected:#x}, got {got:#x}; {failing} elements differ")]
    BitsDiffer {
        /// The case.
        case: String,
        /// Where.
        at: [usize; 4],
        /// The bits wanted.
        expected: u64,
        /// The bits that came.
        got: u64,
        /// How many elements differ.
        failing: usize,
    },
}

/// Checks that a slice holds one value for each place of `shape`.
pub(super) fn check_len(case: &str, argument: &'static str, shape: &[usize], got: usize) -> Result<(), CompareError> {
    let expected = shape.iter().fold(1usize, |product, &extent| product.saturating_mul(extent));
    if got == expected { Ok(()) } else { Err(CompareError::Length { case: case.to_owned(), argument, expected, got }) }
}

/// The place of the `flat`-th element of a shape without zero extents.
pub(super) fn place([_, seq, heads, dim]: [usize; 4], flat: usize) -> [usize; 4] {
    [flat / dim / heads / seq, flat / dim / heads % seq, flat / dim % heads, flat % dim]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_run_from_the_last_dimension() {
        let shape = [2, 3, 4, 5];
        assert_eq!(place(shape, 0), [0, 0, 0, 0]);
        assert_eq!(place(shape, ((3 + 2) * 4 + 3) * 5 + 4), [1, 2, 3, 4]);
        assert_eq!(place(shape, 5), [0, 0, 1, 0]);
    }
}
