//! Where a `[B, S, H, D]` tensor lies inside a larger one.

use std::array::from_fn;

use anyhow::Result;
use varlen_fa::{TensorView, TensorViewMut};

/// A tensor's dimensions in memory, and the room around them. The last dimension stays innermost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// `order[i]` is the tensor's dimension that is the `i`-th of the memory, outermost first.
    pub order: [usize; 4],
    /// Places of memory before and after the tensor, for each of the tensor's own dimensions.
    pub margin: [(usize, usize); 4],
}

impl Placement {
    /// Row-major, with nothing around it.
    pub const CONTIGUOUS: Self = Self { order: [0, 1, 2, 3], margin: [(0, 0); 4] };
    /// `[B, H, S, D]` in memory.
    pub const HEADS_OUTSIDE: Self = Self { order: [0, 2, 1, 3], ..Self::CONTIGUOUS };
    /// Row-major inside a tensor that is larger in every dimension; rows keep a 16-byte alignment.
    pub const ROOM_AROUND: Self = Self { order: [0, 1, 2, 3], margin: [(1, 1), (2, 3), (1, 2), (8, 16)] };
    /// Sequence outermost, batch next to the rows, room around.
    pub const TURNED: Self = Self { order: [1, 2, 0, 3], margin: [(1, 0), (0, 1), (2, 0), (0, 8)] };

    /// The part `range` of the heads of a `[B, S, heads, D]` tensor, such as a fused QKV projection.
    pub fn among_heads(before: usize, after: usize) -> Self {
        Self { margin: [(0, 0), (0, 0), (before, after), (0, 0)], ..Self::CONTIGUOUS }
    }

    /// Shape of the memory.
    pub fn memory_shape(&self, shape: [usize; 4]) -> [usize; 4] {
        self.order.map(|dim| self.margin[dim].0 + shape[dim] + self.margin[dim].1)
    }

    /// Number of elements of the memory.
    pub fn memory_len(&self, shape: [usize; 4]) -> usize {
        self.memory_shape(shape).iter().product()
    }

    /// The place in memory of each row of D elements, in the tensor's own row-major order. Computed here, not asked of the
    /// library.
    pub fn rows(&self, shape: [usize; 4]) -> Vec<usize> {
        let memory = self.memory_shape(shape);
        let mut strides = [0; 4];
        let mut stride = 1;
        for (&dim, size) in self.order.iter().zip(memory).rev() {
            strides[dim] = stride;
            stride *= size;
        }
        let first: usize = (0..4).map(|dim| self.margin[dim].0 * strides[dim]).sum();
        let mut rows = Vec::with_capacity(shape[..3].iter().product());
        for b in 0..shape[0] {
            for s in 0..shape[1] {
                rows.extend((0..shape[2]).map(|h| first + b * strides[0] + s * strides[1] + h * strides[2]));
            }
        }
        rows
    }

    /// The tensor's view of its memory, to read.
    pub fn view<'a>(&self, memory: TensorView<'a>, shape: [usize; 4]) -> Result<TensorView<'a>> {
        let sliced = self.order.iter().enumerate().try_fold(memory, |view, (at, &dim)| {
            let before = self.margin[dim].0;
            view.slice(at, before..before + shape[dim])
        })?;
        Ok(sliced.permute(&self.inverse_order())?)
    }

    /// The tensor's view of its memory, to write.
    pub fn view_mut<'a>(&self, memory: TensorViewMut<'a>, shape: [usize; 4]) -> Result<TensorViewMut<'a>> {
        let sliced = self.order.iter().enumerate().try_fold(memory, |view, (at, &dim)| {
            let before = self.margin[dim].0;
            view.slice(at, before..before + shape[dim])
        })?;
        Ok(sliced.permute(&self.inverse_order())?)
    }

    fn inverse_order(&self) -> [usize; 4] {
        from_fn(|dim| self.order.iter().position(|&at| at == dim).unwrap_or(dim))
    }
}
