//! What a shader variant is chosen by.

use crate::dtype::DType;
use crate::score_modifiers::ModifierSet;

use super::super::params::{AttentionParams, CopyParams};
use super::bindings::{self, Binding};
use super::tiles::Algorithm;

/// Invocations of a workgroup of the shaders that move rows.
pub const INVOCATIONS: usize = 256;

/// One compute pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shader {
    Attention(AttentionShader),
    PackRows,
    ScatterRows,
    ZeroRows,
    AlignRows { element_bytes: usize },
}

/// A variant of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionShader {
    pub algorithm: Algorithm,
    pub dtype: DType,
    pub head_dim: usize,
    pub rows: AttentionRows,
    /// Whether each query has a range of keys.
    pub ranges: bool,
    /// What happens to the scores beside their scale and a bias.
    pub modifiers: ModifierSet,
}

/// Where tiles lie, and what is masked, added or written beside the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AttentionRows {
    /// Padded tensors, every query row.
    Dense { key_mask: bool, zero_rows: bool, bias: Option<DType> },
    /// Padded tensors, kept queries and keys by lists.
    Fused,
    /// Packed rows.
    Packed { lse: bool },
}

impl AttentionRows {
    pub fn has_key_mask(self) -> bool {
        matches!(self, Self::Dense { key_mask: true, .. })
    }

    pub fn has_lse(self) -> bool {
        matches!(self, Self::Packed { lse: true })
    }

    /// Element type of the bias.
    pub fn bias(self) -> Option<DType> {
        match self {
            Self::Dense { bias, .. } => bias,
            Self::Fused | Self::Packed { .. } => None,
        }
    }
}

impl Shader {
    /// Name of the entry point.
    pub fn entry_point(self) -> &'static str {
        match self {
            Self::Attention(_) => "attention",
            Self::PackRows => "pack_rows",
            Self::ScatterRows => "scatter_rows",
            Self::ZeroRows => "zero_rows",
            Self::AlignRows { .. } => "align_rows",
        }
    }

    /// Size of the parameters.
    pub const fn params_bytes(self) -> u32 {
        let bytes = match self {
            Self::Attention(_) => size_of::<AttentionParams>(),
            Self::PackRows | Self::ScatterRows | Self::ZeroRows | Self::AlignRows { .. } => size_of::<CopyParams>(),
        };
        bytes as u32
    }

    /// Whether a uniform buffer with values of heads follows the storage buffers.
    pub fn has_head_table(self) -> bool {
        matches!(self, Self::Attention(AttentionShader { modifiers, .. }) if !modifiers.is_empty())
    }

    pub fn bindings(self) -> &'static [Binding] {
        match self {
            Self::Attention(AttentionShader { rows: AttentionRows::Dense { .. }, .. }) => bindings::ATTENTION_DENSE,
            Self::Attention(AttentionShader { rows: AttentionRows::Fused, .. }) => bindings::ATTENTION_FUSED,
            Self::Attention(AttentionShader { rows: AttentionRows::Packed { .. }, .. }) => bindings::ATTENTION_PACKED,
            Self::PackRows => bindings::PACK_ROWS,
            Self::ScatterRows => bindings::SCATTER_ROWS,
            Self::ZeroRows => bindings::ZERO_ROWS,
            Self::AlignRows { .. } => bindings::ALIGN_ROWS,
        }
    }
}
