//! Where the tensors of an operation lie, aligned copies of inputs whose rows do not start at words,
//! and copies of tensors whose heads are not whole words: zeros fill those up.

use crate::backends::cuda::driver::memory::CudaBuffer;
use crate::backends::cuda::driver::transfer;
use crate::backends::cuda::kernels::params::Strides;
use crate::backends::cuda::launcher::Launcher;
use crate::backends::rows::{WORD_BYTES, filled_head_dim, has_filled_heads, misaligned_by, row_strides};
use crate::call::memory::{Input, Output};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::layout::Layout;

use super::strided_copy::StridedCopy;

/// A tensor of an operation: `[B, S, H, D]`, packed `[n, H, D]`, or any shape where only its
/// address matters.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    pub name: &'static str,
    pub buffer: &'a CudaBuffer,
    pub layout: Layout,
    pub dtype: DType,
}

/// Where the rows of a tensor lie. The first is at a multiple of 16 bytes, and so is every step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    pub address: u64,
    /// In elements; packed tensors have no batch rows.
    pub strides: Strides,
    element_bytes: u64,
}

impl Placed {
    /// A contiguous packed tensor at an address, which is a multiple of 16 bytes.
    pub fn packed(address: u64, heads: usize, head_dim: usize, dtype: DType) -> Self {
        // Both fit: rows of a tensor do.
        let strides = Strides { batch: 0, token: (heads * head_dim) as i64, head: head_dim as i64 };
        Self { address, strides, element_bytes: dtype.size() as u64 }
    }

    /// The tensor as packed rows: those of all batch rows, of so many tokens each, if they lie one after the other.
    pub fn as_rows(&self, batch: usize, seq: usize) -> Option<Self> {
        // Fits: the tokens lie in memory.
        let is_one = batch <= 1 || self.strides.batch == self.strides.token * seq as i64;
        is_one.then_some(Self { strides: Strides { batch: 0, ..self.strides }, ..*self })
    }

    /// The same without its first tokens.
    pub fn after_tokens(&self, tokens: usize) -> Self {
        // Fits: the tokens lie in memory. Strides are not negative.
        let bytes = tokens as u64 * self.strides.token.unsigned_abs() * self.element_bytes;
        Self { address: self.address + bytes, ..*self }
    }

    /// The strides in words.
    pub fn word_strides(&self) -> Strides {
        let words = |elements: i64| elements * self.element_bytes as i64 / WORD_BYTES as i64;
        let Strides { batch, token, head } = self.strides;
        Strides { batch: words(batch), token: words(token), head: words(head) }
    }
}

impl<'a> Operand<'a> {
    /// An input of an operation, checked to lie in this device's memory.
    pub fn input(launcher: &Launcher, name: &'static str, input: &Input<'a>) -> Result<Self> {
        Self { name, buffer: launcher.source(input.memory)?, layout: input.layout, dtype: input.dtype }
            .with_whole_elements()
    }

    /// An output of an operation, checked to lie in this device's memory.
    pub fn output(launcher: &Launcher, name: &'static str, output: &Output<'a>) -> Result<Self> {
        Self { name, buffer: launcher.sink(&output.memory)?, layout: output.layout, dtype: output.dtype }
            .with_whole_elements()
    }

    /// Address of the first element.
    pub fn address(&self) -> u64 {
        self.buffer.address() + self.bytes(self.layout.offset())
    }

    fn bytes(&self, elements: u64) -> u64 {
        elements * self.dtype.size() as u64
    }

    /// What keeps the rows from starting at words, in bytes; nothing if there are none.
    fn misaligned_by(&self) -> Option<u64> {
        let by = || misaligned_by(self.buffer.address(), &self.layout, self.dtype.size());
        if self.layout.numel() == 0 { None } else { by() }
    }

    /// Elements are read and written whole, so they must lie at multiples of their size. External
    /// memory need not start at one.
    fn with_whole_elements(self) -> Result<Self> {
        let (address, expected) = (self.address(), self.dtype.size() as u64);
        if self.layout.numel() == 0 || address.is_multiple_of(expected) {
            return Ok(self);
        }
        Err(Error::Misaligned { argument: self.name, expected, got: address })
    }

    fn placed(&self) -> Placed {
        Placed { address: self.address(), strides: strides(&self.layout), element_bytes: self.dtype.size() as u64 }
    }

    /// Where to write. Heads that are not filled are written to scratch first: after the launch that
    /// writes, [`finish_output`](Self::finish_output) copies them.
    pub fn place_output(&self, launcher: &Launcher, scratch: &mut Vec<CudaBuffer>) -> Result<Placed> {
        if !has_filled_heads(&self.layout) {
            return self.place_scratch(launcher, self.layout.shape(), scratch);
        }
        match self.misaligned_by() {
            None => Ok(self.placed()),
            Some(got) => Err(Error::Misaligned { argument: self.name, expected: WORD_BYTES, got }),
        }
    }

