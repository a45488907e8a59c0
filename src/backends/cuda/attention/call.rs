//! What the launches of every attention kernel share: placed tensors, packed rows, the scale.

use crate::backends::cuda::tensors::key_ranges::PlacedRanges;
use crate::backends::cuda::tensors::lse::PlacedLse;
use crate::backends::cuda::tensors::metadata::Tables;
use crate::backends::cuda::tensors::placement::Placed;
use crate::backends::cuda::tensors::segments::Pieces;
use crate::call::problem::AttentionProblem;
use crate::mask::cu_seqlens::CuSeqlens;

/// Placed tensors of one launch.
#[derive(Debug, Clone, Copy)]
pub struct Tensors {
    pub q: Placed,
    pub k: Placed,
    pub v: Placed,
    pub out: Placed,
    /// Where the log-sum-exp goes, if it is wanted.
    pub lse: Option<PlacedLse>,
}

/// The same of tensors in segments.
#[derive(Debug)]
pub struct SegmentedTensors {
    /// q and the output.
    pub queries: Pieces,
    /// k and v.
    pub keys: Pieces,
    pub lse: Option<PlacedLse>,
}

/// Where packed rows lie. A side without `cu_seqlens` is padded, with a batch row for each
/// sequence.
#[derive(Debug, Clone, Default)]
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
    /// Which keys each query sees; only for kernels that take ranges.
    pub ranges: Option<PlacedRanges>,
    /// The queries' tables if the output is padded: the kernel scatters its rows and writes zeros
    /// to the others.
    pub scatters: Option<Tables>,
}

/// [`AttentionProblem::score_scale`], not 0. Kernels multiply scores that already hold −∞ where they
/// are masked, and 0 · −∞ is NaN. So 0 becomes a scale so small that every score vanishes in the
/// exponential.
pub fn score_scale(problem: &AttentionProblem) -> f32 {
    let scale = problem.score_scale();
    if scale == 0.0 { f32::MIN_POSITIVE } else { scale }
}

#[cfg(test)]
mod tests {
    use std::f32::consts::LOG2_E;

    use super::*;
    use crate::call::problem::AttentionShape;
    use crate::call::segments::Cuts;
    use crate::dtype::DType;

    #[test]
    fn a_scale_is_finite_and_not_zero() {
        let shape = AttentionShape { batch: 1, seq_q: 1, seq_k: 1, num_heads: 1, num_kv_heads: 1, head_dim: 8 };
        let score_scale = |softmax_scale| {
            score_scale(&AttentionProblem {
                shape,
                dtype: DType::F16,
                softmax_scale,
                bias: None,
                cuts: Cuts::None,
                lse: false,
            })
        };
        assert_eq!(score_scale(1.0), LOG2_E);
        assert_eq!(score_scale(-0.25), -0.25 * LOG2_E);
        assert_eq!(score_scale(0.0), f32::MIN_POSITIVE);
        assert_eq!(score_scale(-0.0), f32::MIN_POSITIVE);
        assert_eq!(score_scale(2.4e38), f32::MAX);
        assert_eq!(score_scale(f32::MIN), f32::MIN);
    }
}
