//! `varlen_fa.Tensor`: a result for callers whose own tensors cannot be made from here.

use std::cell::UnsafeCell;
use std::ffi::c_void;

use pyo3::prelude::*;
use varlen_fa::{DType, Layout, bf16, f16};

use crate::dlpack::{DataType, HostTensor, device_type, offer, type_code};
use crate::errors::{Cause, OrRaise};

/// As much as any importer of DLPack wants elements aligned to.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Memory that calls write through its address, as they write the memory of any other package.
#[derive(Debug)]
struct Memory(Box<[UnsafeCell<Line>]>);

// SAFETY: no reference to the lines is made here, only addresses are handed out. As with every other
// package's tensors, the program sees to it that nobody uses the memory while a call writes it.
unsafe impl Sync for Memory {}

/// A row-major tensor in host memory, to be taken by `from_dlpack` of any package.
#[pyclass(frozen, module = "varlen_fa")]
#[derive(Debug)]
pub(crate) struct Tensor {
    memory: Memory,
    dtype: DType,
    layout: Layout,
}

impl Tensor {
    /// Zeros.
    pub fn new(dtype: DType, shape: &[usize]) -> PyResult<Self> {
        let layout = Layout::contiguous(shape).or_raise()?;
        let lines = (layout.numel() * dtype.size()).div_ceil(64).max(1);
        let mut memory = Vec::new();
        memory.try_reserve_exact(lines).map_err(|error| {
            Cause::OutOfMemory.exception(format!("the host has no memory for {} more bytes: {error}", 64 * lines))
        })?;
        memory.resize_with(lines, || UnsafeCell::new(Line([0; 64])));
        Ok(Self { memory: Memory(memory.into_boxed_slice()), dtype, layout })
    }
}

#[pymethods]
impl Tensor {
    /// Size of each dimension.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyTuple>> {
        pyo3::types::PyTuple::new(py, self.layout.shape())
    }

    /// Element type: "f32", "f16" or "bf16".
    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype.name()
    }

    /// (1, 0), the host.
    fn __dlpack_device__(&self) -> (i32, i32) {
        (device_type::CPU, 0)
    }

    /// The tensor as a capsule, without a copy.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        this: &Bound<'py, Self>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let refuse = |why: &str| Err(pyo3::exceptions::PyBufferError::new_err(why.to_owned()));
        if stream.is_some() {
            return refuse("`stream`: expected None for a tensor in host memory");
        }
        if dl_device.is_some_and(|device| device != (device_type::CPU, 0)) {
            return refuse("`dl_device`: expected (1, 0), the host");
        }
        if copy == Some(true) {
            return refuse("`copy`: the tensor is offered without a copy");
        }
        let tensor = this.get();
        let code = if tensor.dtype == DType::Bf16 { type_code::BFLOAT } else { type_code::FLOAT };
        let dtype = DataType { code, bits: 8 * tensor.dtype.size() as u8, lanes: 1 };
        let data = UnsafeCell::raw_get(tensor.memory.0.as_ptr()).cast::<c_void>();
        let offered = HostTensor { data, dtype, layout: &tensor.layout };
        offer(this.clone().into_any(), offered, max_version.is_some_and(|(major, _)| major >= 1))
    }

    /// The elements as a flat list of numbers, row-major.
    fn tolist(&self) -> Vec<f32> {
        let bytes = self.dtype.size() * self.layout.numel();
        let data = UnsafeCell::raw_get(self.memory.0.as_ptr()).cast::<u8>();
        // SAFETY: `new` made as many bytes; that no call writes them meanwhile is the program's duty.
        let bytes = unsafe { std::slice::from_raw_parts(data, bytes) };
        match self.dtype {
            DType::F16 => bytes.as_chunks().0.iter().map(|&element| f16::from_ne_bytes(element).to_f32()).collect(),
            DType::Bf16 => bytes.as_chunks().0.iter().map(|&element| bf16::from_ne_bytes(element).to_f32()).collect(),
            _ => bytes.as_chunks().0.iter().map(|&element| f32::from_ne_bytes(element)).collect(),
        }
    }

    fn __repr__(&self) -> String {
        format!("varlen_fa.Tensor(shape={:?}, dtype={:?})", self.layout.shape(), self.dtype.name())
    }
}
