//! What is valid: `KeyMask`, `Meta`, `DeviceMeta`, `CuSeqlens`.

use std::ops::Range;
use std::sync::{PoisonError, RwLock};

use pyo3::prelude::*;
use varlen_fa::{CuSeqlens as Sequences, DType, DeviceMemory, DeviceVarlenMeta, MaskDType, MaskView, VarlenMeta};
use varlen_fa::{Error, Layout, bf16, f16};

use crate::arrays::{Array, ElementType, Place};
use crate::device::{Device, cuda, is_cpu};
use crate::errors::{Cause, OrRaise, exception};

/// Which of the [B, S] tokens are kept.
#[pyclass(frozen, module = "varlen_fa", eq)]
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct KeyMask(pub varlen_fa::KeyMask);

#[pymethods]
impl KeyMask {
    /// A mask from a tensor of any shape that masks have: [S], [B, S] or [B, 1, 1, S]. Booleans and
    /// integers keep what is not 0; `strict` refuses integers other than 0 and 1. Floating-point
    /// numbers are those of an additive mask: 0 keeps, and anything from -1000 down drops. One row is
    /// broadcast over `batch` rows.
    ///
    /// Raises ShapeError, DTypeError, and InvalidValueError for a value that is none of a mask's.
    #[new]
    #[pyo3(signature = (mask, *, batch=None, strict=false))]
    fn new(mask: &Bound<'_, PyAny>, batch: Option<usize>, strict: bool) -> PyResult<Self> {
        Self::of_array(&Array::new("mask", mask)?, batch, strict)
    }

    /// A mask that keeps the first `lengths[b]` of `seq` tokens of each row.
    #[staticmethod]
    fn from_lengths(lengths: &Bound<'_, PyAny>, seq: usize) -> PyResult<Self> {
        let lengths: Vec<usize> = numbers("lengths", lengths)?;
        varlen_fa::KeyMask::from_lengths(seq, &lengths).map(Self).or_raise()
    }

    /// A mask that keeps the tokens of ranges: for each row a list of (start, end).
    #[staticmethod]
    fn from_runs(rows: Vec<Vec<(usize, usize)>>, seq: usize) -> PyResult<Self> {
        let rows: Vec<Vec<Range<usize>>> =
            rows.into_iter().map(|row| row.into_iter().map(|(start, end)| start..end).collect()).collect();
        varlen_fa::KeyMask::from_runs(seq, &rows).map(Self).or_raise()
    }

    /// A mask that keeps every token.
    #[staticmethod]
    fn all(batch: usize, seq: usize) -> PyResult<Self> {
        varlen_fa::KeyMask::all(batch, seq).map(Self).or_raise()
    }

    /// The one row of the mask for `batch` rows.
    fn broadcast(&self, batch: usize) -> PyResult<Self> {
        self.0.broadcast(batch).map(Self).or_raise()
    }

    /// Number of batch rows.
    #[getter]
    fn batch(&self) -> usize {
        self.0.batch()
    }

    /// Tokens of each row, kept or not.
    #[getter]
    fn seq(&self) -> usize {
        self.0.seq()
    }

    /// Number of kept tokens in the whole batch.
    #[getter]
    fn total_kept(&self) -> usize {
        self.0.total_kept()
    }

    /// Whether a token is kept; False outside the mask.
    fn keeps(&self, row: usize, token: usize) -> bool {
        self.0.keeps(row, token)
    }

    fn __repr__(&self) -> String {
        format!("varlen_fa.KeyMask(batch={}, seq={}, total_kept={})", self.batch(), self.seq(), self.total_kept())
    }
}

impl KeyMask {
    /// A mask as a call takes it: one that was made, or a tensor.
    pub fn of_object(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(mask) = object.cast::<Self>() {
            return Ok(mask.get().clone());
        }
        Self::of_array(&Array::new("mask", object)?, None, false)
    }

