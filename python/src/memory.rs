//! Tensors of the caller as inputs and outputs of a call. The CPU device works on host memory itself,
//! a CUDA device on CUDA memory; other devices work on copies of host memory.

use pyo3::prelude::*;
use varlen_fa::{BackendKind, DType, Device, DeviceMemory, Element, Layout, TensorView, TensorViewMut, bf16, f16};

use crate::arrays::{Array, Place, reserve, row_major};
use crate::device::{cuda, is_cpu};
use crate::errors::{Cause, OrRaise};

/// An input in memory that the device reads.
#[derive(Debug)]
pub(crate) struct Input<'a> {
    array: &'a Array,
    dtype: DType,
    memory: Option<(DeviceMemory, Layout)>,
}

impl<'a> Input<'a> {
    pub fn new(device: &Device, array: &'a Array) -> PyResult<Self> {
        let dtype = array.dtype()?;
        let memory = match array.place() {
            Place::Cuda(_) => Some((cuda_memory(device, array)?, *array.layout())),
            Place::Host if is_cpu(device) => None,
            Place::Host => {
                let rows = array.gather()?;
                let mut memory = DeviceMemory::alloc(device, rows.len() as u64).or_raise()?;
                memory.write(&rows).or_raise()?;
                Some((memory, row_major(array.shape())?))
            }
        };
        Ok(Self { array, dtype, memory })
    }

    pub fn view(&self) -> TensorView<'_> {
        if let Some((memory, layout)) = &self.memory {
            return memory.view(self.dtype, *layout);
        }
        match self.dtype {
            DType::F16 => host_view::<f16>(self.array),
            DType::Bf16 => host_view::<bf16>(self.array),
            _ => host_view::<f32>(self.array),
        }
    }
}

/// An output in memory that the device writes.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    array: &'a Array,
    dtype: DType,
    memory: Option<(DeviceMemory, Layout)>,
}

impl<'a> Output<'a> {
    pub fn new(device: &Device, array: &'a Array) -> PyResult<Self> {
        array.expect_writable()?;
        let dtype = array.dtype()?;
        let memory = match array.place() {
            Place::Cuda(_) => Some((cuda_memory(device, array)?, *array.layout())),
            Place::Host if is_cpu(device) => None,
            Place::Host => {
                let layout = array.layout();
                if layout.self_overlaps() {
                    let got = format!("shape {:?} with strides {:?}", layout.shape(), layout.strides());
                    return Err(Cause::Layout.argument(array.name(), "elements that share no memory", got));
                }
                // What the call leaves as it is, or reads, must be there.
                let rows = array.gather()?;
                let mut memory = DeviceMemory::alloc(device, rows.len() as u64).or_raise()?;
                memory.write(&rows).or_raise()?;
                Some((memory, row_major(layout.shape())?))
            }
        };
        Ok(Self { array, dtype, memory })
    }

    pub fn view_mut(&mut self) -> TensorViewMut<'_> {
        if let Some((memory, layout)) = &mut self.memory {
            return memory.view_mut(self.dtype, *layout);
        }
        match self.dtype {
            DType::F16 => host_view_mut::<f16>(self.array),
            DType::Bf16 => host_view_mut::<bf16>(self.array),
            _ => host_view_mut::<f32>(self.array),
        }
    }

    /// Copies what the device wrote to host memory, where it worked on a copy; waits for the work.
    pub fn finish(self) -> PyResult<()> {
        let (Some((memory, _)), Place::Host) = (&self.memory, self.array.place()) else { return Ok(()) };
        let size = self.dtype.size();
        let mut rows = reserve(self.array.layout().numel() * size)?;
        rows.resize(self.array.layout().numel() * size, 0);
        memory.read(&mut rows).or_raise()?;
        // SAFETY: in host memory; an output is the call's own.
        let host = unsafe { host_bytes_mut(self.array) };
        self.array.layout().for_each_row(size, |strided, dense| host[strided].copy_from_slice(&rows[dense]));
        Ok(())
    }
}

/// Checks that no output shares host memory with an input or another output, before any reference to
/// the memory exists. Tensors that interleave count as sharing. The library checks device memory.
pub(crate) fn expect_apart(outputs: &[&Array], inputs: &[&Array]) -> PyResult<()> {
    let range = |array: &Array| array.address().addr()..array.address().addr() + array.byte_len();
    for (at, output) in outputs.iter().enumerate() {
        for other in inputs.iter().chain(&outputs[at + 1..]) {
            let (a, b) = (range(output), range(other));
            let both_on_host = output.place() == Place::Host && other.place() == Place::Host;
            if both_on_host && !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end {
                return Err(Cause::Layout.exception(format!(
                    "`{}` may share memory with `{}`: an output needs a range of addresses to itself",
                    output.name(),
                    other.name()
                )));
            }
        }
    }
    Ok(())
}

fn cuda_memory(device: &Device, array: &Array) -> PyResult<DeviceMemory> {
    if device.capabilities().backend != BackendKind::Cuda {
        let expected = format!("a tensor in host memory for device {}", device.name());
        return Err(Cause::DeviceMismatch.argument(array.name(), expected, "one in CUDA memory"));
    }
    // SAFETY: the array keeps the memory until the work is launched. Frees of PyTorch and CuPy come
    // after it in the order of the stream, which `Device.from_cuda` asks of others.
    let memory = unsafe { cuda::memory(device, array.address().addr(), array.byte_len()) };
    memory.map_err(|error| Python::attach(|py| named(py, array.name(), &error)))
}

/// The same exception, of an argument.
fn named(py: Python<'_>, name: &str, error: &PyErr) -> PyErr {
    PyErr::from_type(error.get_type(py), format!("`{name}`: {}", error.value(py)))
}

fn host_view<T: Element>(array: &Array) -> TensorView<'_> {
    let (address, bytes) = (array.address(), array.byte_len());
    let elements = match bytes {
        0 => &[],
        // SAFETY: the array found its address aligned, not null and inside the address space. By the
        // package's rules nobody writes an input during a call, and `expect_apart` keeps outputs away.
        _ => unsafe { std::slice::from_raw_parts(address.cast::<T>().cast_const(), bytes / size_of::<T>()) },
    };
    TensorView::from_host_strided(elements, *array.layout())
}

fn host_view_mut<T: Element>(array: &Array) -> TensorViewMut<'_> {
    let (address, bytes) = (array.address(), array.byte_len());
    let elements = match bytes {
        0 => &mut [],
        // SAFETY: as above; nobody else uses an output during a call.
        _ => unsafe { std::slice::from_raw_parts_mut(address.cast::<T>(), bytes / size_of::<T>()) },
    };
    TensorViewMut::from_host_strided(elements, *array.layout())
}

/// # Safety
/// In host memory that nobody else uses meanwhile.
#[expect(clippy::mut_from_ref, reason = "the memory is the caller's, not the array's")]
unsafe fn host_bytes_mut(array: &Array) -> &mut [u8] {
    if array.byte_len() == 0 {
        return &mut [];
    }
    // SAFETY: by this function's contract; the array found it not null and inside the address space.
    unsafe { std::slice::from_raw_parts_mut(array.address(), array.byte_len()) }
}
