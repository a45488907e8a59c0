//! A call of the CPU device: its tensors, what takes part, and its pieces.

use std::ops::Range;

use super::bf16_pairs::Bf16Pairs;
use super::host::{HostInput, HostOutput, InputSegments, NAME, OutputSegments};
use super::needed_keys::{NeededKeys, Sequences};
use super::operands::{OneF32, Operand};
use super::processor::Processor;
use super::rows::RowElement;
use super::softcap::Softcap;
use super::strip::tile_columns;
use crate::call::memory::{Input, Output};
use crate::call::op::{Attention, Rows, no_device_tables};
use crate::call::problem::{AttentionProblem, AttentionShape};
use crate::call::segments::Segmented;
use crate::dtype::DType;
use crate::error::Result;
use crate::layout::Layout;
use crate::mask::key_mask::KeyMask;
use crate::score_modifiers::ScoreModifiers;

/// A call whose tensors are all `[B, S, H, D]`; packed ones have a batch dimension of stride 0.
pub(super) struct Call<'a, T> {
    pub problem: &'a AttentionProblem,
    pub processor: Processor,
    /// The operands of the products are pairs of bf16; else they are f32.
    pub pairs: Option<Bf16Pairs>,
    pub q: InputSegments<'a, T>,
    pub k: InputSegments<'a, T>,
    pub v: InputSegments<'a, T>,
    pub out: OutputSegments<'a, T>,
    /// `[B, H, Sq]`, as the others.
    lse: Option<HostOutput<'a, f32>>,
    pub bias: Option<Bias<'a, T>>,
    pub softcap: Option<Softcap>,
    /// ALiBi slopes of the query heads.
    pub slopes: Option<&'a [f32]>,
    /// Attention sinks of the query heads.
    pub sinks: Option<&'a [f32]>,
    pub queries: Sequences<'a>,
    pub keys: Sequences<'a>,
    needed: NeededKeys<'a>,
    /// Queries that it does not keep get rows of zeros, computed or not.
    pub query_mask: Option<&'a KeyMask>,
    pub scale: Scale,
}

/// What is added to the scaled scores, `[B, H, Sq, Sk]`.
pub(super) enum Bias<'a, T> {
    Same(HostInput<'a, T>),
    F32(HostInput<'a, f32>),
}

/// The softmax scale as two factors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale {
    /// Its sign, or 0: multiplied into the queries, which is exact.
    pub queries: f32,
    /// Its magnitude, never 0: the softmax wants a positive factor, for which the largest score
    /// stays the largest.
    pub scores: f32,
}

impl Scale {
    fn new(softmax_scale: f32) -> Self {
        if softmax_scale == 0.0 {
            return Self { queries: 0.0, scores: 1.0 };
        }
        Self { queries: softmax_scale.signum(), scores: softmax_scale.abs() }
    }
}

/// A query tile: queries `first..first + count` of one batch row and key/value head. They are
/// numbered token by token, the query heads of the group side by side.
#[derive(Debug, Clone)]
pub(super) struct Task {
    pub batch: usize,
    pub kv_head: usize,
    pub first: usize,
    pub count: usize,
    /// What the queries need of the keys that take part, as [`Call::needed_keys`] says.
    pub keys: Range<usize>,
}

impl Task {
    /// Pairs of query and key.
    pub fn pairs(&self) -> usize {
        self.count * self.keys.len()
    }
}