    fn of_array(array: &Array, batch: Option<usize>, strict: bool) -> PyResult<Self> {
        let (rows, seq) = match *array.shape() {
            [seq] => (1, seq),
            [rows, seq] | [rows, 1, seq] | [rows, 1, 1, seq] => (rows, seq),
            ref other => {
                return Err(Cause::Shape.argument(array.name(), "[S], [B, S] or [B, 1, 1, S]", format!("{other:?}")));
            }
        };
        let bytes = array.gather()?;
        let mask = match array.element() {
            ElementType::Bool => varlen_fa::KeyMask::from_integers(rows, seq, &bytes),
            ElementType::Integer { bytes: size, .. } => {
                macro_rules! integers {
                    ($integer:ty) => {{
                        let values = elements(&bytes, <$integer>::from_ne_bytes);
                        match strict {
                            true => varlen_fa::KeyMask::from_integers_strict(rows, seq, &values),
                            false => varlen_fa::KeyMask::from_integers(rows, seq, &values),
                        }
                    }};
                }
                match size {
                    1 => integers!(i8),
                    2 => integers!(i16),
                    4 => integers!(i32),
                    _ => integers!(i64),
                }
            }
            ElementType::Float(DType::F16) => {
                varlen_fa::KeyMask::from_additive(rows, seq, &elements(&bytes, f16::from_ne_bytes))
            }
            ElementType::Float(DType::Bf16) => {
                varlen_fa::KeyMask::from_additive(rows, seq, &elements(&bytes, bf16::from_ne_bytes))
            }
            ElementType::Float(_) => {
                varlen_fa::KeyMask::from_additive(rows, seq, &elements(&bytes, f32::from_ne_bytes))
            }
            // What is lower than the numbers of f32 becomes −∞.
            ElementType::F64 => {
                let values = elements(&bytes, |value| f64::from_ne_bytes(value) as f32);
                varlen_fa::KeyMask::from_additive(rows, seq, &values)
            }
        };
        let mask = mask.or_raise()?;
        batch.map_or(Ok(mask.clone()), |batch| mask.broadcast(batch)).map(Self).or_raise()
    }
}

fn elements<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|&element| read(element)).collect()
}

