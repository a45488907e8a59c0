//! Borrowed tensors: to read, or to write.

use std::ops::Range;

use crate::cache::DeviceId;
use crate::call::memory::{DeviceBuffer, Input, Output, Sink, Source};
use crate::call::problem::ViewInfo;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::kernel::BackendKind;
use crate::layout::Layout;

/// Host memory is one address space; memory of other devices lies in others.
const HOST_SPACE: u64 = 0;

/// What both views have: a layout, and views of themselves.
macro_rules! layout_of_view {
    ($view:ident) => {
        impl $view<'_> {
            /// Where the elements lie.
            #[must_use]
            pub fn layout(&self) -> &Layout {
                &self.layout
            }

            /// Size of each dimension.
            #[must_use]
            pub fn shape(&self) -> &[usize] {
                self.layout.shape()
            }

            /// Element type.
            #[must_use]
            pub fn dtype(&self) -> DType {
                self.dtype
            }

            /// The view with its dimensions in another order.
            ///
            /// # Errors
            /// [`Error::View`] if `order` is not a permutation of the dimensions.
            pub fn permute(self, order: &[usize]) -> Result<Self> {
                Ok(Self { layout: self.layout.permute(order)?, ..self })
            }

            /// The part of the view with `range` in dimension `dim`.
            ///
            /// # Errors
            /// [`Error::View`] if there is no such part.
            pub fn slice(self, dim: usize, range: Range<usize>) -> Result<Self> {
                Ok(Self { layout: self.layout.slice(dim, range)?, ..self })
            }

            /// The same memory with another layout. That it stays inside the memory is checked when the view is used.
            #[must_use]
            pub fn with_layout(self, layout: Layout) -> Self {
                Self { layout, ..self }
            }
        }
    };
}
layout_of_view!(TensorView);
layout_of_view!(TensorViewMut);

/// A borrowed tensor to read: all or part of a [`Tensor`](crate::Tensor), or host memory of the caller (CPU device).
///
/// Any strides are allowed, except that attention wants the last dimension contiguous: a slice of a fused QKV projection or a
/// permuted `[B, H, S, D]` tensor needs no copy.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    pub(super) memory: Source<'a>,
    layout: Layout,
    dtype: DType,
}

impl<'a> TensorView<'a> {
    /// Host memory as a row-major tensor of the CPU device.
    ///
    /// # Errors
    /// [`Error::Length`] if `data` has not as many elements as the shape; [`Error::Rank`] or [`Error::TooLarge`].
    pub fn from_host<T: Element>(data: &'a [T], shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous(shape)?;
        Error::expect_length("data", layout.numel(), data.len())?;
        Ok(Self::from_host_strided(data, layout))
    }

    /// Host memory with any layout as a tensor of the CPU device. That the layout stays inside the memory is checked when the
    /// view is used.
    #[must_use]
    pub fn from_host_strided<T: Element>(data: &'a [T], layout: Layout) -> Self {
        Self { memory: Source::Host(bytemuck::cast_slice(data)), layout, dtype: T::DTYPE }
    }

    pub(crate) fn over(memory: Source<'a>, dtype: DType, layout: Layout) -> Self {
        Self { memory, layout, dtype }
    }

    pub(crate) fn input(self) -> Input<'a> {
        Input { memory: self.memory, layout: self.layout, dtype: self.dtype }
    }

    pub(crate) fn info(&self) -> ViewInfo<'_> {
        let whole = match self.memory {
            Source::Host(bytes) => Whole::Host { address: bytes.as_ptr() as usize, bytes: bytes.len() },
            Source::Device(buffer) => Whole::Device(buffer),
        };
        view_info(whole, self.layout, self.dtype)
    }
}

/// A borrowed tensor to write.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    pub(super) memory: Sink<'a>,
    layout: Layout,
    dtype: DType,
}

impl<'a> TensorViewMut<'a> {
    /// Host memory as a row-major tensor of the CPU device.
    ///
    /// # Errors
    /// [`Error::Length`] if `data` has not as many elements as the shape; [`Error::Rank`] or [`Error::TooLarge`].
    pub fn from_host<T: Element>(data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous(shape)?;
        Error::expect_length("data", layout.numel(), data.len())?;
        Ok(Self::from_host_strided(data, layout))
    }