    /// Where to write: in scratch too where rows do not lie at words. After the launch that writes,
    /// [`finish_output_anywhere`](Self::finish_output_anywhere) copies it.
    pub fn place_output_anywhere(&self, launcher: &Launcher, scratch: &mut Vec<CudaBuffer>) -> Result<Placed> {
        if has_filled_heads(&self.layout) && self.misaligned_by().is_none() {
            return Ok(self.placed());
        }
        self.place_scratch(launcher, self.layout.shape(), scratch)
    }

    /// Copies what was written to [`place_output_anywhere`](Self::place_output_anywhere)'s scratch, if
    /// there is any.
    pub fn finish_output_anywhere(&self, launcher: &Launcher, written: &Placed) -> Result<()> {
        if written.address == self.address() || self.layout.numel() == 0 {
            return Ok(());
        }
        self.copy_from(launcher, written)
    }

    /// Copies what was written to [`place_output`](Self::place_output)'s scratch, if there is any.
    pub fn finish_output(&self, launcher: &Launcher, written: &Placed) -> Result<()> {
        if has_filled_heads(&self.layout) || self.layout.numel() == 0 {
            return Ok(());
        }
        self.copy_from(launcher, written)
    }

    /// Copies from scratch to the view, which has elements.
    pub fn copy_from(&self, launcher: &Launcher, written: &Placed) -> Result<()> {
        for rectangle in self.strided_copy(written).rectangles(self.address(), written.address) {
            let back = rectangle.reversed();
            // SAFETY: the rectangles cover the view, which lies inside its buffer, shares no memory
            // with other tensors and does not overlap itself (checked by problem), and lie inside the
            // scratch.
            unsafe { transfer::copy(&launcher.context, &back) }?;
        }
        Ok(())
    }

    /// Copies the view, which has elements, to scratch.
    pub fn copy_to(&self, launcher: &Launcher, copy: &Placed) -> Result<()> {
        for rectangle in self.strided_copy(copy).rectangles(self.address(), copy.address) {
            // SAFETY: the rectangles cover the view, which lies inside its buffer (checked by problem),
            // and lie inside the scratch.
            unsafe { transfer::copy(&launcher.context, &rectangle) }?;
        }
        Ok(())
    }

    /// Scratch for a row-major tensor of a shape; zeros fill up its heads, if they are not filled. It
    /// must live until the launch.
    pub fn place_scratch(&self, launcher: &Launcher, shape: &[usize], scratch: &mut Vec<CudaBuffer>) -> Result<Placed> {
        let mut shape = shape.to_vec();
        if let Some(head_dim) = shape.last_mut() {
            *head_dim = filled_head_dim(*head_dim);
        }
        let filled = Layout::contiguous(&shape)?;
        let bytes = self.bytes(filled.numel() as u64);
        let copy = launcher.scratch(bytes)?;
        if !has_filled_heads(&self.layout) {
            // SAFETY: the whole scratch, which is new.
            unsafe { transfer::fill(&launcher.context, copy.address(), 0, bytes) }?;
        }
        let placed =
            Placed { address: copy.address(), strides: strides(&filled), element_bytes: self.dtype.size() as u64 };
        scratch.push(copy);
        Ok(placed)
    }

    /// The copy between the view and scratch.
    fn strided_copy(&self, copy: &Placed) -> StridedCopy {
        let Strides { batch, token, head } = copy.strides;
        // Not negative.
        let steps = [batch, token, head, 1].map(i64::unsigned_abs);
        StridedCopy::new(&self.layout, &steps[4 - self.layout.rank()..], self.dtype.size() as u64)
    }
}

/// The strides of a tensor's rows.
pub fn strides(layout: &Layout) -> Strides {
    // Every stride fits: layouts end below an eighth of the range.
    let [batch, token, head] = row_strides(layout).map(|stride| stride as i64);
    Strides { batch, token, head }
}

/// Where to read. A view whose rows do not start at words, or whose heads are not filled, is first
/// copied to scratch, which must live until the launch.
pub fn place_input(launcher: &Launcher, operand: &Operand<'_>, scratch: &mut Vec<CudaBuffer>) -> Result<Placed> {
    let is_filled = operand.layout.numel() == 0 || has_filled_heads(&operand.layout);
    match operand.misaligned_by() {
        None if is_filled => Ok(operand.placed()),
        _ => place_copy(launcher, operand, scratch),
    }
}

/// [`place_input`] for the copy engine, which takes no stride of 0: such a view is copied too.
pub fn place_input_for_maps(
    launcher: &Launcher,
    operand: &Operand<'_>,
    scratch: &mut Vec<CudaBuffer>,
) -> Result<Placed> {
    let mut dims = operand.layout.shape().iter().zip(operand.layout.strides());
    match dims.any(|(&size, &stride)| size > 1 && stride == 0) {
        false => place_input(launcher, operand, scratch),
        true => place_copy(launcher, operand, scratch),
    }
}

fn place_copy(launcher: &Launcher, operand: &Operand<'_>, scratch: &mut Vec<CudaBuffer>) -> Result<Placed> {
    let placed = operand.place_scratch(launcher, operand.layout.shape(), scratch)?;
    operand.copy_to(launcher, &placed)?;
    Ok(placed)
}