/// Numbers of a list, or of anything that has `tolist`: tensors of NumPy and PyTorch.
pub(crate) fn numbers<T>(name: &str, object: &Bound<'_, PyAny>) -> PyResult<T>
where
    T: for<'a, 'py> FromPyObject<'a, 'py, Error = PyErr>,
{
    let list = match object.getattr_opt("tolist")? {
        Some(tolist) => tolist.call0()?,
        None => object.clone(),
    };
    list.extract().map_err(|error: PyErr| {
        let py = object.py();
        Cause::Value.argument(name, "numbers of 0 or more", error.value(py))
    })
}

/// Where the valid tokens of a [B, S] batch lie. Make it once a request, and give it to every call.
#[pyclass(frozen, module = "varlen_fa")]
#[derive(Debug, Clone)]
pub(crate) struct Meta(pub VarlenMeta);

#[pymethods]
impl Meta {
    /// The metadata of a mask: a KeyMask, or a tensor as KeyMask takes it.
    #[new]
    fn new(mask: &Bound<'_, PyAny>) -> PyResult<Self> {
        VarlenMeta::from_key_mask(&KeyMask::of_object(mask)?.0).map(Self).or_raise()
    }

    /// Of rows whose first `lengths[b]` of `seq` tokens are valid.
    #[staticmethod]
    fn from_lengths(lengths: &Bound<'_, PyAny>, seq: usize) -> PyResult<Self> {
        VarlenMeta::from_key_mask(&KeyMask::from_lengths(lengths, seq)?.0).map(Self).or_raise()
    }

    /// Of rows of which ranges of tokens are valid: for each row a list of (start, end).
    #[staticmethod]
    fn from_runs(rows: Vec<Vec<(usize, usize)>>, seq: usize) -> PyResult<Self> {
        VarlenMeta::from_key_mask(&KeyMask::from_runs(rows, seq)?.0).map(Self).or_raise()
    }

    /// Of several documents in each row, [B, S] numbers: tokens with the same number see one another
    /// and nothing else; those numbered 0 are masked.
    #[staticmethod]
    fn from_document_ids(ids: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (batch, seq, ids) = table("ids", ids)?;
        VarlenMeta::from_document_ids(batch, seq, &ids).map(Self).or_raise()
    }

    /// Number of batch rows.
    #[getter]
    fn batch(&self) -> usize {
        self.0.batch()
    }

    /// Tokens of each padded row.
    #[getter]
    fn seq(&self) -> usize {
        self.0.seq()
    }

    /// Number of valid tokens.
    #[getter]
    fn total_valid(&self) -> usize {
        self.0.total_valid()
    }

    /// Valid tokens of the longest row.
    #[getter]
    fn max_seqlen(&self) -> usize {
        self.0.max_seqlen()
    }

    /// Cumulative numbers of valid tokens, B + 1 of them.
    #[getter]
    fn cu_seqlens(&self) -> CuSeqlens {
        CuSeqlens(self.0.cu_seqlens().clone())
    }

    /// The mask that it was built from.
    #[getter]
    fn key_mask(&self) -> KeyMask {
        KeyMask(self.0.key_mask().clone())
    }

    /// Flat positions b·S + s of the valid tokens, ascending: u32 as bytes.
    fn indices_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyBytes>> {
        let indices = self.0.indices().or_raise()?;
        let bytes: Vec<u8> = indices.iter().flat_map(|index| index.to_ne_bytes()).collect();
        Ok(pyo3::types::PyBytes::new(py, &bytes))
    }

    /// The packed row of each of the B·S tokens, -1 where it is masked: i32 as bytes.
    fn inv_indices_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyBytes>> {
        let indices = self.0.inv_indices().or_raise()?;
        let bytes: Vec<u8> = indices.iter().flat_map(|index| index.to_ne_bytes()).collect();
        Ok(pyo3::types::PyBytes::new(py, &bytes))
    }

    /// Makes the device's copy now rather than at the first use.
    fn upload_to(&self, device: &Device) -> PyResult<()> {
        self.0.upload_to(&device.0).or_raise()
    }

    fn __repr__(&self) -> String {
        format!("varlen_fa.Meta(batch={}, seq={}, total_valid={})", self.batch(), self.seq(), self.total_valid())
    }
}

/// Rows of numbers, all of one length.
pub(crate) fn table(name: &str, object: &Bound<'_, PyAny>) -> PyResult<(usize, usize, Vec<u32>)> {
    let rows: Vec<Vec<u32>> = numbers(name, object)?;
    let seq = rows.first().map_or(0, Vec::len);
    if let Some(row) = rows.iter().position(|row| row.len() != seq) {
        let expected = format!("rows of {seq} numbers");
        return Err(Cause::Shape.argument(name, expected, format!("{} in row {row}", rows[row].len())));
    }
    Ok((rows.len(), seq, rows.concat()))
}

/// Metadata that a device builds from a mask in its own memory. The host never waits, and a captured
/// CUDA graph follows whatever the mask holds.
#[pyclass(frozen, module = "varlen_fa")]
#[derive(Debug)]
pub(crate) struct DeviceMeta {
    pub meta: RwLock<DeviceVarlenMeta>,
    device: Device,
    size: [usize; 2],
}

#[pymethods]
impl DeviceMeta {
    /// Room for the metadata of [batch, seq] masks. Until the first `rebuild` no token is valid.
    #[new]
    fn new(device: &Device, batch: usize, seq: usize) -> PyResult<Self> {
        let meta = DeviceVarlenMeta::new(&device.0, batch, seq).or_raise()?;
        Ok(Self { meta: RwLock::new(meta), device: device.clone(), size: [batch, seq] })
    }

    /// Builds it anew from a [B, S] mask of booleans or integers on the device. Calls that were made
    /// before still see the metadata as it was.
    fn rebuild(&self, py: Python<'_>, mask: &Bound<'_, PyAny>) -> PyResult<()> {
        let array = Array::new("mask", mask)?;
        let &[batch, seq] = array.shape() else {
            return Err(Cause::Shape.argument("mask", "[B, S]", format!("{:?}", array.shape())));
        };
        let dtype = match array.element() {
            ElementType::Bool | ElementType::Integer { bytes: 1, .. } => MaskDType::U8,
            ElementType::Integer { bytes: 2, .. } => MaskDType::U16,
            ElementType::Integer { bytes: 4, .. } => MaskDType::U32,
            ElementType::Integer { .. } => MaskDType::U64,
            _ => return Err(Cause::DType.argument("mask", "booleans or integers", "floating-point numbers")),
        };
        if [batch, seq] != self.size {
            return Err(Cause::Shape.argument(
                "mask",
                format!("a mask of {:?}", self.size),
                format!("[{batch}, {seq}]"),
            ));
        }
        // Without the interpreter: a call that reads the metadata may wait for it to finish.
        let rebuild = |mask: MaskView<'_>| {
            py.detach(|| self.meta.write().unwrap_or_else(PoisonError::into_inner).rebuild(mask)).or_raise()
        };
        if array.place() != Place::Host {
            // SAFETY: the array keeps the memory until the work is launched, and the stream orders
            // what comes after.
            let memory = unsafe { cuda::memory(&self.device.0, array.address().addr(), array.byte_len()) }?;
            return rebuild(memory.mask_view(dtype, *array.layout()));
        }
        let bytes = array.gather()?;
        let keep: Vec<u8> = bytes.chunks(dtype.size()).map(|token| u8::from(token.iter().any(|&b| b != 0))).collect();
        if is_cpu(&self.device.0) {
            return rebuild(MaskView::from_host(&keep, batch, seq).or_raise()?);
        }
        let mut memory = DeviceMemory::alloc(&self.device.0, keep.len() as u64).or_raise()?;
        memory.write(&keep).or_raise()?;
        rebuild(memory.mask_view(MaskDType::U8, Layout::contiguous(&[batch, seq]).or_raise()?))
    }
}

