//! Tensors of attention in segments along S. The sm90 kernel reads and writes them where they lie on
//! the fused path. Elsewhere they are copied to scratch, one after another along S, and the output is
//! copied back from there.

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::launcher::Launcher;
use crate::call::memory::{Input, Output};
use crate::call::segments::{Role, Segmented, common_ends};
use crate::error::Result;

use super::placement::{Operand, Placed};

/// A tensor of an attention call.
#[derive(Debug)]
pub struct Segments<'a>(Segmented<Operand<'a>>);

impl<'a> Segments<'a> {
    pub fn input(launcher: &Launcher, role: Role, inputs: &Segmented<Input<'a>>) -> Result<Self> {
        let operand = |(index, input)| Operand::input(launcher, role.segment_name(index, inputs.len()), input);
        inputs.iter().enumerate().map(operand).collect::<Result<_>>().map(Self)
    }

    pub fn output(launcher: &Launcher, role: Role, outputs: &Segmented<Output<'a>>) -> Result<Self> {
        let operand = |(index, output)| Operand::output(launcher, role.segment_name(index, outputs.len()), output);
        outputs.iter().enumerate().map(operand).collect::<Result<_>>().map(Self)
    }

    /// Where to read. One segment is placed by `place_one`; several are copied to scratch, which must
    /// live until the launch.
    pub fn place_input(
        &self,
        launcher: &Launcher,
        scratch: &mut Vec<CudaBuffer>,
        place_one: fn(&Launcher, &Operand<'_>, &mut Vec<CudaBuffer>) -> Result<Placed>,
    ) -> Result<Placed> {
        match &self.0 {
            Segmented::One(operand) => place_one(launcher, operand, scratch),
            Segmented::Several(several) => {
                let placed = place_joint(launcher, several, scratch)?;
                each_with_its_place(several, &placed, |operand, place| operand.copy_to(launcher, place))?;
                Ok(placed)
            }
        }
    }

    /// Where to read each segment.
    pub fn place_inputs(
        &self,
        launcher: &Launcher,
        scratch: &mut Vec<CudaBuffer>,
        place_one: fn(&Launcher, &Operand<'_>, &mut Vec<CudaBuffer>) -> Result<Placed>,
    ) -> Result<Vec<PlacedSegment>> {
        self.place_each(|operand| place_one(launcher, operand, scratch))
    }

    /// Where to write each segment; [`finish_outputs`](Self::finish_outputs) copies what cannot be
    /// written where it lies. Segments may lie anywhere, as where they are copied.
    pub fn place_outputs(&self, launcher: &Launcher, scratch: &mut Vec<CudaBuffer>) -> Result<Vec<PlacedSegment>> {
        self.place_each(|operand| operand.place_output_anywhere(launcher, scratch))
    }

    fn place_each(&self, mut place: impl FnMut(&Operand<'_>) -> Result<Placed>) -> Result<Vec<PlacedSegment>> {
        let placed =
            |operand: &Operand<'_>| Ok(PlacedSegment { placed: place(operand)?, tokens: operand.layout.shape()[1] });
        self.0.iter().map(placed).collect()
    }

    /// Copies what was written to [`place_outputs`](Self::place_outputs)'s scratch, if there is any.
    pub fn finish_outputs(&self, launcher: &Launcher, written: &[PlacedSegment]) -> Result<()> {
        let mut each = self.0.iter().zip(written);
        each.try_for_each(|(operand, written)| operand.finish_output_anywhere(launcher, &written.placed))
    }

    /// Where to write; [`finish_output`](Self::finish_output) copies what several segments get.
    pub fn place_output(&self, launcher: &Launcher, scratch: &mut Vec<CudaBuffer>) -> Result<Placed> {
        match &self.0 {
            Segmented::One(operand) => operand.place_output(launcher, scratch),
            Segmented::Several(several) => place_joint(launcher, several, scratch),
        }
    }

    /// Copies what was written to [`place_output`](Self::place_output)'s scratch, if there is any.
    pub fn finish_output(&self, launcher: &Launcher, written: &Placed) -> Result<()> {
        match &self.0 {
            Segmented::One(operand) => operand.finish_output(launcher, written),
            Segmented::Several(several) => {
                each_with_its_place(several, written, |operand, place| operand.copy_from(launcher, place))
            }
        }
    }
}

/// Pieces of tensors that have the same tokens: none is empty, and each lies in one segment of every
/// tensor.
#[derive(Debug)]
pub struct Pieces {
    /// The first token past each, counted over all.
    pub ends: Vec<usize>,
    /// Of each piece, where each tensor lies.
    pub places: Vec<[Placed; 2]>,
}

impl Pieces {
    /// Of segments that are placed.
    pub fn new(tensors: [&[PlacedSegment]; 2]) -> Self {
        let [first, second] = tensors.map(|segments| segments.iter().map(|segment| segment.tokens).collect::<Vec<_>>());
        let ends = common_ends([&first, &second]);
        let starts = [0].into_iter().chain(ends.iter().copied());
        let places = starts.take(ends.len()).map(|start| tensors.map(|segments| place_of(segments, start))).collect();
        Self { ends, places }
    }

    /// Where each piece begins, and how many tokens it has.
    pub fn spans(&self) -> impl Iterator<Item = (usize, &[Placed; 2])> {
        let starts = [0].into_iter().chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| end - start).zip(&self.places)
    }
}

/// Where one segment lies.
#[derive(Debug, Clone, Copy)]
pub struct PlacedSegment {
    pub placed: Placed,
    pub tokens: usize,
}

/// Where a token lies, which exists.
fn place_of(segments: &[PlacedSegment], token: usize) -> Placed {
    let mut before = 0;
    for segment in segments {
        if token < before + segment.tokens {
            return segment.placed.after_tokens(token - before);
        }
        before += segment.tokens;
    }
    segments[0].placed
}

/// Scratch for all segments, of which there are some.
fn place_joint(launcher: &Launcher, several: &[Operand<'_>], scratch: &mut Vec<CudaBuffer>) -> Result<Placed> {
    let mut shape = several[0].layout.shape().to_vec();
    shape[1] = several.iter().map(|operand| operand.layout.shape()[1]).sum();
    several[0].place_scratch(launcher, &shape, scratch)
}

/// Runs something for each segment that has elements, and its place in the scratch of all.
fn each_with_its_place(
    several: &[Operand<'_>],
    joint: &Placed,
    mut run: impl FnMut(&Operand<'_>, &Placed) -> Result<()>,
) -> Result<()> {
    let mut first = 0;
    for operand in several {
        if operand.layout.numel() > 0 {
            run(operand, &joint.after_tokens(first))?;
        }
        first += operand.layout.shape()[1];
    }
    Ok(())
}
