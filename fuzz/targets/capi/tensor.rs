//! Descriptors of tensors: right ones, the faults put into them, and what the header allows.

use std::mem::MaybeUninit;

use arbitrary::Arbitrary;

use crate::memory::{ARENA_BYTES, Arena, At, Slot, Spot};
use crate::types::varlen_fa_tensor;

/// The most elements of a tensor that is within its memory: elements that share an address could be
/// any number, and a call over them takes its time by right.
const MAX_ELEMENTS: u128 = 1 << 13;

/// Gaps behind a row of a head: 0, 8, 16 or 24 elements.
const GAPS: u64 = 4;
const GAP_STEP: u64 = 8;

/// Tensors start at multiples of this, and so much memory or more is between them.
const BETWEEN: usize = 16;

/// A size: a small one, one at a border of an integer type, or any.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Size {
    Small(u8),
    Edge(u8),
    Any(u64),
}

impl Size {
    pub fn get(self) -> u64 {
        const BITS: [u32; 8] = [15, 16, 31, 32, 33, 62, 63, 64];
        match self {
            Self::Small(value) => u64::from(value % 12),
            // One below a power of two, the power, or one above it.
            Self::Edge(value) => {
                let power = 1_u128 << BITS[usize::from(value / 3) % BITS.len()];
                (power + u128::from(value % 3)).wrapping_sub(1) as u64
            }
            Self::Any(value) => value,
        }
    }
}

/// What is wrong with one tensor of a call.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Fault {
    tensor: u8,
    what: What,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum What {
    DType(u32),
    Memory(u32),
    Rank(u8),
    ReservedWord(u32),
    Reserved(u8, u64),
    Shape(u8, Size),
    Stride(u8, Size),
    Data(Spot),
    /// Where another tensor of the call lies.
    DataOf(u8),
    Bytes(Size),
    Descriptor(At),
}

/// The tensors of one call.
pub struct Tensors {
    pub all: Vec<varlen_fa_tensor>,
    at: Vec<At>,
    pub has_fault: bool,
}

/// Element types by the numbers of the header.
pub const F32: u32 = 1;

pub fn element_bytes(dtype: u32) -> Option<u64> {
    match dtype {
        F32 => Some(4),
        2 | 3 => Some(2),
        _ => None,
    }
}

impl Tensors {
    /// Tensors one behind the other in the arena, each of a shape, an element type, and rows as its
    /// byte says: bits 0 and 1 are the gap behind each row of a head, in steps of 8 elements; bit 2
    /// puts heads before tokens.
    pub fn new(arena: &mut Arena, tensors: &[(&[u64], u32, u8)]) -> Self {
        let mut offset = 0;
        let all: Vec<_> = tensors
            .iter()
            .map(|&(shape, dtype, rows)| {
                let mut tensor = descriptor(shape, dtype, rows);
                tensor.data = arena.at(offset).cast();
                offset += (tensor.bytes as usize).next_multiple_of(BETWEEN) + BETWEEN;
                assert!(offset <= ARENA_BYTES, "the memory is too small for {tensors:?}");
                tensor
            })
            .collect();
        let at = vec![At::GOOD; all.len()];
        Self { all, at, has_fault: false }
    }

    /// Puts faults in, and keeps to the header's rule for pointers.
    pub fn spoil(&mut self, arena: &mut Arena, faults: &[Fault]) {
        for fault in faults {
            let (at, count) = (usize::from(fault.tensor) % self.all.len(), self.all.len());
            let other = match fault.what {
                What::DataOf(other) => self.all[usize::from(other) % count].data,
                _ => std::ptr::null_mut(),
            };
            let tensor = &mut self.all[at];
            match fault.what {
                What::DType(value) => tensor.dtype = enum_of(value),
                What::Memory(value) => tensor.memory = enum_of(value),
                What::Rank(rank) => tensor.rank = rank.into(),
                What::ReservedWord(word) => tensor.reserved_word = word,
                What::Reserved(word, value) => tensor.reserved[usize::from(word) % 2] = value,
                What::Shape(dim, size) => tensor.shape[usize::from(dim) % 4] = size.get(),
                What::Stride(dim, stride) => tensor.strides[usize::from(dim) % 4] = stride.get() as i64,
                What::Data(spot) => tensor.data = spot.pointer(arena).cast(),
                What::DataOf(_) => tensor.data = other,
                What::Bytes(bytes) => tensor.bytes = bytes.get(),
                What::Descriptor(at_which) => self.at[at] = at_which,
            }
            self.has_fault = true;
        }
        for tensor in &mut self.all {
            let rank = (tensor.rank as usize).min(4);
            tensor.bytes = tensor.bytes.min(arena.owned(tensor.data.addr()));
            if numel(tensor, rank) > MAX_ELEMENTS && reach(tensor, rank).is_some_and(|end| end <= tensor.bytes.into()) {
                tensor.shape.iter_mut().for_each(|size| *size %= 6);
            }
        }
    }

    /// The descriptors as the call gets them.
    pub fn slots(&self) -> Vec<Slot<varlen_fa_tensor>> {
        self.all.iter().zip(&self.at).map(|(&tensor, &at)| Slot::of(tensor, at)).collect()
    }

