//! What the launches of every attention kernel share: placed tensors, packed rows, the scale.

use std::f32::consts::LOG2_E;

use crate::backends::cuda::tensors::metadata::Tables;
use crate::backends::cuda::tensors::placement::Placed;
use crate::mask::meta::CuSeqlens;

/// Placed tensors of one launch.
#[derive(Debug, Clone, Copy)]
pub struct Tensors {
    pub q: Placed,
    pub k: Placed,
    pub v: Placed,
    pub out: Placed,
}

/// Where packed rows lie. A side without `cu_seqlens` is padded, with a batch row for each
/// sequence.
#[derive(Debug, Clone, Copy, Default)]
pub struct PackedRows<'a> {
    pub cu_seqlens_q: Option<u64>,
    pub cu_seqlens_k: Option<u64>,
    /// Address of the sequences' order, the longest first.
    pub batch_order: Option<u64>,
    /// Number of sequences.
    pub batch: usize,
    /// Rows of all sequences, or an upper bound.
    pub queries: usize,
    pub keys: usize,
    /// Rows of the longest query sequence, or an upper bound.
    pub max_queries: usize,
    /// Lengths of the sequences, queries and keys, where the host knows them.
    pub lengths: Option<[&'a CuSeqlens; 2]>,
    /// Address of `[H, total_q]` f32, and elements from head to head.
    pub lse: Option<(u64, i64)>,
    /// The queries' tables if the output is padded: the kernel scatters its rows and writes zeros
    /// to the others.
    pub scatters: Option<Tables>,
}

/// `softmax_scale` · log2(e). Kernels multiply scores that already hold −∞ where they are masked,
/// and 0 · −∞ is NaN. So 0 becomes a scale so small that every score vanishes in the exponential.
pub fn score_scale(softmax_scale: f32) -> f32 {
    let scale = softmax_scale * LOG2_E;
    if scale == 0.0 { f32::MIN_POSITIVE } else { scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_scale_is_zero() {
        assert_eq!(score_scale(1.0), LOG2_E);
        assert_eq!(score_scale(-0.25), -0.25 * LOG2_E);
        assert_eq!(score_scale(0.0), f32::MIN_POSITIVE);
        assert_eq!(score_scale(-0.0), f32::MIN_POSITIVE);
    }
}
