//! What can go wrong, as values.

use crate::layout;

/// The result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused or failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor is of a backend, a device or an element type that the call does not take.
    #[error("`{argument}`: expected {expected}, got {got}")]
    Tensor {
        /// Name of the argument.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// The library refused the call, or failed. Shapes of tensors are in burn's order, `[B, H, S, D]`.
    #[error(transparent)]
    Attention(varlen_fa::Error),
    /// burn's own runtime failed: a kernel that should have written a tensor, an allocation.
    #[error("burn's runtime: {0}")]
    Runtime(String),
}

impl From<varlen_fa::Error> for Error {
    fn from(mut error: varlen_fa::Error) -> Self {
        if let varlen_fa::Error::Shape { expected, got, .. } = &mut error {
            layout::swap_heads(expected);
            layout::swap_heads(got);
        }
        Self::Attention(error)
    }
}
