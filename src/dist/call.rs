//! What a call says beside its tensors: [`ParallelCall`].

use super::digest::{Digest, Tag};
use super::needs::ParallelNeeds;
use super::request::ParallelRequest;
use super::scores::OnScores;
use crate::call::problem::broadcast_bias;
use crate::error::Result;
use crate::score_modifiers::ScoreModifiers;
use crate::tensor::TensorView;

/// A request, and what one call does to the scores beside: a bias, or [`ScoreModifiers`]. A request alone converts to it. All ranks
/// give the same; modes that cannot compute it are refused, with the reason: `docs/sequence-parallel.md` says which can.
#[derive(Debug, Clone, Copy)]
pub struct ParallelCall<'a> {
    pub(super) request: &'a ParallelRequest,
    bias: Option<TensorView<'a>>,
    modifiers: Option<&'a ScoreModifiers>,
}

impl<'a> From<&'a ParallelRequest> for ParallelCall<'a> {
    fn from(request: &'a ParallelRequest) -> Self {
        Self { request, bias: None, modifiers: None }
    }
}

impl ParallelRequest {
    /// The same with a bias that one call adds to the scores: see [`ParallelCall::with_bias`].
    pub fn with_bias<'a>(&'a self, bias: impl Into<TensorView<'a>>) -> ParallelCall<'a> {
        ParallelCall::from(self).with_bias(bias)
    }

    /// The same with what else one call does to the scores: see [`ParallelCall::with_modifiers`].
    #[must_use]
    pub fn with_modifiers<'a>(&'a self, modifiers: &'a ScoreModifiers) -> ParallelCall<'a> {
        ParallelCall::from(self).with_modifiers(modifiers)
    }
}

impl<'a> ParallelCall<'a> {
    /// A floating-point tensor that is added to the scaled scores of the *whole* sequence, broadcast over `[B, H, S, S]`: the one that
    /// one device would be given, on every rank. Each reads the rows of its queries, or its heads. Of the tensors' element type or f32.
    #[must_use]
    pub fn with_bias(self, bias: impl Into<TensorView<'a>>) -> Self {
        Self { bias: Some(bias.into()), ..self }
    }

    /// A soft cap, ALiBi, sinks: of all H heads, on every rank. Positions are those of the whole sequence.
    #[must_use]
    pub fn with_modifiers(self, modifiers: &'a ScoreModifiers) -> Self {
        Self { modifiers: Some(modifiers), ..self }
    }

    /// What is done to the scores, checked against the request; and the tag of the call's exchanges.
    pub(super) fn on_scores(&self, has_lse: bool) -> Result<(OnScores<'a>, Tag)> {
        let Self { request, bias, modifiers } = *self;
        let (heads, meta) = (request.heads(), request.meta());
        let modifiers = modifiers.filter(|modifiers| !modifiers.set().is_empty());
        if bias.is_none() && modifiers.is_none() && !has_lse {
            return Ok((OnScores { bias: None, modifiers: None }, request.tag));
        }
        let (seq, ranks) = (meta.shards().seq(), meta.shards().ranks());
        let shape = [meta.batch(), heads.num_heads, seq, seq];
        let set = modifiers.map(ScoreModifiers::set).unwrap_or_default();
        let needs = ParallelNeeds { bias: bias.is_some(), modifiers: set, lse: has_lse };
        needs.check(request.plan().mode, ranks)?;
        let mut digest = needs.digest(Digest::new().bytes(&request.tag));
        if let Some(view) = &bias {
            broadcast_bias(&view.info(), shape)?;
            digest = digest.sizes(view.shape().iter().copied()).bytes(view.dtype().name().as_bytes());
        }
        if let Some(modifiers) = modifiers {
            modifiers.check(heads.num_heads)?;
            let values = modifiers.alibi().into_iter().chain(modifiers.sinks()).flatten();
            digest = digest.bytes(&modifiers.softcap().to_bits().to_le_bytes());
            digest = values.fold(digest, |digest, value| digest.bytes(&value.to_bits().to_le_bytes()));
        }
        let broadcast = |view: TensorView<'a>| Ok(view.with_layout(broadcast_bias(&view.info(), shape)?));
        Ok((OnScores { bias: bias.map(broadcast).transpose()?, modifiers }, digest.tag()))
    }
}
