//! Tensors of the caller: where their elements lie, by DLPack, NumPy's array interface or its
//! counterpart for CUDA memory, and new ones of the same kind.

use std::borrow::Cow;
use std::ptr;

use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyMemoryView, PyTuple, PyType};
use varlen_fa::{DType, Layout};

use crate::dlpack::{DataType, Exchange, Taken, VERSION, device_type, type_code};
use crate::errors::{Cause, OrRaise, type_name};
use crate::tensor::Tensor;

/// The most dimensions that a tensor has.
const MAX_RANK: usize = 4;

/// What elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ElementType {
    Float(DType),
    F64,
    Bool,
    Integer { bytes: usize, signed: bool },
}

impl ElementType {
    fn of(dtype: DataType) -> Option<Self> {
        use type_code::{BFLOAT, BOOL, FLOAT, INT, UINT};
        Some(match (dtype.code, dtype.bits, dtype.lanes) {
            (FLOAT, 32, 1) => Self::Float(DType::F32),
            (FLOAT, 16, 1) => Self::Float(DType::F16),
            (BFLOAT, 16, 1) => Self::Float(DType::Bf16),
            (FLOAT, 64, 1) => Self::F64,
            (BOOL, 8, 1) => Self::Bool,
            (code @ (INT | UINT), bits @ (8 | 16 | 32 | 64), 1) => {
                Self::Integer { bytes: usize::from(bits / 8), signed: code == INT }
            }
            _ => return None,
        })
    }

    /// By NumPy's letter and size; `name` is that of the type, which tells bf16 from other bytes.
    fn of_numpy(typestr: &str, name: &str) -> Option<Self> {
        if name == "bfloat16" {
            return Some(Self::Float(DType::Bf16));
        }
        let typestr = typestr.trim_start_matches(['<', '|', '=']);
        let of = |kind, code| {
            let bytes: u8 = typestr.strip_prefix(kind)?.parse().ok()?;
            Self::of(DataType { code, bits: bytes.checked_mul(8)?, lanes: 1 })
        };
        use type_code::{BOOL, FLOAT, INT, UINT};
        [('f', FLOAT), ('b', BOOL), ('i', INT), ('u', UINT)].into_iter().find_map(|(kind, code)| of(kind, code))
    }

    pub fn size(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.size(),
            Self::F64 => 8,
            Self::Bool => 1,
            Self::Integer { bytes, .. } => bytes,
        }
    }

    fn name(self) -> String {
        match self {
            Self::Float(dtype) => dtype.to_string(),
            Self::F64 => "f64".to_owned(),
            Self::Bool => "bool".to_owned(),
            Self::Integer { bytes, signed } => format!("{}{}", if signed { 'i' } else { 'u' }, 8 * bytes),
        }
    }
}

/// Where a tensor's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Host,
    /// Of the GPU of this number, where the tensor's package says which.
    Cuda(Option<usize>),
}

/// Who made a tensor, so that results are made alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    Torch,
    NumPy,
    CuPy,
    /// Its arrays are never written, once they exist.
    Jax,
    Other,
}

impl Family {
    /// Of an object. A package that was not imported made none.
    pub fn of(object: &Bound<'_, PyAny>) -> Self {
        static TORCH: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        static NUMPY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        static CUPY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        static JAX: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        static MODULES: PyOnceLock<Py<PyDict>> = PyOnceLock::new();
        let py = object.py();
        let families = [
            (Self::NumPy, &NUMPY, "numpy", "ndarray"),
            (Self::Torch, &TORCH, "torch", "Tensor"),
            (Self::CuPy, &CUPY, "cupy", "ndarray"),
            (Self::Jax, &JAX, "jax", "Array"),
        ];
        let is_of = |kept: &PyOnceLock<Py<PyType>>, module: &str, name: &str| -> PyResult<bool> {
            if let Some(class) = kept.get(py) {
                return object.is_instance(class.bind(py));
            }
            let modules =
                MODULES.get_or_try_init(py, || Ok::<_, PyErr>(py.import("sys")?.getattr("modules")?.extract()?))?;
            if !modules.bind(py).contains(module)? {
                return Ok(false);
            }
            object.is_instance(kept.import(py, module, name)?)
        };
        let found = families.into_iter().find(|&(_, kept, module, name)| is_of(kept, module, name).unwrap_or(false));
        found.map_or(Self::Other, |(family, ..)| family)
    }
}

