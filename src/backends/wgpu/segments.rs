//! Tensors of attention in segments along S. Shaders read and write whole tensors: segments are
//! copied to scratch, one after another along S, and the output is copied back from there.
//!
//! ```text
//!    segments      scratch, [B, S, H, D]
//!    [B, 2, ..]    b0: 0 0 1 1 1   b1: 0 0 1 1 1       tokens, by their segment
//!    [B, 3, ..]
//! ```

use std::ops::Range;

use crate::backends::rows::WORD_BYTES;
use crate::call::memory::{Input, Output};
use crate::call::segments::{Role, Segmented};
use crate::error::Result;
use crate::layout::Layout;

use super::context::Context;
use super::launches::Launches;
use super::placement::{FirstDim, Operand, Placed, SegmentPlace};

/// A tensor of an attention call.
#[derive(Debug)]
pub(super) struct Segments<'a>(Segmented<Operand<'a>>);

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
            Segmented::One(one) => return Ok(Self(Segmented::One(operand(role.name(), one)?))),
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
        Ok(Self(Segmented::Several(operands)))
    }

    pub fn operands(&self) -> impl Iterator<Item = Operand<'a>> {
        self.0.iter().copied()
    }

    /// The binding of a range of batch rows to read.
    pub fn place_input(
        &self,
        context: &Context,
        range: &Range<usize>,
        launches: &mut Launches<'_>,
        scratch: &mut Vec<wgpu::Buffer>,
    ) -> Result<Placed> {
        let several = match &self.0 {
            Segmented::One(operand) => return operand.place_input(context, range, launches, scratch),
            Segmented::Several(several) => several,
        };
        let mut filled = several.iter().filter(|operand| operand.layout.numel() > 0).peekable();
        let Some(first) = filled.peek() else { return Ok(Placed::nothing(context)) };
        let copy = launches.take_scratch(first.joint_bytes(range)?)?;
        let placed = first.joint(range, &copy)?;
        filled.try_for_each(|operand| operand.copy_input(range, &copy, launches))?;
        scratch.push(copy);
        Ok(placed)
    }

    /// The binding of a range of batch rows to write.
    pub fn place_output(
        &self,
        range: &Range<usize>,
        launches: &mut Launches<'_>,
        scratch: &mut Vec<wgpu::Buffer>,
    ) -> Result<Placed> {
        let first = match &self.0 {
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
        self.0.iter().try_for_each(|operand| operand.finish_output(range, written, launches))
    }
}
