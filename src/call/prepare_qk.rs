//! Norm and rotary embedding of q and k: the operation as backends take it, and its checks.

use super::memory::{Input, Output};
use super::problem::{
    DeviceInfo, ViewInfo, expect_apart, expect_count, expect_dtype, expect_head_dim, expect_input, expect_mask,
    expect_output, expect_outputs_apart, expect_shape, sizes,
};
use super::segments::{MAX_SEGMENTS, SEGMENT_NAMES, SegmentNames};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::mask::key_mask::{KeyMask, check_token_count};

/// Which elements of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RotaryPairing {
    /// Elements 2i and 2i + 1, as in Qwen-Image and Flux.
    Interleaved,
    /// Elements i and i + R/2, as in Llama and ModernBERT.
    Halves,
}

/// q or k of a segment.
#[derive(Debug)]
pub(crate) enum PreparedRows<'a> {
    InPlace(Output<'a>),
    /// From one tensor to another of the same shape.
    Copied(Input<'a>, Output<'a>),
}

impl PreparedRows<'_> {
    pub(crate) fn layout(&self) -> &Layout {
        match self {
            Self::InPlace(rows) | Self::Copied(_, rows) => &rows.layout,
        }
    }
}

/// `x · weight / sqrt(mean(x²) + eps)` of each head.
#[derive(Debug)]
pub(crate) struct HeadNorm<'a> {
    /// Of q and of k: `[D]`, f32 or the tensors' element type.
    pub weights: [Input<'a>; 2],
    pub eps: f32,
}

/// A rotation of the first elements of each head.
#[derive(Debug)]
pub(crate) struct HeadRotary<'a> {
    /// `[B, S, R/2]`, both f32 or both of the tensors' element type; a table for all batch rows has
    /// stride 0 there.
    pub cos: Input<'a>,
    pub sin: Input<'a>,
    pub pairing: RotaryPairing,
}

/// Tokens whose q and k lie together.
#[derive(Debug)]
pub(crate) struct PrepareSegment<'a> {
    pub names: &'static SegmentNames,
    /// Place of the segment's first token in the mask.
    pub first_token: usize,
    /// `[B, S, H, D]` and `[B, S, Hkv, D]`.
    pub q: PreparedRows<'a>,
    pub k: PreparedRows<'a>,
    pub norm: Option<HeadNorm<'a>>,
    pub rotary: Option<HeadRotary<'a>>,
}

impl PrepareSegment<'_> {
    /// Whether no element would be written, or none another than is there.
    pub(crate) fn is_idle(&self) -> bool {
        let rows = [&self.q, &self.k];
        let is_as_it_was = self.norm.is_none() && self.rotary.is_none();
        rows.iter().all(|rows| rows.layout().numel() == 0 || is_as_it_was && matches!(rows, PreparedRows::InPlace(_)))
    }
}

/// Norm and rotary embedding of q and k, in f32 and rounded once. Rows of tokens that the mask does
/// not keep are neither read nor written.
#[derive(Debug)]
pub(crate) struct PrepareQk<'a> {
    pub segments: Vec<PrepareSegment<'a>>,
    pub dtype: DType,
    /// `[B, S]` over the segments one after another.
    pub mask: Option<&'a KeyMask>,
    /// Tokens of all segments, also of those with nothing to do, if attention over them is the next
    /// operation: a device that joins them for it may do so here.
    pub joint_seq: Option<usize>,
}

/// q or k of a segment, without its memory.
#[derive(Debug)]
pub(crate) struct RowsInfo<'a> {
    /// None in place.
    pub input: Option<ViewInfo<'a>>,
    pub output: ViewInfo<'a>,
}

