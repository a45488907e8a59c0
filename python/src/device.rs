//! `varlen_fa.Device`, and the device of a call that names none.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use varlen_fa::{BackendKind, Config, DeviceChoice};

use crate::arrays::{Array, Family, Place};
use crate::errors::{Cause, OrRaise};

/// Where to compute.
#[pyclass(frozen, module = "varlen_fa")]
#[derive(Debug, Clone)]
pub(crate) struct Device(pub varlen_fa::Device);

#[pymethods]
impl Device {
    /// Opens "cpu", "cuda", "cuda:N" or "wgpu"; None takes what VARLEN_FA_DEVICE names, or the best
    /// device present. `threads` is for the CPU device alone.
    ///
    /// Raises DeviceError if it is not available, InvalidValueError for other names.
    #[new]
    #[pyo3(signature = (name=None, *, threads=None))]
    fn open(py: Python<'_>, name: Option<&str>, threads: Option<usize>) -> PyResult<Self> {
        let config = match name {
            None => Config::from_env().or_raise()?,
            Some(name) => Config::from_env_for(name.parse::<DeviceChoice>().or_raise()?).or_raise()?,
        };
        let config = match threads {
            None => config,
            Some(threads) => {
                if config.device != DeviceChoice::Cpu {
                    return Err(Cause::Value.argument("threads", "None beside another device than \"cpu\"", threads));
                }
                let threads = NonZeroUsize::new(threads);
                let threads = threads.ok_or_else(|| Cause::Value.argument("threads", "1 or more", 0))?;
                config.with_threads(Some(threads))
            }
        };
        py.detach(|| varlen_fa::Device::with_config(config)).map(Self).or_raise()
    }

    /// A device over a CUDA stream of the caller's, on which all work is launched: the number that
    /// `torch.cuda.Stream.cuda_stream` and `cupy.cuda.Stream.ptr` are. Stream and context must
    /// outlive the device and everything used with it. `context` 0 is the stream's.
    #[staticmethod]
    #[pyo3(signature = (stream, *, context=0))]
    fn from_cuda(py: Python<'_>, stream: usize, context: usize) -> PyResult<Self> {
        py.detach(|| cuda::device_over(context, stream)).map(Self)
    }

    /// The device that calls on a tensor take where they name none: the CPU, or the GPU that holds it,
    /// on the stream that PyTorch or CuPy works on in this thread.
    #[staticmethod]
    fn of(tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        of_call(None, tensor, &Array::new("tensor", tensor)?)
    }

    /// The device's kind and adapter.
    #[getter]
    fn name(&self) -> &str {
        self.0.name()
    }

    /// "cpu", "wgpu" or "cuda".
    #[getter]
    fn kind(&self) -> &'static str {
        self.0.capabilities().backend.name()
    }

    /// The adapter, with what it is known by.
    #[getter]
    fn adapter(&self) -> String {
        self.0.capabilities().adapter.clone()
    }

    /// Names of the kernels that the device runs, after its self-check.
    #[getter]
    fn kernels(&self) -> Vec<&'static str> {
        self.0.capabilities().kernels.iter().map(|kernel| kernel.name()).collect()
    }

    /// Names of the element types that the device computes with.
    #[getter]
    fn dtypes(&self) -> Vec<&'static str> {
        self.0.capabilities().dtypes.iter().map(|dtype| dtype.name()).collect()
    }

    /// Whether it is a GPU that the processor emulates.
    #[getter]
    fn is_software(&self) -> bool {
        self.0.capabilities().is_software
    }

    /// Waits for all work launched so far.
    fn synchronize(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.synchronize()).or_raise()
    }

    fn __repr__(&self) -> String {
        format!("varlen_fa.Device({})", self.0.name())
    }
}

/// Every device that this build knows of: its name, and its description or why it is not available.
#[pyfunction]
pub(crate) fn list_devices(py: Python<'_>) -> Vec<(String, bool, String)> {
    let reports = py.detach(varlen_fa::Device::list);
    reports.iter().map(|report| (report.choice.to_string(), report.status.is_ok(), report.to_string())).collect()
}

/// The device of a call: the one given; else for host memory the CPU, and for CUDA memory its GPU, on
/// the stream that PyTorch or CuPy works on in this thread.
pub(crate) fn of_call(given: Option<&Bound<'_, Device>>, object: &Bound<'_, PyAny>, array: &Array) -> PyResult<Device> {
    if let Some(given) = given {
        return Ok(given.get().clone());
    }
    match array.place() {
        Place::Host => cpu(object.py()),
        Place::Cuda(ordinal) => on_current_stream(object, array, ordinal),
    }
}

/// The CPU device of calls on host memory, opened once.
fn cpu(py: Python<'_>) -> PyResult<Device> {
    static CPU: PyOnceLock<Device> = PyOnceLock::new();
    let open = || -> PyResult<_> {
        let config = Config::from_env_for(DeviceChoice::Cpu).or_raise()?;
        Ok(Device(varlen_fa::Device::with_config(config).or_raise()?))
    };
    CPU.get_or_try_init(py, open).cloned()
}

