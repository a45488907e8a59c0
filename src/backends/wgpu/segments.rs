//! Tensors of attention in segments along S.
//!
//! Shaders read whole tensors: segments are joined in scratch, one after another along S. Those of q
//! and k that are prepared before are written there by what prepares them.
//!
//! ```text
//!    segments      scratch, [B, S, H, D]
//!    [B, 2, ..]    b0: 0 0 1 1 1   b1: 0 0 1 1 1       tokens, by their segment
//!    [B, 3, ..]
//! ```
//!
//! The output is written where its segments lie if there are bindings for all of its buffers; else
//! to scratch, from which it is copied. Inputs have no such form: they are read in the innermost
//! loops, where a choice between bindings would stand in front of every load.

use std::ops::Range;

use crate::backends::rows::WORD_BYTES;
use crate::call::memory::{Input, Output};
use crate::call::segments::{Role, Segmented};
use crate::error::Result;
use crate::layout::Layout;

use super::context::Context;
use super::dispatch::Window;
use super::launches::{Joined, Launches};
use super::params::{AttentionParams, MAX_OUT_PARTS};
use super::placement::{FirstDim, Operand, Placed, SegmentPlace};

/// A tensor of an attention call.
#[derive(Debug)]
pub(super) struct Segments<'a> {
    operands: Segmented<Operand<'a>>,
    /// All of them in one tensor, where they are joined before the first launch.
    joined: Option<wgpu::Buffer>,
}

/// Where an output lies.
#[derive(Debug, Clone)]
pub(super) enum PlacedOutput {
    Whole(Placed),
    /// In segments, which share windows where they share buffers.
    Parts {
        windows: Vec<Window>,
        parts: Vec<Part>,
    },
}

/// A segment of an output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    first: u32,
    /// Which of the windows.
    window: u32,
    /// In words, as those of [`Placed`].
    offset: u32,
    stride_b: u32,
    stride_s: u32,
    stride_h: u32,
}

impl<'a> Segments<'a> {
    pub fn input(
        context: &Context,
        role: Role,
        inputs: &Segmented<Input<'a>>,
        first_dim: FirstDim<'a>,
    ) -> Result<Self> {
        Self::new(role, inputs, |input| &input.layout, |name, input| Operand::input(context, name, input, first_dim))
    }

    pub fn output(
        context: &Context,
        role: Role,
        outputs: &Segmented<Output<'a>>,
        first_dim: FirstDim<'a>,
    ) -> Result<Self> {
        let operand = |name, output: &Output<'a>| Operand::output(context, name, output, first_dim);
        Self::new(role, outputs, |output| &output.layout, operand)
    }

    fn new<T>(
        role: Role,
        segments: &Segmented<T>,
        layout: impl Fn(&T) -> &Layout,
        operand: impl Fn(&'static str, &T) -> Result<Operand<'a>>,
    ) -> Result<Self> {
        let several = match segments {
            Segmented::One(one) => return Ok(Self::from(Segmented::One(operand(role.name(), one)?))),
            Segmented::Several(several) => several,
        };
        let seq = |segment: &T| layout(segment).shape().get(1).copied().unwrap_or(0);
        let joint_seq = several.iter().map(seq).sum();
        let mut first = 0;
        let mut operands = Vec::with_capacity(several.len());
        for (index, segment) in several.iter().enumerate() {
            let operand = operand(role.segment_name(index, several.len()), segment)?;
            operands.push(operand.in_segment(SegmentPlace { first, joint_seq }));
            first += seq(segment);
        }
        Ok(Self::from(Segmented::Several(operands)))
    }

    pub fn operands(&self) -> impl Iterator<Item = Operand<'a>> {
        self.operands.iter().copied()
    }

    /// The binding of a range of batch rows to read.
    pub fn place_input(
        &self,
        context: &Context,
        range: &Range<usize>,
        launches: &mut Launches<'_>,
        scratch: &mut Vec<wgpu::Buffer>,
    ) -> Result<Placed> {
        let several = match &self.operands {
            Segmented::One(operand) => return operand.place_input(context, range, launches, scratch),
            Segmented::Several(several) => several,
        };
        if let (Some(joined), Some(first)) = (&self.joined, several.first()) {
            let whole = first.joint(&first.batch_rows(), joined)?;
            // Fits: a binding is below 2 GiB.
            return Ok(Placed { offset: range.start as u32 * whole.stride_b, ..whole });
        }
        let mut filled = several.iter().filter(|operand| operand.layout.numel() > 0).peekable();
        let Some(first) = filled.peek() else { return Ok(Placed::nothing(context)) };
        let copy = launches.take_scratch(first.joint_bytes(range)?)?;
        let placed = first.joint(range, &copy)?;
        filled.try_for_each(|operand| operand.copy_input(range, &copy, launches))?;
        scratch.push(copy);
        Ok(placed)
    }

    /// The same segments, joined before the first launch if some of them are joined already.
    pub fn join(self, context: &Context, role: Role, launches: &mut Launches<'_>) -> Result<Self> {
        let Some(Joined { buffer, firsts }) = launches.take_joined(role) else { return Ok(self) };
        let missing = |operand: &&Operand<'a>| operand.layout.numel() > 0 && !firsts.contains(&operand.first_token());
        for operand in self.operands.iter().filter(missing) {
            if operand.binding_bytes(&operand.batch_rows())? > context.max_binding_bytes {
                launches.give_back([buffer]);
                return Ok(self);
            }
        }
        self.operands
            .iter()
            .filter(missing)
            .try_for_each(|operand| operand.copy_input(&operand.batch_rows(), &buffer, launches))?;
        Ok(Self { joined: Some(buffer), ..self })
    }

