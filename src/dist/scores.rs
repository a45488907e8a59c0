//! What a call does to the scores, as steps take it: of some heads and queries.

use std::ops::Range;

use crate::attention_mask::AttentionMask;
use crate::error::Result;
use crate::score_modifiers::ScoreModifiers;
use crate::tensor::TensorView;

/// What is done to the scores of the whole sequence and all heads.
#[derive(Debug, Clone, Copy)]
pub(super) struct OnScores<'a> {
    /// `[B, H, S, S]`.
    pub bias: Option<TensorView<'a>>,
    pub modifiers: Option<&'a ScoreModifiers>,
}

impl<'a> OnScores<'a> {
    /// Whether each query has numbers of its own added.
    pub(super) fn varies_with_queries(&self) -> bool {
        self.bias.is_some_and(|bias| bias.layout().strides()[2] != 0)
    }

    /// For some heads and some queries, by their global positions; none for all.
    pub(super) fn part(&self, heads: &Range<usize>, queries: Option<&Range<usize>>) -> Result<PartScores<'a>> {
        let of_heads = |bias: TensorView<'a>| bias.slice(1, heads.clone());
        let mut bias = self.bias.map(of_heads).transpose()?;
        if let Some(queries) = queries {
            bias = bias.map(|bias| bias.slice(2, queries.clone())).transpose()?;
        }
        Ok(PartScores { bias, modifiers: self.modifiers.map(|modifiers| modifiers.of_heads(heads)) })
    }
}

/// What is done to the scores of one call on a device.
#[derive(Debug)]
pub(super) struct PartScores<'a> {
    bias: Option<TensorView<'a>>,
    modifiers: Option<ScoreModifiers>,
}

impl PartScores<'_> {
    pub(super) fn on<'m>(&'m self, mask: AttentionMask<'m>) -> AttentionMask<'m> {
        let mask = self.modifiers.iter().fold(mask, AttentionMask::with_modifiers);
        self.bias.iter().fold(mask, |mask, bias| mask.with_bias(*bias))
    }
}
