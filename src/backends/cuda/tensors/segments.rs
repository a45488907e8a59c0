//! Tensors of attention in segments along S. Kernels read and write whole tensors: segments are
//! copied to scratch, one after another along S, and the output is copied back from there.

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::launcher::Launcher;
use crate::call::memory::{Input, Output};
use crate::call::segments::{Role, Segmented};
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