/// What keeps the memory valid.
#[derive(Debug)]
enum Owner {
    Taken(#[expect(dead_code, reason = "dropped when the memory is not used any more")] Taken),
    Object(#[expect(dead_code, reason = "as above")] Py<PyAny>),
}

/// A tensor of the caller. Its memory stays valid until this is dropped.
#[derive(Debug)]
pub(crate) struct Array {
    name: Cow<'static, str>,
    data: *mut u8,
    element: ElementType,
    layout: Layout,
    /// Bytes from `data` to the end of the last element.
    bytes: usize,
    place: Place,
    read_only: bool,
    family: Family,
    _owner: Owner,
}

impl Array {
    /// The tensor that an object is; `name` is the argument's, for messages.
    pub fn new(name: impl Into<Cow<'static, str>>, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let name = name.into();
        let family = Family::of(object);
        let array = match family {
            Family::Torch => Self::of_torch(name, object),
            Family::Jax => Self::of_jax(name, object),
            _ => Self::of_dlpack(name, object, family),
        }?;
        Ok(Self { family, ..array })
    }

    /// The tensor, or none for an object that is not there.
    pub fn optional(name: &'static str, object: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Self>> {
        object.map(|object| Self::new(name, object)).transpose()
    }

    fn of_torch(name: Cow<'static, str>, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        static TENSOR: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        static EXCHANGE: PyOnceLock<Option<Exchange>> = PyOnceLock::new();
        let py = object.py();
        if object.getattr(intern!(py, "requires_grad"))?.is_truthy()? {
            let detached = without_gradient(&name, object)?;
            return Self::of_torch(name, &detached);
        }
        // Its memory holds the numbers with the other sign.
        if object.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
            return Err(Cause::Layout.argument(
                &name,
                "a tensor without the negative bit (`resolve_neg()`)",
                "one with it",
            ));
        }
        let class = TENSOR.import(py, "torch", "Tensor")?;
        // Subclasses may hold no memory of their own; their `__dlpack__` says so.
        if !object.get_type().is(class) {
            return Self::of_dlpack(name, object, Family::Torch);
        }
        match EXCHANGE.get_or_init(py, || Exchange::of_type(class.as_any())) {
            None => Self::of_dlpack(name, object, Family::Torch),
            Some(exchange) => match exchange.take(object) {
                Ok(taken) => Self::of_taken(name, taken),
                Err(error) => Err(refused(py, &name, error)),
            },
        }
    }

    fn of_jax(name: Cow<'static, str>, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        static TRACER: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        if object.is_instance(TRACER.import(object.py(), "jax.core", "Tracer")?)? {
            let expected = "an array, outside of jax.jit and other transformations (or in a jax.pure_callback)";
            return Err(Cause::NotApplicable.argument(&name, expected, "a tracer"));
        }
        // Its capsules do not say that nobody may write.
        Ok(Self { read_only: true, ..Self::of_dlpack(name, object, Family::Jax)? })
    }

    fn of_dlpack(name: Cow<'static, str>, object: &Bound<'_, PyAny>, family: Family) -> PyResult<Self> {
        let py = object.py();
        let capsule = match capsule_of(object, family) {
            Ok(Some(capsule)) => capsule,
            Ok(None) => {
                return Self::of_interfaces(name.clone(), object)?.ok_or_else(|| {
                    let expected =
                        "a tensor (an object with __dlpack__, __array_interface__, __cuda_array_interface__ or a buffer)";
                    PyTypeError::new_err(format!("`{name}`: expected {expected}, got {}", type_name(object)))
                });
            }
            // NumPy offers neither bf16 nor, in old versions, what is read-only.
            Err(error) if error.is_instance_of::<PyBufferError>(py) => {
                return Self::of_interfaces(name.clone(), object)?.ok_or_else(|| refused(py, &name, error));
            }
            Err(error) => return Err(refused(py, &name, error)),
        };
        let taken = Taken::from_capsule(&capsule)
            .map_err(|got| Cause::Layout.argument(&name, "a capsule of DLPack 1 from its __dlpack__", got))?;
        Self::of_taken(name, taken)
    }