    /// Host memory with any layout as a tensor of the CPU device. That the layout stays inside the memory, and that no two
    /// elements share a place, is checked when the view is used.
    #[must_use]
    pub fn from_host_strided<T: Element>(data: &'a mut [T], layout: Layout) -> Self {
        Self { memory: Sink::Host(bytemuck::cast_slice_mut(data)), layout, dtype: T::DTYPE }
    }

    pub(crate) fn over(memory: Sink<'a>, dtype: DType, layout: Layout) -> Self {
        Self { memory, layout, dtype }
    }

    /// The same view, for a shorter time.
    pub(crate) fn reborrow(&mut self) -> TensorViewMut<'_> {
        TensorViewMut { memory: self.memory.reborrow(), layout: self.layout, dtype: self.dtype }
    }

    /// Another view of the same memory, where a device writes it: none of host memory, which this view alone may write. No two
    /// calls, and no two outputs of a call, may write the same elements.
    pub(crate) fn alias(&self) -> Option<TensorViewMut<'a>> {
        match self.memory {
            Sink::Device(buffer) => {
                Some(TensorViewMut { memory: Sink::Device(buffer), layout: self.layout, dtype: self.dtype })
            }
            Sink::Host(_) => None,
        }
    }

    /// Consecutive row-major tensors of these shapes in the view's memory, from its first element on. The view is contiguous.
    ///
    /// # Errors
    /// [`Error::Length`] if they do not fill the view.
    pub(crate) fn split_into(self, shapes: &[[usize; 3]]) -> Result<Vec<Self>> {
        let sizes = shapes.iter().map(|shape| shape.iter().product::<usize>());
        Error::expect_length("shapes", self.layout.numel(), sizes.clone().sum())?;
        let Self { mut memory, layout, dtype } = self;
        let mut offset = layout.offset();
        let mut parts = Vec::with_capacity(shapes.len());
        for (shape, size) in shapes.iter().zip(sizes) {
            let end = offset + size as u64;
            let (part, start) = (Layout::contiguous_at(shape, offset)?, end * dtype.size() as u64);
            let memory_of_part;
            (memory_of_part, memory, offset) = match memory {
                Sink::Device(buffer) => (Sink::Device(buffer), Sink::Device(buffer), end),
                Sink::Host(bytes) => {
                    let whole = bytes.len();
                    let (first, rest) = bytes.split_at_mut(whole.min(start as usize));
                    (Sink::Host(first), Sink::Host(rest), 0)
                }
            };
            parts.push(Self { memory: memory_of_part, layout: part, dtype });
        }
        Ok(parts)
    }

    /// The view, to read what was written.
    pub(crate) fn as_view(&self) -> TensorView<'_> {
        TensorView { memory: self.memory.source(), layout: self.layout, dtype: self.dtype }
    }

    pub(crate) fn output(self) -> Output<'a> {
        Output { memory: self.memory, layout: self.layout, dtype: self.dtype }
    }

    pub(crate) fn info(&self) -> ViewInfo<'_> {
        let whole = match &self.memory {
            Sink::Host(bytes) => Whole::Host { address: bytes.as_ptr() as usize, bytes: bytes.len() },
            Sink::Device(buffer) => Whole::Device(*buffer),
        };
        view_info(whole, self.layout, self.dtype)
    }
}

/// All the memory that a view indexes.
enum Whole<'a> {
    Host { address: usize, bytes: usize },
    Device(&'a dyn DeviceBuffer),
}

fn view_info(whole: Whole<'_>, layout: Layout, dtype: DType) -> ViewInfo<'_> {
    let size = dtype.size() as u64;
    match whole {
        Whole::Host { address, bytes } => {
            let start = (address as u64).saturating_add(layout.offset() * size);
            let end = (address as u64).saturating_add(layout.end() * size);
            let (device, device_name) = (DeviceId::CPU, BackendKind::Cpu.name());
            ViewInfo {
                layout,
                dtype,
                device,
                device_name,
                memory_bytes: bytes as u64,
                space: HOST_SPACE,
                touched: start..end,
            }
        }
        Whole::Device(buffer) => ViewInfo {
            layout,
            dtype,
            device: buffer.device(),
            device_name: buffer.device_name(),
            memory_bytes: buffer.size(),
            space: buffer.space(),
            touched: buffer.touched(layout.offset() * size..layout.end() * size),
        },
    }
}