    /// Frees what was joined, after the last launch.
    pub fn finish_input(self, launches: &mut Launches<'_>) {
        launches.give_back(self.joined);
    }

    /// The number of buffers that segments to write lie in, if kernels can write them there: each in a
    /// binding, of which there are `most`.
    pub fn buffers_in_place(&self, context: &Context, most: usize) -> Result<Option<usize>> {
        let Segmented::Several(several) = &self.operands else { return Ok(None) };
        let parts: Vec<_> = several.iter().filter(|operand| operand.layout.numel() > 0).collect();
        if parts.is_empty() || parts.len() > MAX_OUT_PARTS || !parts.iter().all(|part| part.is_of_words()) {
            return Ok(None);
        }
        let windows = windows_of(&parts, &parts[0].batch_rows())?;
        let fit = windows.iter().all(|(_, bytes)| bytes.end - bytes.start <= context.max_binding_bytes);
        Ok((fit && windows.len() <= most).then_some(windows.len()))
    }

    /// The bindings of a range of batch rows to write, for
    /// [`buffers_in_place`](Self::buffers_in_place).
    pub fn place_parts(&self, range: &Range<usize>) -> Result<PlacedOutput> {
        let operands: Vec<_> = self.operands.iter().filter(|operand| operand.layout.numel() > 0).collect();
        let windows = windows_of(&operands, range)?;
        let mut placed_windows: Vec<Option<Window>> = vec![None; windows.len()];
        let mut parts = Vec::new();
        for operand in operands {
            for (index, (_, bytes)) in windows.iter().enumerate().filter(|(_, (other, _))| other.lies_beside(operand)) {
                let Placed { window, offset, stride_b, stride_s, stride_h } = operand.place_in(range, bytes.clone())?;
                placed_windows[index] = Some(window);
                // Both fit: tokens are counted in an i32.
                let (first, window) = (operand.first_token() as u32, index as u32);
                parts.push(Part { first, window, offset, stride_b, stride_s, stride_h });
            }
        }
        Ok(PlacedOutput::Parts { windows: placed_windows.into_iter().flatten().collect(), parts })
    }

    /// The binding of a range of batch rows to write.
    pub fn place_output(
        &self,
        range: &Range<usize>,
        launches: &mut Launches<'_>,
        scratch: &mut Vec<wgpu::Buffer>,
    ) -> Result<Placed> {
        let first = match &self.operands {
            Segmented::One(operand) => return operand.place_output(range, launches, scratch),
            // A call of which all outputs are empty launches nothing.
            Segmented::Several(several) => &several[0],
        };
        let copy = launches.take_scratch(first.joint_bytes(range)?.max(WORD_BYTES))?;
        let placed = first.joint(range, &copy)?;
        scratch.push(copy);
        Ok(placed)
    }

    /// Copies what was written to [`place_output`](Self::place_output)'s scratch, if there is any.
    pub fn finish_output(&self, range: &Range<usize>, written: &Placed, launches: &mut Launches<'_>) -> Result<()> {
        self.operands.iter().try_for_each(|operand| operand.finish_output(range, written, launches))
    }
}

impl<'a> From<Segmented<Operand<'a>>> for Segments<'a> {
    fn from(operands: Segmented<Operand<'a>>) -> Self {
        Self { operands, joined: None }
    }
}

impl PlacedOutput {
    pub fn windows(self) -> Vec<Window> {
        match self {
            Self::Whole(placed) => vec![placed.window],
            Self::Parts { windows, .. } => windows,
        }
    }

    /// The parameters with the output's place.
    pub fn bind(&self, params: AttentionParams) -> AttentionParams {
        match self {
            Self::Whole(out) => AttentionParams {
                out_offset: out.offset,
                out_stride_b: out.stride_b,
                out_stride_s: out.stride_s,
                out_stride_h: out.stride_h,
                ..params
            },
            Self::Parts { parts, .. } => {
                // A window has fewer than 2^27 words, so its number stands above them.
                let offset = |part: &Part| part.offset | part.window << 28;
                let mut params = params;
                for (place, part) in parts.iter().enumerate() {
                    let of_part = [part.first, offset(part), part.stride_b, part.stride_s, part.stride_h];
                    params.set_out_part(place, of_part);
                }
                params
            }
        }
    }
}

/// The buffers of some segments, each by one of them, and the bytes of it that all its segments need.
fn windows_of<'o, 'a>(
    operands: &[&'o Operand<'a>],
    range: &Range<usize>,
) -> Result<Vec<(&'o Operand<'a>, Range<u64>)>> {
    let mut windows: Vec<(&Operand<'a>, Range<u64>)> = Vec::new();
    for &operand in operands {
        let bytes = operand.bytes_in_place(range)?;
        match windows.iter_mut().find(|(other, _)| other.lies_beside(operand)) {
            Some((_, all)) => *all = all.start.min(bytes.start)..all.end.max(bytes.end),
            None => windows.push((operand, bytes)),
        }
    }
    Ok(windows)
}