/// A segment, without its memory.
#[derive(Debug)]
pub(crate) struct SegmentInfo<'a> {
    pub q: RowsInfo<'a>,
    pub k: RowsInfo<'a>,
    pub norm: Option<([ViewInfo<'a>; 2], f32)>,
    pub rotary: Option<[ViewInfo<'a>; 2]>,
}

/// Sizes that all segments share.
struct Shared {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    dtype: DType,
}

/// Checks a call.
pub(crate) fn check_prepare_qk(
    device: DeviceInfo<'_>,
    segments: &[SegmentInfo<'_>],
    mask: Option<&KeyMask>,
) -> Result<()> {
    let Some(first) = segments.first().filter(|_| segments.len() <= MAX_SEGMENTS) else {
        return Err(Error::SegmentCount { argument: "segments", limit: MAX_SEGMENTS, got: segments.len() });
    };
    let [batch, _, heads, head_dim] = sizes(SEGMENT_NAMES[0].q, first.q.source(), "4: [B, S, H, D]")?;
    let [_, _, kv_heads, _] = sizes(SEGMENT_NAMES[0].k, first.k.source(), "4: [B, S, Hkv, D]")?;
    expect_head_dim(head_dim)?;
    let shared = Shared { batch, heads, kv_heads, head_dim, dtype: first.q.source().dtype };
    let mut tokens = 0_usize;
    for (names, segment) in SEGMENT_NAMES.iter().zip(segments) {
        let seq = check_segment(device, names, segment, &shared)?;
        tokens = tokens.saturating_add(seq);
        check_token_count(names.q, batch, tokens)?;
    }
    if let Some(mask) = mask {
        expect_mask("mask", mask, batch, tokens)?;
    }
    check_outputs(segments)
}

/// Checks all but the outputs' memory; gives the segment's length.
fn check_segment(
    device: DeviceInfo<'_>,
    names: &SegmentNames,
    segment: &SegmentInfo<'_>,
    shared: &Shared,
) -> Result<usize> {
    let &Shared { batch, heads, kv_heads, head_dim, dtype } = shared;
    let SegmentInfo { q, k, norm, rotary } = segment;
    let [_, seq, ..] = sizes::<4>(names.q, q.source(), "4: [B, S, H, D]")?;
    for (name, out_name, rows, heads) in [(names.q, names.q_out, q, heads), (names.k, names.k_out, k, kv_heads)] {
        let shape = [batch, seq, heads, head_dim];
        let views = rows.input.iter().map(|view| (name, view));
        let output_name = rows.output_name(name, out_name);
        for (name, view) in views.chain([(output_name, &rows.output)]) {
            expect_shape(name, view, &shape)?;
            expect_dtype(name, view, dtype)?;
            expect_input(name, view, device)?;
        }
        // Every device takes every element type.
        expect_count(name, &shape)?;
        expect_output(output_name, &rows.output, device)?;
    }
    if let Some((weights, eps)) = norm {
        for (name, weight) in [names.q_weight, names.k_weight].into_iter().zip(weights) {
            expect_shape(name, weight, &[head_dim])?;
            expect_numbers(name, weight, dtype)?;
            expect_input(name, weight, device)?;
        }
        if !eps.is_finite() || *eps < 0.0 {
            return Err(Error::Eps { argument: names.eps, got: *eps });
        }
    }
    if let Some([cos, sin]) = rotary {
        let half = cos.layout.shape().last().copied().unwrap_or(0);
        let shape = match cos.layout.rank() {
            3 => vec![batch, seq, half],
            _ => vec![seq, half],
        };
        expect_shape(names.cos, cos, &shape)?;
        expect_shape(names.sin, sin, &shape)?;
        expect_numbers(names.cos, cos, dtype)?;
        expect_dtype(names.sin, sin, cos.dtype)?;
        for (name, table) in [(names.cos, cos), (names.sin, sin)] {
            expect_input(name, table, device)?;
        }
        if half > head_dim / 2 {
            return Err(Error::RotaryDim { argument: names.cos, head_dim, got: half.saturating_mul(2) });
        }
    }
    Ok(seq)
}

/// Weights and tables are f32 or of the tensors' element type.
fn expect_numbers(argument: &'static str, view: &ViewInfo<'_>, dtype: DType) -> Result<()> {
    if view.dtype == DType::F32 { Ok(()) } else { expect_dtype(argument, view, dtype) }
}

impl<'a> RowsInfo<'a> {
    pub(super) fn source(&self) -> &ViewInfo<'a> {
        self.input.as_ref().unwrap_or(&self.output)
    }

    /// What errors call the output: in place it has the input's name.
    pub(super) fn output_name(&self, name: &'static str, out_name: &'static str) -> &'static str {
        if self.input.is_some() { out_name } else { name }
    }
}

/// No output shares memory with another tensor of the call, but with the input that it takes the
/// place of.
fn check_outputs(segments: &[SegmentInfo<'_>]) -> Result<()> {
    let mut outputs = Vec::new();
    let mut inputs = Vec::new();
    for (names, SegmentInfo { q, k, norm, rotary }) in SEGMENT_NAMES.iter().zip(segments) {
        for (name, out_name, rows) in [(names.q, names.q_out, q), (names.k, names.k_out, k)] {
            let output_name = rows.output_name(name, out_name);
            outputs.push((output_name, &rows.output, rows.input.as_ref().filter(|input| is_same(&rows.output, input))));
            inputs.extend(rows.input.as_ref().map(|input| (name, input)));
        }
        if let Some(([q_weight, k_weight], _)) = norm {
            inputs.extend([(names.q_weight, q_weight), (names.k_weight, k_weight)]);
        }
        if let Some([cos, sin]) = rotary {
            inputs.extend([(names.cos, cos), (names.sin, sin)]);
        }
    }
    for (at, (name, output, own)) in outputs.iter().enumerate() {
        for (other, input) in &inputs {
            if !own.is_some_and(|own| std::ptr::eq(own, *input)) {
                expect_apart(name, output, other, input)?;
            }
        }
        for (other, later, _) in &outputs[at + 1..] {
            expect_outputs_apart(name, output, other, later)?;
        }
    }
    Ok(())
}

/// Whether both views are of the same elements.
pub(crate) fn is_same(output: &ViewInfo<'_>, input: &ViewInfo<'_>) -> bool {
    output.space == input.space && output.touched == input.touched && output.layout == input.layout
}
