//! Memory that calls may point into, and what must still lie there afterwards.

use std::marker::PhantomData;
use std::ptr::{null_mut, without_provenance_mut};

use arbitrary::Arbitrary;

/// Bytes of the memory that tensors and arrays lie in.
pub const ARENA_BYTES: usize = 1 << 17;

/// No object lies in the first page.
const FIRST_PAGE: usize = 4096;

/// Memory of tensors and arrays, and what it held before the call.
pub struct Arena {
    now: Vec<u64>,
    before: Vec<u64>,
}

impl Arena {
    /// Any bytes, so any integers and any floating-point numbers.
    pub fn new(seed: u64) -> Self {
        let mut state = seed | 1;
        let word = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let now: Vec<u64> = std::iter::repeat_with(word).take(ARENA_BYTES / 8).collect();
        Self { before: now.clone(), now }
    }

    /// The address of the byte at `offset`.
    pub fn at(&mut self, offset: usize) -> *mut u8 {
        self.now.as_mut_ptr().cast::<u8>().wrapping_add(offset)
    }

    /// Bytes from `address` to the arena's end; 0 if it lies elsewhere.
    pub fn owned(&self, address: usize) -> u64 {
        let start = self.now.as_ptr().addr();
        if (start..start + ARENA_BYTES).contains(&address) { (start + ARENA_BYTES - address) as u64 } else { 0 }
    }

    /// Writes values for a call to read.
    pub fn put<const N: usize>(&mut self, offset: usize, values: impl IntoIterator<Item = [u8; N]>) {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.now);
        for (to, from) in bytes[offset..].chunks_exact_mut(N).zip(values) {
            to.copy_from_slice(&from);
        }
        self.before.copy_from_slice(&self.now);
    }

    /// The number at `offset`; 0 past the end.
    pub fn i32_at(&self, offset: usize) -> i32 {
        let bytes: &[u8] = bytemuck::cast_slice(&self.now);
        bytes.get(offset..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| i32::from_ne_bytes(*bytes))
    }

    /// Checks that the call wrote these bytes at most, and none twice: addresses and lengths.
    pub fn check(&mut self, written: impl IntoIterator<Item = (usize, usize)>) {
        let start = self.now.as_ptr().addr();
        let (now, before): (&[u8], &mut [u8]) =
            (bytemuck::cast_slice(&self.now), bytemuck::cast_slice_mut(&mut self.before));
        for (address, bytes) in written {
            let range = address - start..address - start + bytes;
            before[range.clone()].copy_from_slice(&now[range]);
        }
        if now != before {
            let at = now.iter().zip(&*before).position(|(now, before)| now != before);
            panic!("byte {at:?} of the memory was written and is no element of an output");
        }
    }
}

/// Where in the arena, or at which wrong place, an array or a tensor lies.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Spot {
    kind: u8,
    offset: u16,
}

impl Spot {
    pub fn pointer(self, arena: &mut Arena) -> *mut u8 {
        let offset = usize::from(self.offset) % ARENA_BYTES;
        match self.kind {
            0..=219 => arena.at(offset & !15),
            220..=229 => arena.at(offset),
            230..=239 => arena.at(ARENA_BYTES - 1 - offset % 256),
            240..=247 => null_mut(),
            248.. => without_provenance_mut(offset % FIRST_PAGE),
        }
    }
}

/// How a pointer to a struct or to a place for a result is given.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct At(u8);

impl At {
    /// A pointer as it should be.
    pub const GOOD: Self = Self(0);

    pub fn is_null(self) -> bool {
        (240..248).contains(&self.0)
    }

    pub fn is_good(self) -> bool {
        self.0 < 240
    }
}

const CANARY: u64 = 0xa5a5_5a5a_a5a5_5a5a;
/// Words before and after what a pointer points to.
const BORDER: usize = 4;

/// A struct, or a place for one, between canaries. Structs of the header are aligned as words are.
pub struct Slot<T> {
    words: Vec<u64>,
    at: At,
    of: PhantomData<T>,
}

impl<T> Slot<T> {
    const WORDS: usize = size_of::<T>().div_ceil(8);

    /// A place that nothing was written to.
    pub fn new(at: At) -> Self {
        const { assert!(align_of::<T>() <= 8) };
        Self { words: vec![CANARY; BORDER + Self::WORDS + BORDER], at, of: PhantomData }
    }

    pub fn of(value: T, at: At) -> Self {
        let mut slot = Self::new(at);
        // SAFETY: the words in the middle are memory for a `T`, aligned for it.
        unsafe { slot.place().write(value) };
        slot
    }

    fn place(&mut self) -> *mut T {
        self.words.as_mut_ptr().wrapping_add(BORDER).cast()
    }

    /// The pointer that the call is given.
    pub fn pointer(&mut self) -> *mut T {
        match self.at.0 {
            0..=239 => self.place(),
            240..=247 => null_mut(),
            248..=251 => without_provenance_mut(usize::from(self.at.0) * 8),
            252.. => self.place().wrapping_byte_add(1 + usize::from(self.at.0 % 2)),
        }
    }

    /// What the call wrote, if it succeeded: checks that it wrote there alone, and that a failed
    /// one wrote nothing.
    pub fn result(&mut self, is_ok: bool) -> Option<T> {
        let (head, rest) = self.words.split_at(BORDER);
        let (value, tail) = rest.split_at(Self::WORDS);
        assert!(head.iter().chain(tail).all(|&word| word == CANARY), "wrote beside the place of a result");
        let is_written = is_ok && self.at.is_good();
        if !is_written {
            assert!(value.iter().all(|&word| word == CANARY), "wrote a result, and failed or was given no place");
            return None;
        }
        // SAFETY: a successful call wrote a `T` there, which is plain data.
        Some(unsafe { self.place().read() })
    }
}