/// A device for each GPU and stream that were seen. PyTorch and CuPy keep their streams.
fn on_current_stream(object: &Bound<'_, PyAny>, array: &Array, ordinal: Option<usize>) -> PyResult<Device> {
    static DEVICES: Mutex<Vec<(usize, usize, Device)>> = Mutex::new(Vec::new());
    let py = object.py();
    let (family, ordinal, stream) = match (Family::of(object), ordinal) {
        (Family::Torch, Some(ordinal)) => (Family::Torch, ordinal, torch_stream(py, ordinal)?),
        (Family::CuPy, Some(ordinal)) => {
            let stream = py.import("cupy")?.getattr("cuda")?.call_method1("get_current_stream", (ordinal,))?;
            (Family::CuPy, ordinal, stream.getattr("ptr")?.extract()?)
        }
        _ => {
            let expected = "the device, from Device.from_cuda, for CUDA memory of other packages than PyTorch and CuPy";
            return Err(Cause::DeviceMismatch.argument("device", expected, format!("None for `{}`", array.name())));
        }
    };
    let known = |devices: &[(usize, usize, Device)]| {
        devices.iter().find(|(of, on, _)| (*of, *on) == (ordinal, stream)).map(|(.., device)| device.clone())
    };
    if let Some(device) = known(&DEVICES.lock().unwrap_or_else(PoisonError::into_inner)) {
        return Ok(device);
    }
    // The default stream belongs to whichever context is current.
    let guard = match family {
        Family::Torch => py.import("torch")?.getattr("cuda")?.call_method1("device", (ordinal,))?,
        _ => py.import("cupy")?.getattr("cuda")?.call_method1("Device", (ordinal,))?,
    };
    guard.call_method0("__enter__")?;
    let opened = cuda::device_over(0, stream);
    guard.call_method1("__exit__", (py.None(), py.None(), py.None()))?;
    let device = Device(opened?);
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    // Another thread may have come first; its device has the metadata.
    if let Some(device) = known(&devices) {
        return Ok(device);
    }
    devices.push((ordinal, stream, device.clone()));
    Ok(device)
}

/// The stream that PyTorch works on in this thread. Its compiled code asks for the number without the
/// object around it, which costs microseconds in each call; the public way is for builds that lack it.
fn torch_stream(py: Python<'_>, ordinal: usize) -> PyResult<usize> {
    static RAW: PyOnceLock<Option<Py<PyAny>>> = PyOnceLock::new();
    let raw = RAW.get_or_try_init(py, || {
        let own = py.import("torch")?.getattr("_C")?;
        Ok::<_, PyErr>(own.getattr_opt("_cuda_getCurrentRawStream")?.map(Bound::unbind))
    })?;
    match raw {
        Some(raw) => raw.bind(py).call1((ordinal,))?.extract(),
        None => {
            let stream = py.import("torch")?.getattr("cuda")?.call_method1("current_stream", (ordinal,))?;
            stream.getattr("cuda_stream")?.extract()
        }
    }
}

/// External CUDA streams and memory, or errors in a build without the feature `cuda`.
pub(crate) mod cuda {
    use pyo3::prelude::*;
    use varlen_fa::{Device, DeviceMemory};

    use crate::errors::OrRaise;

    #[cfg(feature = "cuda")]
    pub(crate) fn device_over(context: usize, stream: usize) -> PyResult<Device> {
        use std::ptr::with_exposed_provenance_mut;

        let config = varlen_fa::Config::from_env_for(varlen_fa::DeviceChoice::Cuda(0)).or_raise()?;
        let (context, stream) = (with_exposed_provenance_mut(context), with_exposed_provenance_mut(stream));
        // SAFETY: `Device.from_cuda` says that both are live and outlive the device; PyTorch and CuPy
        // keep the streams that they give out.
        unsafe { Device::from_cuda(context, stream, config) }.or_raise()
    }

    /// CUDA memory of an array, as memory of the device that computes.
    ///
    /// # Safety
    /// It stays valid until the work on it is done.
    #[cfg(feature = "cuda")]
    pub(crate) unsafe fn memory(device: &Device, address: usize, bytes: usize) -> PyResult<DeviceMemory> {
        // SAFETY: by this function's contract.
        unsafe { DeviceMemory::from_cuda(device, address as u64, bytes as u64) }.or_raise()
    }

    #[cfg(not(feature = "cuda"))]
    pub(crate) fn device_over(_context: usize, _stream: usize) -> PyResult<Device> {
        not_built()
    }

    #[cfg(not(feature = "cuda"))]
    pub(crate) unsafe fn memory(_device: &Device, _address: usize, _bytes: usize) -> PyResult<DeviceMemory> {
        not_built()
    }

    #[cfg(not(feature = "cuda"))]
    fn not_built<T>() -> PyResult<T> {
        let why = "varlen-fa was built without its feature `cuda`".to_owned();
        Err(varlen_fa::Error::DeviceUnavailable { device: "cuda".to_owned(), why }).or_raise()
    }
}

/// Whether a device works on host memory directly.
pub(crate) fn is_cpu(device: &varlen_fa::Device) -> bool {
    device.capabilities().backend == BackendKind::Cpu
}