/// Cumulative lengths of packed sequences: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
#[pyclass(frozen, module = "varlen_fa")]
#[derive(Debug, Clone)]
pub(crate) struct CuSeqlens(pub Sequences);

#[pymethods]
impl CuSeqlens {
    /// From B + 1 numbers that start at 0 and never fall: a list, or an integer tensor. Reading one
    /// from a GPU waits for it.
    #[new]
    fn new(values: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::of_object("cu_seqlens", values)
    }

    /// From the length of each sequence.
    #[staticmethod]
    fn from_lengths(lengths: &Bound<'_, PyAny>) -> PyResult<Self> {
        let lengths: Vec<usize> = numbers("lengths", lengths)?;
        Sequences::from_lengths(&lengths).map(Self).or_raise()
    }

    /// Number of sequences.
    #[getter]
    fn batch(&self) -> usize {
        self.0.batch()
    }

    /// Number of packed rows.
    #[getter]
    fn total(&self) -> usize {
        self.0.total()
    }

    /// Length of the longest sequence.
    #[getter]
    fn max_seqlen(&self) -> usize {
        self.0.max_seqlen()
    }

    /// The numbers as a list.
    fn tolist(&self) -> Vec<i32> {
        self.0.as_slice().to_vec()
    }
}

impl CuSeqlens {
    pub fn of_object(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(made) = object.cast::<Self>() {
            return Ok(made.get().clone());
        }
        let values: Vec<i32> = numbers(name, object)?;
        let made = Sequences::new(&values).map_err(|error| match error {
            Error::CuSeqlens { expected, got, .. } => Cause::Value.argument(name, expected, got),
            other => exception(other),
        });
        made.map(Self)
    }
}
