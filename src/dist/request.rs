//! What is prepared once a request: [`ParallelRequest`].

use super::digest::Tag;
use super::gather::Gather;
use super::kept::Kept;
use super::local::Lengths;
use super::mode::Heads;
use super::plan::ParallelPlan;
use super::ring::Ring;
use super::sharded_meta::ShardedMeta;
use super::ulysses::Group;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Segments;

/// What [`SequenceParallel::prepare`](super::SequenceParallel::prepare) makes of a request: the mode, metadata for its steps, and the memory that they need, which
/// [calls keep](Self::kept_bytes) for one another.
#[derive(Debug)]
pub struct ParallelRequest {
    pub(super) plan: ParallelPlan,
    pub(super) heads: Heads,
    pub(super) meta: ShardedMeta,
    pub(super) tag: Tag,
    /// None for groups of one rank.
    pub(super) group: Option<Group>,
    pub(super) among_groups: AmongGroups,
    /// Tokens of a group's tensors.
    pub(super) group_lengths: Lengths,
    pub(super) kept: Kept,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one of it in each request")]
pub(super) enum AmongGroups {
    Gather(Gather),
    Ring(Ring),
}

impl ParallelRequest {
    /// The mode, and why it was chosen.
    #[must_use]
    pub fn plan(&self) -> &ParallelPlan {
        &self.plan
    }

    /// The request's metadata.
    #[must_use]
    pub fn meta(&self) -> &ShardedMeta {
        &self.meta
    }

    /// Its heads.
    #[must_use]
    pub fn heads(&self) -> &Heads {
        &self.heads
    }

    /// Bytes of the device's memory that calls of the request use again: what they send and receive, and partial results. The first
    /// call takes them; none before it. A CUDA graph that calls are captured into uses them too.
    #[must_use]
    pub fn kept_bytes(&self) -> u64 {
        self.kept.bytes()
    }

    /// Gives that memory back, until the next call. Calls that are under way keep theirs; graphs that calls were captured into must
    /// not run afterwards, nor after the request is dropped.
    pub fn release_memory(&self) {
        self.kept.clear();
    }

    /// Whether all ranks are one group.
    pub(super) fn is_one_group(&self) -> bool {
        let ranks = self.meta.shards().ranks();
        self.plan.mode.levels(ranks).0 == ranks
    }

    /// Tokens of the rank's tensors.
    pub(super) fn lengths(&self) -> Lengths {
        let shards = self.meta.shards();
        [shards.prefix(), shards.shard(self.meta.rank()).len(), shards.suffix()]
    }

    /// Checks the segments of a rank's tensor of so many heads, by their shapes and element types.
    pub(super) fn expect_segments<'s>(
        &self,
        (argument, heads): (&'static str, usize),
        segments: impl ExactSizeIterator<Item = (&'s [usize], DType)>,
    ) -> Result<()> {
        let (expected, count) = (self.local_shape(heads), segments.len());
        if !(1..=Segments::MAX).contains(&count) {
            return Err(Error::SegmentCount { argument, limit: Segments::MAX, got: count });
        }
        let refuse = |got: &[usize]| Err(Error::Shape { argument, expected: expected.to_vec(), got: got.to_vec() });
        let [batch, seq, heads, dim] = expected;
        let mut tokens = 0_usize;
        for (shape, dtype) in segments {
            match *shape {
                [of_batch, of_seq, of_heads, of_dim] if [of_batch, of_heads, of_dim] == [batch, heads, dim] => {
                    tokens = tokens.saturating_add(of_seq);
                }
                _ => return refuse(shape),
            }
            if dtype != self.heads.dtype {
                return Err(Error::DTypeMismatch { argument, expected: self.heads.dtype, got: dtype });
            }
        }
        if tokens == seq { Ok(()) } else { refuse(&[batch, tokens, heads, dim]) }
    }

    /// `[B, prefix + shard + suffix, H, D]` with so many heads.
    pub(super) fn local_shape(&self, heads: usize) -> [usize; 4] {
        [self.meta.batch(), self.meta.query().seq(), heads, self.heads.head_dim]
    }
}
