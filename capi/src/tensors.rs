//! Tensors in external memory: their descriptors are checked, and the memory is made accessible to
//! a device. The CPU device works directly on host memory, other devices on copies of it. CUDA
//! memory is used directly by its own device.

use std::marker::PhantomData;

use varlen::{BackendKind, DType, Device, DeviceMemory, Element, Error, Layout, TensorView, TensorViewMut, bf16, f16};

use crate::arguments::{FIRST_PAGE, Name, choose, expect_zeros, read, read_optional, reserve, size};
use crate::cuda;
use crate::failure::{Failure, Result};
use crate::types::{varlen_fa_memory, varlen_fa_status, varlen_fa_tensor};

/// A checked descriptor: its elements lie inside its memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Described<'a> {
    name: &'static str,
    memory: varlen_fa_memory,
    dtype: DType,
    layout: Layout,
    data: *mut u8,
    /// Bytes from `data` to the end of the last element.
    bytes: u64,
    lifetime: PhantomData<&'a ()>,
}

impl<'a> Described<'a> {
    /// # Safety
    /// `tensor` is null, misaligned, or points to a descriptor of memory that is valid during `'a`.
    /// Meanwhile nobody writes the memory of an input, and nobody else uses that of an output.
    pub unsafe fn new(name: &'static str, tensor: *const varlen_fa_tensor) -> Result<Self> {
        // SAFETY: by this function's contract.
        let tensor = unsafe { read(Name::of(name), tensor) }?;
        Self::check(name, &tensor)
    }

    /// # Safety
    /// As [`Described::new`].
    pub unsafe fn optional(name: &'static str, tensor: *const varlen_fa_tensor) -> Result<Option<Self>> {
        // SAFETY: by this function's contract.
        let tensor = unsafe { read_optional(Name::of(name), tensor) }?;
        tensor.map(|tensor| Self::check(name, &tensor)).transpose()
    }

    fn check(argument: &'static str, tensor: &varlen_fa_tensor) -> Result<Self> {
        let name = Name::of(argument);
        expect_zeros(name.field("reserved_word"), &[u64::from(tensor.reserved_word)])?;
        expect_zeros(name.field("reserved"), &tensor.reserved)?;
        let dtype = choose(name.field("dtype"), tensor.dtype)?.meaning;
        let memory = choose(name.field("memory"), tensor.memory)?.value;
        let rank = tensor.rank as usize;
        if rank == 0 || rank > tensor.shape.len() {
            return Err(Failure::argument(varlen_fa_status::Rank, name.field("rank"), "1 to 4", rank));
        }
        let (mut shape, mut strides) = ([0; 4], [0; 4]);
        for dim in 0..rank {
            shape[dim] = size(name.field("shape"), tensor.shape[dim])?;
            strides[dim] = u64::try_from(tensor.strides[dim]).map_err(|_| {
                let (expected, got) = ("0 or more", format!("{:?}", &tensor.strides[..rank]));
                Failure::argument(varlen_fa_status::BadValue, name.field("strides"), expected, got)
            })?;
        }
        let layout = Layout::strided(&shape[..rank], &strides[..rank], 0).map_err(|_| {
            let got = format!("shape {:?} with strides {:?}", &shape[..rank], &strides[..rank]);
            Failure::argument(varlen_fa_status::TooLarge, name, "a tensor that fits the address space", got)
        })?;
        let data = tensor.data.cast::<u8>();
        let mut described = Self { name: argument, memory, dtype, layout, data, bytes: 0, lifetime: PhantomData };
        if layout.numel() > 0 {
            described.bytes = layout.end() * dtype.size() as u64;
            described.check_memory(tensor.bytes)?;
        }
        Ok(described)
    }

    fn check_memory(&self, given: u64) -> Result<()> {
        let (name, address) = (Name { argument: self.name, field: "data" }, self.data.addr());
        if address < FIRST_PAGE {
            let got = if address == 0 { "NULL".to_owned() } else { format!("{address:#x}") };
            let expected = "the address of the first element";
            return Err(Failure::argument(varlen_fa_status::NullPointer, name, expected, got));
        }
        if !address.is_multiple_of(self.dtype.size()) {
            let expected = format!("an address that is a multiple of {}", self.dtype.size());
            return Err(Failure::argument(varlen_fa_status::Misaligned, name, expected, format!("{address:#x}")));
        }
        if self.bytes > given {
            return Err(Error::BufferTooSmall { argument: self.name, expected: self.bytes, got: given }.into());
        }
        if isize::try_from(self.bytes).is_err() || address.checked_add(self.bytes as usize).is_none() {
            let got = format!("{} bytes from {address:#x} on", self.bytes);
            return Err(Failure::argument(varlen_fa_status::TooLarge, name, "memory inside the address space", got));
        }
        Ok(())
    }

