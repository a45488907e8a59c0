//! Tensors: owned by this library, or views of them and of external memory.

pub(crate) mod device_meta;
pub(crate) mod memory;
mod segments;
mod view;

pub use segments::{Segments, SegmentsMut};
pub use view::{TensorView, TensorViewMut};

use crate::call::memory::Storage;
use crate::call::op::Op;
use crate::device::Device;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::host_vec;
use crate::layout::Layout;

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
        tensor.fill_zeros()?;
        Ok(tensor)
    }

    /// Writes zeros to every element.
    pub(crate) fn fill_zeros(&mut self) -> Result<()> {
        let device = self.device.clone();
        device.backend()?.execute(Op::Zero(self.view_mut().output()))
    }

    /// A copy of host data, row-major.
    ///
    /// # Errors
    /// [`Error::Length`] if `data` has not as many elements as the shape, and those of [`zeros`](Self::zeros).
    pub fn from_slice<T: Element>(device: &Device, data: &[T], shape: &[usize]) -> Result<Self> {
        Error::expect_length("data", Layout::contiguous(shape)?.numel(), data.len())?;
        let mut tensor = Self::uninit(device, T::DTYPE, shape)?;
        let sink = tensor.view_mut().memory;
        device.backend()?.upload(sink, bytemuck::cast_slice(data))?;
        Ok(tensor)
    }

    /// A tensor whose contents are not specified; for outputs that are written in full.
    pub(crate) fn uninit(device: &Device, dtype: DType, shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous(shape)?;
        let storage = device.backend()?.alloc(layout.numel() as u64 * dtype.size() as u64)?;
        Ok(Self { device: device.clone(), storage, layout, dtype })
    }

    /// The same memory in another form, of as many bytes.
    pub(crate) fn with_form(self, dtype: DType, layout: Layout) -> Self {
        Self { dtype, layout, ..self }
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
        TensorView::over(self.storage.source(), self.dtype, self.layout)
    }

    /// The whole tensor, to write.
    #[must_use]
    pub fn view_mut(&mut self) -> TensorViewMut<'_> {
        TensorViewMut::over(self.storage.sink(), self.dtype, self.layout)
    }

    /// Copies the tensor to the host, row-major; waits for the work that writes it.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] if `T` is not the tensor's element type, [`Error::OutOfMemory`], [`Error::DeviceLost`], or whatever
    /// failed since the last call; [`Error::WouldBlock`] on a wgpu device in a browser.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        let mut data = self.host_room()?;
        self.device.backend()?.download(self.view().memory, bytemuck::cast_slice_mut(&mut data))?;
        Ok(data)
    }

    /// [`to_vec`](Self::to_vec) for code that also runs in a browser: there it gives the thread back until the copy is done,
    /// elsewhere it waits.
    ///
    /// # Errors
    /// As [`to_vec`](Self::to_vec).
    pub async fn to_vec_async<T: Element>(&self) -> Result<Vec<T>> {
        let mut data = self.host_room()?;
        self.device.backend()?.download_async(self.view().memory, bytemuck::cast_slice_mut(&mut data)).await?;
        Ok(data)
    }

    /// Zeros on the host, one for each element.
    fn host_room<T: Element>(&self) -> Result<Vec<T>> {
        if T::DTYPE != self.dtype {
            return Err(Error::DTypeMismatch { argument: "T", expected: self.dtype, got: T::DTYPE });
        }
        host_vec::filled(T::zeroed(), self.layout.numel())
    }

    /// Overwrites the tensor with host data, row-major.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] or [`Error::Length`] if the data does not fit, [`Error::DeviceLost`].
    pub fn write<T: Element>(&mut self, data: &[T]) -> Result<()> {
        if T::DTYPE != self.dtype {
            return Err(Error::DTypeMismatch { argument: "data", expected: self.dtype, got: T::DTYPE });
        }
        Error::expect_length("data", self.layout.numel(), data.len())?;
        let device = self.device.clone();
        device.backend()?.upload(self.view_mut().memory, bytemuck::cast_slice(data))
    }
}

impl<'a> From<&'a Tensor> for TensorView<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        tensor.view()
    }
}

impl<'a> From<&'a mut Tensor> for TensorViewMut<'a> {
    fn from(tensor: &'a mut Tensor) -> Self {
        tensor.view_mut()
    }
}
