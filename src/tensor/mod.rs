//! Tensors: owned by this library, or borrowed from the caller's memory.

pub(crate) mod device_meta;
pub(crate) mod memory;

use std::ops::Range;

use crate::cache::DeviceId;
use crate::call::op::{Input, Op, Output, Sink, Source, Storage};
use crate::call::problem::ViewInfo;
use crate::device::Device;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::layout::Layout;

/// Host memory is one address space; memory of other devices lies in others.
const HOST_SPACE: u64 = 0;

/// A tensor that owns its memory on a device; row-major.
#[derive(Debug)]
pub struct Tensor {
    device: Device,
    storage: Storage,
    layout: Layout,
    dtype: DType,
}

impl Tensor {
    /// A tensor of zeros.
    ///
    /// # Errors
    /// [`Error::Rank`] or [`Error::TooLarge`] for shapes that cannot be, [`Error::OutOfMemory`].
    pub fn zeros(device: &Device, dtype: DType, shape: &[usize]) -> Result<Self> {
        let mut tensor = Self::uninit(device, dtype, shape)?;
        let output = tensor.view_mut().output();
        device.backend().execute(Op::Zero(output))?;
        Ok(tensor)
    }

    /// A copy of host data, row-major.
    ///
    /// # Errors
    /// [`Error::Length`] if `data` has not as many elements as the shape, and those of [`zeros`](Self::zeros).
    pub fn from_slice<T: Element>(device: &Device, data: &[T], shape: &[usize]) -> Result<Self> {
        expect_length("data", data.len(), &Layout::contiguous(shape)?)?;
        let mut tensor = Self::uninit(device, T::DTYPE, shape)?;
        let sink = tensor.view_mut().memory;
        device.backend().upload(sink, bytemuck::cast_slice(data))?;
        Ok(tensor)
    }

    /// A tensor whose contents are not specified; for outputs that are written in full.
    pub(crate) fn uninit(device: &Device, dtype: DType, shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous(shape)?;
        let storage = device.backend().alloc(layout.numel() as u64 * dtype.size() as u64)?;
        Ok(Self { device: device.clone(), storage, layout, dtype })
    }

    /// The device that holds the tensor.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Size of each dimension.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// The whole tensor, to read.
    #[must_use]
    pub fn view(&self) -> TensorView<'_> {
        TensorView { memory: self.storage.source(), layout: self.layout, dtype: self.dtype }
    }

    /// The whole tensor, to write.
    #[must_use]
    pub fn view_mut(&mut self) -> TensorViewMut<'_> {
        TensorViewMut { memory: self.storage.sink(), layout: self.layout, dtype: self.dtype }
    }

    /// Copies the tensor to the host, row-major; waits for the work that writes it.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] if `T` is not the tensor's element type, [`Error::OutOfMemory`], [`Error::DeviceLost`], or whatever
    /// failed since the last call; [`Error::WouldBlock`] on a wgpu device in a browser.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        let mut data = self.host_room()?;
        self.device.backend().download(self.view().memory, bytemuck::cast_slice_mut(&mut data))?;
        Ok(data)
    }

    /// [`to_vec`](Self::to_vec) for code that also runs in a browser: there it gives the thread back until the copy is done,
    /// elsewhere it waits.
    ///
    /// # Errors
    /// As [`to_vec`](Self::to_vec).
    pub async fn to_vec_async<T: Element>(&self) -> Result<Vec<T>> {
        let mut data = self.host_room()?;
        self.device.backend().download_async(self.view().memory, bytemuck::cast_slice_mut(&mut data)).await?;
        Ok(data)
    }

    /// Zeros on the host, one for each element.
    fn host_room<T: Element>(&self) -> Result<Vec<T>> {
        if T::DTYPE != self.dtype {
            return Err(Error::DTypeMismatch { argument: "T", expected: self.dtype, got: T::DTYPE });
        }
        let mut data = Vec::new();
        let count = self.layout.numel();
        data.try_reserve_exact(count).map_err(|error| Error::OutOfMemory {
            device: "cpu".to_owned(),
            requested: (count * self.dtype.size()) as u64,
            why: error.to_string(),
        })?;
        data.resize(count, T::zeroed());
        Ok(data)
    }

    /// Overwrites the tensor with host data, row-major.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] or [`Error::Length`] if the data does not fit, [`Error::DeviceLost`].
    pub fn write<T: Element>(&mut self, data: &[T]) -> Result<()> {
        if T::DTYPE != self.dtype {
            return Err(Error::DTypeMismatch { argument: "data", expected: self.dtype, got: T::DTYPE });
        }
        expect_length("data", data.len(), &self.layout)?;
        let device = self.device.clone();
        device.backend().upload(self.view_mut().memory, bytemuck::cast_slice(data))
    }
}

/// A borrowed tensor to read: all or part of a [`Tensor`], or host memory of the caller (CPU device).
///
/// Any strides are allowed, except that attention wants the last dimension contiguous: a slice of a fused QKV projection or a
/// permuted `[B, H, S, D]` tensor needs no copy.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    memory: Source<'a>,
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
        expect_length("data", data.len(), &layout)?;
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

impl<'a> From<&'a Tensor> for TensorView<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        tensor.view()
    }
}

/// A borrowed tensor to write.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    memory: Sink<'a>,
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
        expect_length("data", data.len(), &layout)?;
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

impl<'a> From<&'a mut Tensor> for TensorViewMut<'a> {
    fn from(tensor: &'a mut Tensor) -> Self {
        tensor.view_mut()
    }
}

/// All the memory that a view indexes.
enum Whole<'a> {
    Host { address: usize, bytes: usize },
    Device(&'a dyn crate::call::op::DeviceBuffer),
}

fn view_info(whole: Whole<'_>, layout: Layout, dtype: DType) -> ViewInfo<'_> {
    let size = dtype.size() as u64;
    match whole {
        Whole::Host { address, bytes } => {
            let start = (address as u64).saturating_add(layout.offset() * size);
            let end = (address as u64).saturating_add(layout.end() * size);
            let (device, device_name) = (DeviceId::CPU, "cpu");
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

fn expect_length(argument: &'static str, got: usize, layout: &Layout) -> Result<()> {
    let expected = layout.numel();
    if got == expected {
        return Ok(());
    }
    Err(Error::Length { argument, expected, got })
}