    /// The host memory up to the last element.
    fn host_bytes(&self) -> &'a [u8] {
        if self.bytes == 0 {
            return &[];
        }
        // SAFETY: `check_memory` found it not null and inside the address space; by the contract of
        // `new` nobody writes it during 'a.
        unsafe { std::slice::from_raw_parts(self.data, self.bytes as usize) }
    }

    fn is_in_host_memory(&self) -> bool {
        self.memory == varlen_fa_memory::Host
    }

    fn expect_inner_stride(&self) -> Result<()> {
        match (self.layout.shape().last(), self.layout.strides().last()) {
            (Some(&size), Some(&got)) if size > 1 && got != 1 => {
                Err(Error::InnerStride { argument: self.name, got }.into())
            }
            _ => Ok(()),
        }
    }

    /// The elements that a layout has in the host memory, row-major.
    fn dense_rows(&self, layout: &Layout) -> Result<Vec<u8>> {
        let (memory, size) = (self.host_bytes(), self.dtype.size());
        let mut rows = bytes_of(layout.numel() * size)?;
        layout.for_each_row(size, |strided, dense| rows[dense].copy_from_slice(&memory[strided]));
        Ok(rows)
    }

    /// Whether both describe the same elements.
    pub fn is_same(&self, other: &Described<'_>) -> bool {
        self.data == other.data
            && self.memory == other.memory
            && self.dtype == other.dtype
            && self.layout == other.layout
    }

    /// The external CUDA memory, as memory of the device that computes.
    fn cuda_memory(&self, device: &Device) -> Result<DeviceMemory> {
        // SAFETY: by the contract of `new`, memory of the device that stays valid until the work is
        // done.
        unsafe { cuda_memory(device, Name::of(self.name), self.data.addr(), self.bytes) }
    }
}

/// External CUDA memory, as memory of the device that computes.
///
/// # Safety
/// As [`cuda::memory`].
pub(crate) unsafe fn cuda_memory(device: &Device, name: Name, address: usize, bytes: u64) -> Result<DeviceMemory> {
    if device.capabilities().backend != BackendKind::Cuda {
        let (argument, got) = (name.argument, "cuda".to_owned());
        return Err(Error::DeviceMismatch { argument, expected: device.name().to_owned(), got }.into());
    }
    // SAFETY: by this function's contract.
    let memory = unsafe { cuda::memory(device, address as u64, bytes) };
    memory.map_err(|error| match error {
        // The driver does not know the address; the message names it as the caller does.
        Error::Handle { expected, got, .. } => {
            Failure::argument(varlen_fa_status::BadHandle, name.field("data"), expected, got)
        }
        error => error.into(),
    })
}

/// Checks that no output shares host memory with an input or another output. Tensors that
/// interleave count as sharing. This comes before any Rust reference to the memory exists; device
/// memory is checked by the Rust library.
pub(crate) fn expect_apart(outputs: &[&Described<'_>], inputs: &[&Described<'_>]) -> Result<()> {
    for (at, output) in outputs.iter().enumerate() {
        for other in inputs.iter().chain(&outputs[at + 1..]) {
            let (a, b) = (output.data.addr(), other.data.addr());
            let (a_end, b_end) = (a + output.bytes as usize, b + other.bytes as usize);
            let both_in_host_memory = output.is_in_host_memory() && other.is_in_host_memory();
            if both_in_host_memory && output.bytes > 0 && other.bytes > 0 && a < b_end && b < a_end {
                return Err(Error::Overlap { argument: output.name, other: other.name }.into());
            }
        }
    }
    Ok(())
}