    /// Whether the header allows the tensor: a place inside its memory, on the CPU device.
    pub fn is_sound(&self, at: usize, rank: usize) -> bool {
        let tensor = &self.all[at];
        let Some(element) = element_bytes(number(tensor.dtype)) else { return false };
        let reserved = tensor.reserved == [0; 2] && tensor.reserved_word == 0;
        if !self.at[at].is_good() || !reserved || number(tensor.memory) != 0 || tensor.rank as usize != rank {
            return false;
        }
        if tensor.strides[..rank].iter().any(|&stride| stride < 0) {
            return false;
        }
        let address = tensor.data.addr() as u64;
        numel(tensor, rank) == 0
            || (address.is_multiple_of(element) && reach(tensor, rank).is_some_and(|end| end <= tensor.bytes.into()))
    }

    pub fn shape(&self, at: usize, rank: usize) -> &[u64] {
        &self.all[at].shape[..rank]
    }

    pub fn dtype(&self, at: usize) -> u32 {
        number(self.all[at].dtype)
    }

    /// Whether no two of the memories overlap of which one is an output.
    pub fn are_apart(&self, outputs: &[usize]) -> bool {
        let range = |at: usize| {
            let tensor = &self.all[at];
            let start = tensor.data.addr() as u128;
            (start, start + reach(tensor, (tensor.rank as usize).min(4)).unwrap_or(0))
        };
        outputs.iter().all(|&output| {
            (0..self.all.len()).filter(|&other| other != output).all(|other| {
                let ((a, a_end), (b, b_end)) = (range(output), range(other));
                a == a_end || b == b_end || a_end <= b || b_end <= a
            })
        })
    }

    /// Address and bytes of each row of elements of an output; checks that no element lies in two
    /// places.
    pub fn elements(&self, at: usize) -> Vec<(usize, usize)> {
        let tensor = &self.all[at];
        let (rank, element) = (tensor.rank as usize, element_bytes(number(tensor.dtype)).unwrap_or(0) as usize);
        let mut positions = vec![0_usize];
        if numel(tensor, rank) == 0 {
            positions.clear();
        }
        for (&size, &stride) in tensor.shape[..rank].iter().zip(&tensor.strides[..rank]) {
            if !positions.is_empty() {
                positions = positions
                    .iter()
                    .flat_map(|&at| (0..size as usize).map(move |i| at + i * stride as usize))
                    .collect();
            }
        }
        positions.sort_unstable();
        assert!(positions.windows(2).all(|pair| pair[0] < pair[1]), "an output that overlaps itself was accepted");
        positions.into_iter().map(|at| (tensor.data.addr() + at * element, element)).collect()
    }
}

/// How many rows the memory holds of all tensors of a call on packed rows together: so many heads of
/// so many elements, of any type and with any gap, and f32 numbers beside.
pub fn rows_in_memory(heads: u64, dim: u64, numbers: u64) -> u64 {
    let widest_head = dim + (GAPS - 1) * GAP_STEP;
    let row_bytes = (heads * widest_head + numbers) * 4;
    // Between tensors, of which a call has five.
    (ARENA_BYTES - 5 * 2 * BETWEEN) as u64 / row_bytes
}

fn descriptor(shape: &[u64], dtype: u32, rows: u8) -> varlen_fa_tensor {
    let gap = u64::from(rows) % GAPS * GAP_STEP;
    let rank = shape.len();
    let mut tensor = varlen_fa_tensor {
        data: std::ptr::null_mut(),
        bytes: 0,
        dtype: enum_of(dtype),
        memory: enum_of(0),
        rank: rank as u32,
        reserved_word: 0,
        shape: [0; 4],
        strides: [0; 4],
        reserved: [0; 2],
    };
    tensor.shape[..rank].copy_from_slice(shape);
    // The order of dimensions in memory, from the innermost.
    let mut order: Vec<usize> = (0..rank).rev().collect();
    if rank == 4 && rows & 4 != 0 {
        order.swap(1, 2);
    }
    let mut step = 1;
    for (place, &dim) in order.iter().enumerate() {
        tensor.strides[dim] = step as i64;
        step *= shape[dim].max(1);
        if place == 0 {
            step += gap;
        }
    }
    tensor.bytes = reach(&tensor, rank).unwrap_or(0) as u64;
    tensor
}

/// Saturates.
fn numel(tensor: &varlen_fa_tensor, rank: usize) -> u128 {
    tensor.shape[..rank].iter().fold(1, |product: u128, &size| product.saturating_mul(size.into()))
}

/// Bytes from the first element to the end of the last; `None` if they are past counting.
fn reach(tensor: &varlen_fa_tensor, rank: usize) -> Option<u128> {
    if numel(tensor, rank) == 0 {
        return Some(0);
    }
    let element = element_bytes(number(tensor.dtype)).unwrap_or(1);
    let dims = tensor.shape[..rank].iter().zip(&tensor.strides[..rank]);
    let last = dims.into_iter().try_fold(0_u128, |last, (&size, &stride)| {
        last.checked_add(u128::from(size - 1).checked_mul(u128::try_from(stride).ok()?)?)
    })?;
    last.checked_add(1)?.checked_mul(element.into())
}

/// A number in a field or an argument of an enum.
pub fn enum_of<E>(number: u32) -> MaybeUninit<E> {
    const { assert!(size_of::<E>() == size_of::<u32>()) };
    let mut value = MaybeUninit::<E>::uninit();
    // SAFETY: memory of a number's size, aligned as one.
    unsafe { value.as_mut_ptr().cast::<u32>().write(number) };
    value
}

/// The number in such a field.
pub fn number<E>(value: MaybeUninit<E>) -> u32 {
    const { assert!(size_of::<E>() == size_of::<u32>()) };
    // SAFETY: every such field here was made by `enum_of`.
    unsafe { value.as_ptr().cast::<u32>().read() }
}
