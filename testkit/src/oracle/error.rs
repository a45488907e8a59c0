//! What an oracle refuses.

/// A problem that the oracle cannot answer: the argument, what was expected and what came.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OracleError {
    /// A slice that does not fit the extents.
    #[error("{argument}: expected {expected} elements ({shape:?}), got {got}")]
    Length {
        /// The slice.
        argument: &'static str,
        /// The product of `shape`.
        expected: usize,
        /// The extents it should have.
        shape: Vec<usize>,
        /// Its length.
        got: usize,
    },
    /// Extents whose product does not fit a `usize`.
    #[error("{argument}: expected fewer elements than {max}, got the extents {shape:?}", max = usize::MAX)]
    TooLarge {
        /// The slice they describe.
        argument: &'static str,
        /// The extents.
        shape: Vec<usize>,
    },
    /// An extent of zero where there must be something.
    #[error("{argument}: expected at least 1, got 0")]
    Zero {
        /// The extent.
        argument: &'static str,
    },
    /// Query heads that do not fall into equal groups.
    #[error("kv_heads: expected a divisor of heads = {heads}, got {kv_heads}")]
    Heads {
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: usize,
    },
    /// A scale that is NaN or infinite.
    #[error("softmax_scale: expected a finite number, got {got}")]
    Scale {
        /// The scale given.
        got: f64,
    },
    /// A row outside the output.
    #[error("{argument}: expected less than {limit}, got {got}")]
    RowOutOfRange {
        /// Which index of the row.
        argument: &'static str,
        /// The extent it indexes.
        limit: usize,
        /// The index.
        got: usize,
    },
    /// Cumulative lengths that do not start at 0, decrease, or differ in their count.
    #[error("{argument}: expected {expected}, got {got}")]
    CuSeqlens {
        /// `cu_seqlens_q` or `cu_seqlens_k`.
        argument: &'static str,
        /// What would do.
        expected: String,
        /// What came.
        got: String,
    },
}

pub(super) fn check_len(argument: &'static str, shape: &[usize], got: usize) -> Result<(), OracleError> {
    let Some(expected) = shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent)) else {
        return Err(OracleError::TooLarge { argument, shape: shape.to_vec() });
    };
    if got == expected { Ok(()) } else { Err(OracleError::Length { argument, expected, shape: shape.to_vec(), got }) }
}

pub(super) fn check_positive(argument: &'static str, got: usize) -> Result<(), OracleError> {
    if got == 0 { Err(OracleError::Zero { argument }) } else { Ok(()) }
}

pub(super) fn check_heads(heads: usize, kv_heads: usize) -> Result<(), OracleError> {
    check_positive("heads", heads)?;
    check_positive("kv_heads", kv_heads)?;
    if heads.is_multiple_of(kv_heads) { Ok(()) } else { Err(OracleError::Heads { heads, kv_heads }) }
}

pub(super) fn check_scale(got: f64) -> Result<(), OracleError> {
    if got.is_finite() { Ok(()) } else { Err(OracleError::Scale { got }) }
}