/// An input in memory that the device reads.
#[derive(Debug)]
pub(crate) enum Input<'a> {
    /// External host memory, which the device reads directly.
    Host(Described<'a>),
    /// External device memory, or a copy of host memory.
    Device { memory: DeviceMemory, dtype: DType, layout: Layout },
}

impl<'a> Input<'a> {
    /// A tensor whose last dimension is contiguous.
    pub fn new(device: &Device, described: &Described<'a>) -> Result<Self> {
        described.expect_inner_stride()?;
        Self::of_any_strides(device, described)
    }

    /// A tensor with any strides, such as a bias.
    pub fn of_any_strides(device: &Device, described: &Described<'a>) -> Result<Self> {
        let (dtype, layout) = (described.dtype, described.layout);
        if !described.is_in_host_memory() {
            return Ok(Self::Device { memory: described.cuda_memory(device)?, dtype, layout });
        }
        if device.capabilities().backend == BackendKind::Cpu {
            return Ok(Self::Host(*described));
        }
        if layout.is_contiguous() {
            let memory = upload(device, described.host_bytes())?;
            return Ok(Self::Device { memory, dtype, layout: Layout::contiguous(layout.shape())? });
        }
        let (compact, layout) = compact(&layout)?;
        Ok(Self::Device { memory: upload(device, &described.dense_rows(&compact)?)?, dtype, layout })
    }

    pub fn view(&self) -> TensorView<'_> {
        match self {
            Self::Host(described) => match described.dtype {
                DType::F16 => host_view::<f16>(described),
                DType::Bf16 => host_view::<bf16>(described),
                _ => host_view::<f32>(described),
            },
            Self::Device { memory, dtype, layout } => memory.view(*dtype, *layout),
        }
    }
}

/// An output in memory that the device writes.
#[derive(Debug)]
pub(crate) enum Output<'a> {
    /// External host memory, which the device writes directly.
    Host(Described<'a>),
    /// External device memory.
    Device { memory: DeviceMemory, dtype: DType, layout: Layout },
    /// A row-major tensor on the device, to be copied to external host memory.
    Staged { memory: DeviceMemory, described: Described<'a> },
}

impl<'a> Output<'a> {
    pub fn new(device: &Device, described: &Described<'a>) -> Result<Self> {
        let (dtype, layout) = (described.dtype, described.layout);
        if !described.is_in_host_memory() {
            return Ok(Self::Device { memory: described.cuda_memory(device)?, dtype, layout });
        }
        if device.capabilities().backend == BackendKind::Cpu {
            return Ok(Self::Host(*described));
        }
        // The device sees only a row-major copy, so the strides are checked here.
        described.expect_inner_stride()?;
        if layout.self_overlaps() {
            let (shape, strides) = (layout.shape().to_vec(), layout.strides().to_vec());
            return Err(Error::SelfOverlap { argument: described.name, shape, strides }.into());
        }
        let memory = DeviceMemory::alloc(device, layout.numel() as u64 * dtype.size() as u64)?;
        Ok(Self::Staged { memory, described: *described })
    }

    /// An output of which the device may leave parts as they are, or read them.
    pub fn holding(device: &Device, described: &Described<'a>) -> Result<Self> {
        let mut output = Self::new(device, described)?;
        if let Self::Staged { memory, .. } = &mut output {
            memory.write(&described.dense_rows(&described.layout)?)?;
        }
        Ok(output)
    }

    pub fn view_mut(&mut self) -> Result<TensorViewMut<'_>> {
        match self {
            Self::Host(described) => Ok(match described.dtype {
                DType::F16 => host_view_mut::<f16>(described),
                DType::Bf16 => host_view_mut::<bf16>(described),
                _ => host_view_mut::<f32>(described),
            }),
            Self::Device { memory, dtype, layout } => Ok(memory.view_mut(*dtype, *layout)),
            Self::Staged { memory, described } => {
                Ok(memory.view_mut(described.dtype, Layout::contiguous(described.layout.shape())?))
            }
        }
    }

    /// What the device wrote, if it has to be copied to host memory; waits for the work.
    pub fn fetch(&self) -> Result<Vec<u8>> {
        let Self::Staged { memory, described } = self else { return Ok(Vec::new()) };
        let mut rows = bytes_of(described.layout.numel() * described.dtype.size())?;
        memory.read(&mut rows)?;
        Ok(rows)
    }

    /// Copies what was fetched to the host memory: the elements, and nothing between them.
    pub fn store(self, rows: &[u8]) {
        let Self::Staged { described, .. } = self else { return };
        if described.bytes == 0 {
            return;
        }
        // SAFETY: `check_memory` found it not null and inside the address space; by the contract of
        // `Described::new` nobody else uses it.
        let memory = unsafe { std::slice::from_raw_parts_mut(described.data, described.bytes as usize) };
        described.layout.for_each_row(described.dtype.size(), |strided, dense| {
            memory[strided].copy_from_slice(&rows[dense]);
        });
    }
}

