//! The paths: the ways in which a call is computed.

use std::fmt;

/// How a call is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Path {
    /// Every query against every key of the padded tensors, masked keys dropped from the softmax.
    Dense,
    /// One pass over the padded tensors that skips what is masked and writes the padded, zero-filled output.
    Fused,
    /// Pack, varlen attention on the packed rows, scatter with zeros.
    Packed,
    /// Zeros only: no query or no key is valid.
    Zero,
}

impl Path {
    /// The path's name: `dense`, `fused`, `packed` or `zero`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Fused => "fused",
            Self::Packed => "packed",
            Self::Zero => "zero",
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
