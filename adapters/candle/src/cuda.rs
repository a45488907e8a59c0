//! candle's CUDA devices, and views of their memory.

use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice};
use candle_core::{CudaStorage, Error, Layout, Result, Shape};
use varlen_fa::{Config, DType, Device, DeviceChoice, DeviceMemory, TensorView, TensorViewMut};

use crate::layout;

/// `CU_STREAM_PER_THREAD`, which candle's devices have unless they are made with a stream of their own.
const PER_THREAD_STREAM: usize = 2;

/// A device over one of candle's streams, which it keeps, and with it the context.
struct Opened {
    stream: Arc<CudaStream>,
    device: Device,
}

/// The library's device on the context and the stream of one of candle's. It is opened when it is first asked for, and stays: what
/// was uploaded for it, metadata for example, must not outlive the stream.
///
/// The stream per thread is another one in each thread, so the library takes the legacy default stream instead: the driver orders the
/// two as one, in both directions.
fn device(of: &CudaDevice) -> Result<Device> {
    static OPENED: Mutex<Vec<Opened>> = Mutex::new(Vec::new());
    let stream = of.cuda_stream();
    let handles = |stream: &CudaStream| (stream.context().cu_ctx(), stream.cu_stream());
    // A panic while it is held leaves nothing half done.
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    // Handles of streams that are kept are not given to others.
    if let Some(found) = opened.iter().find(|opened| handles(&opened.stream) == handles(&stream)) {
        return Ok(found.device.clone());
    }
    let (context, handle) = handles(&stream);
    let handle = if handle as usize == PER_THREAD_STREAM { ptr::null_mut() } else { handle };
    let config = Config::from_env_for(DeviceChoice::Cuda(stream.context().ordinal())).map_err(Error::wrap)?;
    // SAFETY: both handles are live, and stay so: the stream is kept as long as the process, and keeps its context.
    let device = unsafe { Device::from_cuda(context.cast(), handle.cast(), config) }.map_err(Error::wrap)?;
    opened.push(Opened { stream, device: device.clone() });
    Ok(device)
}

/// An element type that both libraries have on CUDA devices, or know that they have not.
pub trait Shared: varlen_fa::Element + CudaDType + DeviceRepr {}

impl<T: varlen_fa::Element + CudaDType + DeviceRepr> Shared for T {}

/// A storage where it lies, as the library has it. What reads it is launched before this is dropped, which tells candle so.
struct Input<'a> {
    memory: DeviceMemory,
    _read: SyncOnDrop<'a>,
}

impl<'a> Input<'a> {
    fn new<T: Shared>(argument: &str, storage: &'a CudaStorage, on: &Device, stream: &'a CudaStream) -> Result<Self> {
        let Ok(slice) = storage.as_cuda_slice::<T>() else {
            let got = candle_core::backend::BackendStorage::dtype(storage);
            candle_core::bail!(
                "`{argument}`: expected elements of type {}, those of q, got {}",
                T::DTYPE,
                got.as_str()
            );
        };
        // Waits, on the stream, for what another stream wrote there.
        let (address, read) = slice.device_ptr(stream);
        // SAFETY: the storage outlives this, and candle frees it in the order of its stream, after what is launched meanwhile.
        let memory = unsafe { DeviceMemory::from_cuda(on, address, bytes_of(slice)) }.map_err(Error::wrap)?;
        Ok(Self { memory, _read: read })
    }

    fn view(&self, dtype: DType, at: &Layout) -> Result<TensorView<'_>> {
        Ok(self.memory.view(dtype, layout::of(at)?))
    }
}

fn bytes_of<T>(slice: &CudaSlice<T>) -> u64 {
    slice.num_bytes() as u64
}

/// Has `launch` compute an output like q from q, k and v, on the stream of q's device. The output is the one allocation.
pub fn forward<T: Shared>(
    inputs: [(&CudaStorage, &Layout); 3],
    launch: impl FnOnce(&Device, [TensorView<'_>; 3], TensorViewMut<'_>) -> varlen_fa::Result<()>,
) -> Result<(CudaStorage, Shape)> {
    let [(q, q_layout), (k, k_layout), (v, v_layout)] = inputs;
    let (candle, shape) = (q.device.clone(), q_layout.shape().clone());
    let (device, stream) = (device(&candle)?, candle.cuda_stream());
    // SAFETY: every element is written before anything reads it, in the order of the stream.
    let mut out = unsafe { candle.alloc::<T>(shape.elem_count()) }?;
    {
        let [q, k, v] = [("q", q), ("k", k), ("v", v)].map(|(name, x)| Input::new::<T>(name, x, &device, &stream));
        let (q, k, v) = (q?, k?, v?);
        let bytes = bytes_of(&out);
        let (address, _written) = out.device_ptr_mut(&stream);
        // SAFETY: as of the inputs.
        let mut memory = unsafe { DeviceMemory::from_cuda(&device, address, bytes) }.map_err(Error::wrap)?;
        let contiguous = varlen_fa::Layout::contiguous(shape.dims()).map_err(Error::wrap)?;
        let views = [q.view(T::DTYPE, q_layout)?, k.view(T::DTYPE, k_layout)?, v.view(T::DTYPE, v_layout)?];
        launch(&device, views, memory.view_mut(T::DTYPE, contiguous)).map_err(Error::wrap)?;
    }
    Ok((CudaStorage::wrap_cuda_slice(out, candle), shape))
}