    fn of_taken(name: Cow<'static, str>, taken: Taken) -> PyResult<Self> {
        let tensor = taken.tensor();
        let place = match tensor.device_type {
            device_type::CPU | device_type::CUDA_HOST => Place::Host,
            device_type::CUDA | device_type::CUDA_MANAGED => Place::Cuda(usize::try_from(tensor.device_id).ok()),
            other => {
                let got = format!("memory of DLPack's device type {other}");
                return Err(Cause::DeviceMismatch.argument(&name, "host memory or CUDA memory", got));
            }
        };
        let element = ElementType::of(tensor.dtype).ok_or_else(|| {
            let DataType { code, bits, lanes } = tensor.dtype;
            let got = format!("DLPack's type code {code} of {bits} bits in {lanes} lanes");
            Cause::DType.argument(&name, "floating-point numbers, booleans or integers", got)
        })?;
        let rank = rank(&name, usize::try_from(tensor.rank).unwrap_or(0))?;
        let (mut shape, mut strides) = ([0_i64; MAX_RANK], [0_i64; MAX_RANK]);
        // SAFETY: by DLPack, as many sizes as there are dimensions.
        shape[..rank].copy_from_slice(unsafe { std::slice::from_raw_parts(tensor.shape, rank) });
        let has_strides = !tensor.strides.is_null();
        if has_strides {
            // SAFETY: as above.
            strides[..rank].copy_from_slice(unsafe { std::slice::from_raw_parts(tensor.strides, rank) });
        }
        let strides = has_strides.then_some(&strides[..rank]);
        let offset = usize::try_from(tensor.byte_offset).unwrap_or(usize::MAX);
        let data = tensor.data.cast::<u8>().wrapping_add(offset);
        let read_only = taken.is_read_only();
        let described = (data, element, place, read_only);
        Self::describe(name, described, (&shape[..rank], strides), Owner::Taken(taken))
    }

    /// By NumPy's array interface, that for CUDA memory, or the buffer protocol; none of an object that has
    /// none of them.
    fn of_interfaces(name: Cow<'static, str>, object: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        let py = object.py();
        // The second does not say which GPU it is, and its stream is not waited for: as with DLPack,
        // the caller says on which stream the work goes.
        let interfaces = [
            (intern!(py, "__array_interface__"), Place::Host),
            (intern!(py, "__cuda_array_interface__"), Place::Cuda(None)),
        ];
        for (attribute, place) in interfaces {
            if let Some(interface) = object.getattr_opt(attribute)? {
                return Self::of_interface(name, object, (&interface, place)).map(Some);
            }
        }
        let Ok(memory) = PyMemoryView::from(object) else { return Ok(None) };
        // The stable interface of CPython 3.10 has no buffers; NumPy looks at them without a copy.
        let numpy = py.import("numpy").map_err(|error| {
            let message = format!("`{name}`: NumPy is needed to read {} by the buffer protocol", type_name(object));
            let missing = PyTypeError::new_err(message);
            missing.set_cause(py, Some(error));
            missing
        })?;
        let array = numpy.call_method1("asarray", (memory,))?;
        let interface = array.getattr("__array_interface__")?;
        Self::of_interface(name, &array, (&interface, Place::Host)).map(Some)
    }