/// Fetches every output before it stores any, so that a failure leaves all host memory as it was.
pub(crate) fn finish<'a, O: AsRef<[Output<'a>]> + IntoIterator<Item = Output<'a>>>(outputs: O) -> Result<()> {
    let mut fetched = Vec::with_capacity(outputs.as_ref().len());
    for output in outputs.as_ref() {
        fetched.push(output.fetch()?);
    }
    for (output, rows) in outputs.into_iter().zip(fetched) {
        output.store(&rows);
    }
    Ok(())
}

fn host_view<'a, T: Element>(described: &Described<'a>) -> TensorView<'a> {
    if described.bytes == 0 {
        return TensorView::from_host_strided::<T>(&[], described.layout);
    }
    let count = described.bytes as usize / size_of::<T>();
    // SAFETY: `check_memory` found it not null, aligned for the element type and inside the address
    // space. By the contract of `Described::new` nobody writes it during 'a, and by `expect_apart`
    // no output of this call overlaps it.
    let data = unsafe { std::slice::from_raw_parts(described.data.cast_const().cast::<T>(), count) };
    TensorView::from_host_strided(data, described.layout)
}

fn host_view_mut<'a, T: Element>(described: &mut Described<'a>) -> TensorViewMut<'a> {
    if described.bytes == 0 {
        return TensorViewMut::from_host_strided::<T>(&mut [], described.layout);
    }
    let count = described.bytes as usize / size_of::<T>();
    // SAFETY: as in `host_view`; nobody else uses the memory, and by `expect_apart` no other tensor
    // of this call overlaps it.
    let data = unsafe { std::slice::from_raw_parts_mut(described.data.cast::<T>(), count) };
    TensorViewMut::from_host_strided(data, described.layout)
}

pub(crate) fn upload(device: &Device, bytes: &[u8]) -> Result<DeviceMemory> {
    let mut memory = DeviceMemory::alloc(device, bytes.len() as u64)?;
    memory.write(bytes)?;
    Ok(memory)
}

fn bytes_of(count: usize) -> Result<Vec<u8>> {
    let mut bytes = reserve(count)?;
    bytes.resize(count, 0);
    Ok(bytes)
}

/// The layout without repetitions, in which dimensions of stride 0 have size 1; and the layout that
/// reads all elements of the whole from a row-major copy of it.
fn compact(layout: &Layout) -> Result<(Layout, Layout)> {
    let mut shape = layout.shape().to_vec();
    for (size, &stride) in shape.iter_mut().zip(layout.strides()) {
        if stride == 0 {
            *size = (*size).min(1);
        }
    }
    let dense = Layout::contiguous(&shape)?;
    let strides: Vec<u64> =
        dense.strides().iter().zip(layout.strides()).map(|(&dense, &own)| if own == 0 { 0 } else { dense }).collect();
    Ok((Layout::strided(&shape, layout.strides(), 0)?, Layout::strided(layout.shape(), &strides, 0)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gather(layout: &Layout, memory: &[u8]) -> Vec<u8> {
        let mut rows = vec![0; layout.numel()];
        layout.for_each_row(1, |strided, dense| rows[dense].copy_from_slice(&memory[strided]));
        rows
    }

    #[test]
    fn repetitions_are_stored_once() {
        let memory: Vec<u8> = (0..24).collect();
        let repeated = Layout::strided(&[2, 5, 3], &[8, 0, 2], 0).unwrap();
        let (stored, seen) = compact(&repeated).unwrap();
        assert_eq!((stored.shape(), stored.numel()), (&[2, 1, 3][..], 6));
        assert_eq!(gather(&seen, &gather(&stored, &memory)), gather(&repeated, &memory));
    }
}
