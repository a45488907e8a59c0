//! Memory of a device that tensors are laid over: allocated here, or the caller's own.

use bytemuck::Pod;

use crate::call::memory::{Sink, Source, Storage};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::Result;
use crate::layout::Layout;
use crate::tensor::{TensorView, TensorViewMut};

/// A range of a device's memory, to be viewed as tensors of any element type and layout.
///
/// Where a view lies outside the memory, or an output shares memory with an input, the call that uses the view is refused.
#[derive(Debug)]
pub struct DeviceMemory {
    device: Device,
    storage: Storage,
}

impl DeviceMemory {
    /// New memory of `bytes` bytes with contents that are not specified.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge), [`Error::OutOfMemory`](crate::Error::OutOfMemory),
    /// [`Error::DeviceLost`](crate::Error::DeviceLost).
    pub fn alloc(device: &Device, bytes: u64) -> Result<Self> {
        Ok(Self::over(device, device.backend()?.alloc(bytes)?))
    }

    /// The application's buffer, of the wgpu device that `device` computes on. Clones of one `wgpu::Buffer` are the same memory:
    /// no call takes an output that lies in the same buffer as one of its inputs.
    ///
    /// The buffer needs usage `STORAGE`; `COPY_SRC` and `COPY_DST` only for [`read`](Self::read) and [`write`](Self::write). It
    /// may be larger than one binding. Its bytes after the last multiple of 4 cannot be bound and do not count. Only what the
    /// views that calls write to cover is ever written. Destroying or mapping the buffer makes later calls fail.
    ///
    /// Inputs may start at any multiple of their element type's size. Where a row does not start at a multiple of 16 bytes of
    /// the buffer, an input is copied to scratch by a shader, and an output is refused.
    ///
    /// # Errors
    /// [`Error::BufferUsage`](crate::Error::BufferUsage) that names the missing usage;
    /// [`Error::BufferUnusable`](crate::Error::BufferUnusable) for a buffer that is destroyed, mapped, empty or of another wgpu
    /// device (one of another `wgpu::Instance` cannot always be told from the device's own);
    /// [`Error::DeviceKind`](crate::Error::DeviceKind) if `device` is not a wgpu device,
    /// [`Error::DeviceLost`](crate::Error::DeviceLost).
    #[cfg(feature = "wgpu")]
    pub fn from_wgpu(device: &Device, buffer: ::wgpu::Buffer) -> Result<Self> {
        Ok(Self::over(device, device.wgpu_backend()?.import(buffer)?))
    }

    /// Memory of the caller's on a CUDA device: `bytes` bytes from a device address, which is any that belongs to the context's
    /// GPU, or managed or registered host memory that kernels see at this address. It is never freed here.
    ///
    /// It may start anywhere. Elements must lie at multiples of their size. Inputs whose rows do not start at multiples of
    /// 16 bytes are copied on the device before each use; outputs must start there.
    ///
    /// # Errors
    /// [`Error::DeviceMismatch`](crate::Error::DeviceMismatch) if the device is not a CUDA one.
    /// [`Error::Handle`](crate::Error::Handle) for null with bytes, a range past the last address, memory of another GPU, memory
    /// that the driver does not know (freed, or of the host; but what a graph allocates is unknown while the device's stream is being
    /// captured, so that is taken on trust), and, where the driver says how long the allocation is, more bytes
    /// than that.
    ///
    /// # Safety
    /// The memory stays allocated until this is dropped and the work launched by then is done; a graph that the work was captured
    /// into uses it each time it runs. Work outside the device's stream that writes it, or reads what is written here, is ordered
    /// with that stream by the caller.
    #[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
    pub unsafe fn from_cuda(device: &Device, address: u64, bytes: u64) -> Result<Self> {
        // SAFETY: by the caller's promise.
        let storage = unsafe { crate::backends::cuda::external_memory(device.backend()?, address, bytes) }?;
        Ok(Self::over(device, storage))
    }

    pub(crate) fn over(device: &Device, storage: Storage) -> Self {
        Self { device: device.clone(), storage }
    }

    /// The device that holds the memory.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        match &self.storage {
            Storage::Host(words) => size_of_val(&words[..]) as u64,
            Storage::Device(buffer) => buffer.size(),
        }
    }

    /// Copies host data to the start of the memory.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`](crate::Error::BufferTooSmall) if it does not fit, [`Error::DeviceLost`](crate::Error::DeviceLost);
    /// [`Error::BufferUsage`](crate::Error::BufferUsage) or [`Error::BufferUnusable`](crate::Error::BufferUnusable) if a buffer of
    /// the application's does not allow it;
    /// [`Error::WouldBlock`](crate::Error::WouldBlock) in a browser, if the data ends inside a u32 of a buffer of the application's.
    pub fn write<T: Pod>(&mut self, data: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        self.expect_room(bytes.len())?;
        let device = self.device.clone();
        device.backend()?.upload(self.sink(), bytes)
    }

    /// Copies the start of the memory to the host, after all work launched so far.
    ///
    /// # Errors
    /// As [`write`](Self::write), and whatever failed since the last call.
    pub fn read<T: Pod>(&self, into: &mut [T]) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(into);
        self.expect_room(bytes.len())?;
        self.device.backend()?.download(self.source(), bytes)
    }

    /// [`read`](Self::read) for code that also runs in a browser: there it gives the thread back until the copy is done,
    /// elsewhere it waits.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn read_async<T: Pod>(&self, into: &mut [T]) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(into);
        self.expect_room(bytes.len())?;
        self.device.backend()?.download_async(self.source(), bytes).await
    }

    /// Part of the memory as a tensor to read. The layout counts elements from the start of the memory.
    #[must_use]
    pub fn view(&self, dtype: DType, layout: Layout) -> TensorView<'_> {
        TensorView::over(self.source(), dtype, layout)
    }

    /// Part of the memory as a tensor to write. The layout counts elements from the start of the memory.
    #[must_use]
    pub fn view_mut(&mut self, dtype: DType, layout: Layout) -> TensorViewMut<'_> {
        TensorViewMut::over(self.sink(), dtype, layout)
    }

    pub(crate) fn source(&self) -> Source<'_> {
        self.storage.source()
    }

    pub(crate) fn sink(&mut self) -> Sink<'_> {
        self.storage.sink()
    }

    fn expect_room(&self, bytes: usize) -> Result<()> {
        let (expected, got) = (bytes as u64, self.size());
        if expected <= got {
            return Ok(());
        }
        Err(crate::Error::BufferTooSmall { argument: "memory", expected, got })
    }
}