    fn of_interface(
        name: Cow<'static, str>,
        object: &Bound<'_, PyAny>,
        (interface, place): (&Bound<'_, PyAny>, Place),
    ) -> PyResult<Self> {
        let (address, read_only): (usize, bool) = interface.get_item("data")?.extract()?;
        let typestr: String = interface.get_item("typestr")?.extract()?;
        let type_name = object.getattr("dtype").and_then(|dtype| dtype.getattr("name")?.extract::<String>());
        let type_name = type_name.unwrap_or_default();
        let element = ElementType::of_numpy(&typestr, &type_name).ok_or_else(|| {
            let got = format!("{typestr} {type_name}");
            Cause::DType.argument(&name, "floating-point numbers, booleans or integers", got.trim())
        })?;
        let shape: Vec<i64> = interface.get_item("shape")?.extract()?;
        rank(&name, shape.len())?;
        let size = element.size() as i64;
        let elements = |bytes: i64| match bytes % size {
            0 => Ok(bytes / size),
            _ => {
                let expected = format!("strides of whole elements of {size} bytes");
                Err(Cause::Layout.argument(&name, expected, format!("{bytes} bytes")))
            }
        };
        let strides: Option<Vec<i64>> = match interface.call_method1("get", ("strides",))?.extract()? {
            Some(strides) if Vec::len(&strides) == shape.len() => {
                Some(strides.into_iter().map(elements).collect::<PyResult<_>>()?)
            }
            Some(strides) => {
                let expected = format!("{} strides, one for each dimension", shape.len());
                return Err(Cause::Layout.argument(&name, expected, strides.len()));
            }
            None => None,
        };
        if !interface.call_method1("get", ("mask",))?.is_none() {
            return Err(Cause::Layout.argument(&name, "an array without a mask of its own", "one with it"));
        }
        let owner = Owner::Object(object.clone().unbind());
        let data = ptr::with_exposed_provenance_mut(address);
        Self::describe(name, (data, element, place, read_only), (&shape, strides.as_deref()), owner)
    }

    /// Without strides it is row-major.
    fn describe(
        name: Cow<'static, str>,
        (data, element, place, read_only): (*mut u8, ElementType, Place, bool),
        (shape, strides): (&[i64], Option<&[i64]>),
        owner: Owner,
    ) -> PyResult<Self> {
        let rank = shape.len();
        let (mut sizes, mut steps) = ([0_usize; MAX_RANK], [0_u64; MAX_RANK]);
        for (size, &of_package) in sizes.iter_mut().zip(shape) {
            *size = usize::try_from(of_package)
                .map_err(|_| Cause::Shape.argument(&name, "sizes of 0 or more", format!("{shape:?}")))?;
        }
        for (dim, &stride) in strides.unwrap_or_default().iter().enumerate() {
            // Where there is nothing to step over, any stride may stand.
            let stride = if shape[dim] > 1 { stride } else { stride.max(0) };
            steps[dim] = u64::try_from(stride).map_err(|_| {
                Cause::Layout.argument(&name, "strides of 0 or more; copy the tensor", format!("{strides:?}"))
            })?;
        }
        let layout = match strides {
            Some(_) => Layout::strided(&sizes[..rank], &steps[..rank], 0),
            None => Layout::contiguous(&sizes[..rank]),
        };
        let layout = layout.map_err(|_| {
            let got = format!("shape {shape:?} with strides {strides:?}");
            Cause::Shape.argument(&name, "a tensor that fits the address space", got)
        })?;
        let mut bytes = 0;
        if layout.numel() > 0 {
            if data.is_null() {
                return Err(Cause::Layout.argument(&name, "the address of the first element", "null"));
            }
            if data.addr() % element.size() != 0 {
                let expected = format!("an address that is a multiple of {}", element.size());
                return Err(Cause::Layout.argument(&name, expected, format!("{:#x}", data.addr())));
            }
            let end = usize::try_from(layout.end()).ok().and_then(|end| end.checked_mul(element.size()));
            let fits = |&bytes: &usize| isize::try_from(bytes).is_ok() && data.addr().checked_add(bytes).is_some();
            bytes = end.filter(fits).ok_or_else(|| {
                Cause::Shape.argument(&name, "memory inside the address space", format!("shape {shape:?}"))
            })?;
        }
        Ok(Self { name, data, element, layout, bytes, place, read_only, family: Family::Other, _owner: owner })
    }

    /// The argument's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn place(&self) -> Place {
        self.place
    }