impl<'a, T: RowElement> Call<'a, T> {
    pub fn new(attention: Attention<'a>, processor: Processor) -> Result<Self> {
        let Attention { problem, q, k, v, out, lse, rows, ranges, modifiers, bias, .. } = attention;
        let AttentionShape { seq_q, seq_k, .. } = problem.shape;
        let (queries, keys, query_mask, key_mask) = match rows {
            Rows::Dense { key_mask, zero_rows } => {
                let keys = key_mask.map_or(Ok(Sequences::Whole(seq_k)), Sequences::kept)?;
                (Sequences::Whole(seq_q), keys, zero_rows, key_mask)
            }
            Rows::Varlen { query, key } => {
                (Sequences::valid(query)?, Sequences::valid(key)?, Some(query.key_mask()), Some(key.key_mask()))
            }
            Rows::Packed { query, key } => (Sequences::Packed(query), Sequences::Packed(key), None, None),
            Rows::DeviceVarlen { .. } => return Err(no_device_tables(NAME)),
        };
        let bias = match bias {
            None => None,
            Some(bias) if bias.dtype == T::DTYPE => Some(Bias::Same(HostInput::new(bias)?)),
            Some(bias) => Some(Bias::F32(HostInput::new(bias)?)),
        };
        let scale = Scale::new(problem.softmax_scale);
        let softcap = modifiers.filter(|modifiers| modifiers.set().softcap);
        let softcap = softcap
            .map(|modifiers| Softcap { cap: modifiers.softcap(), factor: modifiers.softcap_factor(scale.scores) });
        let padded = |input: Segmented<Input<'a>>| {
            InputSegments::inputs(input.try_map(|input| Ok(Input { layout: with_batch(input.layout)?, ..input }))?)
        };
        Ok(Self {
            problem,
            processor,
            // Rows of other widths are made wider as f32.
            pairs: processor
                .bf16()
                .filter(|_| T::DTYPE == DType::Bf16 && problem.shape.head_dim == tile_columns(problem.shape.head_dim)),
            q: padded(q)?,
            k: padded(k)?,
            v: padded(v)?,
            out: OutputSegments::outputs(out.try_map(|out| Ok(Output { layout: with_batch(out.layout)?, ..out }))?)?,
            lse: lse.map(|lse| HostOutput::new(Output { layout: lse_with_batch(lse.layout)?, ..lse })).transpose()?,
            bias,
            softcap,
            slopes: modifiers.and_then(ScoreModifiers::alibi),
            sinks: modifiers.and_then(ScoreModifiers::sinks),
            queries,
            keys,
            needed: NeededKeys::new(ranges, key_mask)?,
            query_mask,
            scale,
        })
    }

    /// The keys that some query of the batch row's queries `queries`, numbered as in [`Task`],
    /// needs.
    pub fn needed_keys(&self, batch: usize, queries: &Range<usize>) -> Range<usize> {
        let count = self.keys.of(batch).len();
        if !self.needed.differ() {
            return if queries.is_empty() { 0..0 } else { 0..count };
        }
        let (tokens, group) = (self.queries.of(batch), self.shape().group_size());
        let mut union = 0..0;
        for number in queries.start / group..queries.end.div_ceil(group) {
            let needed = self.needed.of_query(batch, tokens.at(number), count);
            if !needed.is_empty() {
                let is_first = union.is_empty();
                union.start = if is_first { needed.start } else { union.start.min(needed.start) };
                union.end = union.end.max(needed.end);
            }
        }
        union
    }

    /// Whether queries of a batch row may need different keys.
    pub fn queries_differ(&self) -> bool {
        self.needed.differ()
    }

    /// The keys that a query needs, by its token.
    pub fn keys_of_query(&self, batch: usize, token: usize) -> Range<usize> {
        self.needed.of_query(batch, token, self.keys.of(batch).len())
    }

    /// Pairs of query and key of a batch row, for one head.
    pub fn pairs(&self, batch: usize) -> usize {
        let (tokens, count) = (self.queries.of(batch), self.keys.of(batch).len());
        match self.needed.differ() {
            false => tokens.len().saturating_mul(count),
            true => (0..tokens.len()).map(|i| self.needed.of_query(batch, tokens.at(i), count).len()).sum(),
        }
    }

    /// Words of a row of the products' operands.
    pub fn words_of_head(&self) -> usize {
        tile_columns(self.shape().head_dim) / if self.pairs.is_some() { Bf16Pairs::PER_WORD } else { OneF32::PER_WORD }
    }

    /// Whether something is added to scores.
    pub fn adds_to_scores(&self) -> bool {
        self.bias.is_some() || self.slopes.is_some()
    }

    /// The factor between the running maximum of scores and scores.
    pub fn scale_of_max(&self) -> f32 {
        if self.softcap.is_some() || self.adds_to_scores() { 1.0 } else { self.scale.scores }
    }

    /// What the position of a key is ahead of that of the query level with it, by their tokens.
    pub fn level(&self, batch: usize) -> i64 {
        let AttentionShape { seq_q, seq_k, .. } = *self.shape();
        match (&self.queries, &self.keys) {
            (Sequences::Packed(query), Sequences::Packed(key)) => {
                key.rows(batch).end as i64 - query.rows(batch).end as i64
            }
            _ => seq_k as i64 - seq_q as i64,
        }
    }

    pub fn shape(&self) -> &AttentionShape {
        &self.problem.shape
    }

    /// Whether the log-sum-exp is asked for.
    pub fn has_lse(&self) -> bool {
        self.lse.is_some()
    }

    /// Writes the log-sum-exp of the row of a batch row, head and token, if it is asked for.
    pub fn write_lse(&self, position: [usize; 3], value: f32) {
        let Some(lse) = &self.lse else { return };
        // SAFETY: elements of the output do not overlap (checked by problem); each is written by
        // the task that has the row, or before the tasks if the row is masked.
        unsafe { lse.row(&position, 1) }.fill(value);
    }
}

/// A layout of rank 3, packed rows, as one of rank 4 whose batch index does not matter.
fn with_batch(layout: Layout) -> Result<Layout> {
    match (layout.shape(), layout.strides()) {
        (&[total, heads, dim], &[row, head, inner]) => {
            Layout::strided(&[1, total, heads, dim], &[0, row, head, inner], layout.offset())
        }
        _ => Ok(layout),
    }
}

/// A layout of rank 2, of the log-sum-exp of packed rows, as one of rank 3.
fn lse_with_batch(layout: Layout) -> Result<Layout> {
    match (layout.shape(), layout.strides()) {
        (&[heads, total], &[head, row]) => Layout::strided(&[1, heads, total], &[0, head, row], layout.offset()),
        _ => Ok(layout),
    }
}