    pub fn element(&self) -> ElementType {
        self.element
    }

    /// Where elements lie, from [`address`](Self::address) on.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    pub fn address(&self) -> *mut u8 {
        self.data
    }

    /// Bytes from the address to the end of the last element.
    pub fn byte_len(&self) -> usize {
        self.bytes
    }

    /// The element type, if it is one of tensors that are computed on.
    pub fn dtype(&self) -> PyResult<DType> {
        match self.element {
            ElementType::Float(dtype) => Ok(dtype),
            other => Err(Cause::DType.argument(&self.name, "element type f32, f16 or bf16", other.name())),
        }
    }

    pub fn expect_writable(&self) -> PyResult<()> {
        match self.read_only {
            true => Err(Cause::Layout.argument(&self.name, "memory that may be written", "a read-only tensor")),
            false => Ok(()),
        }
    }

    /// The host memory up to the last element.
    ///
    /// # Safety
    /// The array is in host memory that nobody writes meanwhile.
    pub unsafe fn host_bytes(&self) -> &[u8] {
        if self.bytes == 0 {
            return &[];
        }
        // SAFETY: `describe` found it not null and inside the address space, and the owner keeps it.
        unsafe { std::slice::from_raw_parts(self.data, self.bytes) }
    }

    /// The elements of an array in host memory, row-major.
    pub fn gather(&self) -> PyResult<Vec<u8>> {
        if self.place != Place::Host {
            let expected = "host memory (reading a GPU's would wait for it; a mask there becomes a DeviceMeta)";
            return Err(Cause::DeviceMismatch.argument(&self.name, expected, "CUDA memory"));
        }
        let size = self.element.size();
        let mut rows = reserve(self.layout.numel() * size)?;
        rows.resize(self.layout.numel() * size, 0);
        // SAFETY: in host memory; the interpreter is attached, and callers write it in no other thread.
        let memory = unsafe { self.host_bytes() };
        self.layout.for_each_row(size, |strided, dense| rows[dense].copy_from_slice(&memory[strided]));
        Ok(rows)
    }
}

/// A package refuses to give its tensor.
fn refused(py: Python<'_>, name: &str, error: PyErr) -> PyErr {
    let refused =
        Cause::Layout.exception(format!("`{name}`: its package does not give the tensor: {}", error.value(py)));
    refused.set_cause(py, Some(error));
    refused
}

/// Room for bytes, or an exception.
pub(crate) fn reserve(bytes: usize) -> PyResult<Vec<u8>> {
    let mut room = Vec::new();
    room.try_reserve_exact(bytes).map_err(|error| {
        Cause::OutOfMemory.exception(format!("the host has no memory for {bytes} more bytes: {error}"))
    })?;
    Ok(room)
}

fn rank(name: &str, rank: usize) -> PyResult<usize> {
    match rank {
        1..=MAX_RANK => Ok(rank),
        _ => Err(Cause::Shape.argument(name, "1 to 4 dimensions", rank)),
    }
}

/// A PyTorch tensor that requires a gradient, without it where none is being recorded.
fn without_gradient<'py>(name: &str, tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = tensor.py();
    if py.import("torch")?.call_method0("is_grad_enabled")?.is_truthy()? {
        let class = py.import("varlen_fa._errors")?.getattr("GradientError")?.cast_into::<PyType>()?;
        let message = format!(
            "`{name}` requires a gradient, and varlen_fa computes none: call it under torch.no_grad() or \
             torch.inference_mode(), or give `{name}.detach()`"
        );
        return Err(PyErr::from_type(class, message));
    }
    tensor.call_method0("detach")
}

/// What `__dlpack__` returns; none of an object that has no such method.
fn capsule_of<'py>(object: &Bound<'py, PyAny>, family: Family) -> PyResult<Option<Bound<'py, PyAny>>> {
    static ON_HOST: PyOnceLock<Py<PyDict>> = PyOnceLock::new();
    static ON_CUDA: PyOnceLock<Py<PyDict>> = PyOnceLock::new();
    let py = object.py();
    let Some(export) = object.getattr_opt(intern!(py, "__dlpack__"))? else { return Ok(None) };
    let is_cuda = match family {
        Family::NumPy => false,
        Family::Torch => object.getattr(intern!(py, "is_cuda"))?.is_truthy()?,
        Family::CuPy => true,
        Family::Jax | Family::Other => {
            let (kind, _): (i32, i32) = object.call_method0(intern!(py, "__dlpack_device__"))?.extract()?;
            matches!(kind, device_type::CUDA | device_type::CUDA_MANAGED)
        }
    };
    let arguments = |stream: bool| -> PyResult<Py<PyDict>> {
        let arguments = PyDict::new(py);
        arguments.set_item("max_version", VERSION)?;
        if stream {
            // No synchronisation: the work goes to the stream that the caller works on.
            arguments.set_item("stream", -1)?;
        }
        Ok(arguments.unbind())
    };
    let arguments = match is_cuda {
        false => ON_HOST.get_or_try_init(py, || arguments(false))?,
        true => ON_CUDA.get_or_try_init(py, || arguments(true))?,
    };
    match export.call(PyTuple::empty(py), Some(arguments.bind(py))) {
        // Older than DLPack 1.
        Err(error) if error.is_instance_of::<PyTypeError>(py) => match is_cuda {
            false => export.call0().map(Some),
            true => export.call1((-1,)).map(Some),
        },
        result => result.map(Some),
    }
}

/// A new tensor of the kind of `like` and on its device, to be written and then [`delivered`]; its contents
/// are not specified. `dtype` is that of `like` where there is none.
pub(crate) fn new_like<'py>(
    like: &Bound<'py, PyAny>,
    array: &Array,
    shape: &[usize],
    dtype: Option<DType>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = like.py();
    let size = PyTuple::new(py, shape)?;
    let module = match array.family {
        Family::Torch => {
            let Some(dtype) = dtype else {
                // Half the time of `new_empty`, and as row-major as what it is like.
                if array.layout.is_contiguous() && array.shape() == shape {
                    static EMPTY_LIKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
                    return EMPTY_LIKE.import(py, "torch", "empty_like")?.call1((like,));
                }
                return like.call_method1(intern!(py, "new_empty"), (size,));
            };
            let arguments = PyDict::new(py);
            arguments.set_item("dtype", py.import("torch")?.getattr(torch_name(dtype))?)?;
            return like.call_method("new_empty", (size,), Some(&arguments));
        }
        Family::NumPy => py.import(intern!(py, "numpy"))?,
        Family::CuPy => py.import(intern!(py, "cupy"))?,
        Family::Jax | Family::Other if array.place == Place::Host => {
            let dtype = dtype.map_or_else(|| array.dtype(), Ok)?;
            return Ok(Bound::new(py, Tensor::new(dtype, shape)?)?.into_any());
        }
        Family::Jax | Family::Other => {
            let got = format!("a result of {} in CUDA memory", type_name(like));
            return Err(Cause::NotApplicable.argument("out", "a tensor to write to", got));
        }
    };
    let dtype = match dtype {
        // Of results, f32 alone differs from the inputs.
        Some(_) => intern!(py, "float32").clone().into_any(),
        None => like.getattr(intern!(py, "dtype"))?,
    };
    module.call_method1(intern!(py, "empty"), (size, dtype))
}

/// What [`new_like`] made like `array`, once it is written, as the package of `array` has tensors.
pub(crate) fn delivered<'py>(array: &Array, made: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    match array.family {
        // Without a copy: the memory is aligned as JAX wants it.
        Family::Jax => made.py().import("jax.numpy")?.call_method1("from_dlpack", (made,)),
        _ => Ok(made),
    }
}

fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::Bf16 => "bfloat16",
        _ => "float32",
    }
}

/// A shape for layouts of the library.
pub(crate) fn row_major(shape: &[usize]) -> PyResult<Layout> {
    Layout::contiguous(shape).or_raise()
}
