//! Host memory: allocation, and typed rows of the views that an operation was given.

use std::marker::PhantomData;

use bytemuck::Pod;

use crate::call::memory::{Input, Output, Sink, Source, foreign_memory};
use crate::call::segments::{MAX_SEGMENTS, Segmented};
use crate::error::{Error, Result};
use crate::host_vec::reserve;
use crate::kernel::BackendKind;
use crate::layout::Layout;

/// The name of the device.
pub(super) const NAME: &str = BackendKind::Cpu.name();

/// Zeroed words for `bytes` bytes.
pub(super) fn alloc_words(bytes: u64) -> Result<Vec<u64>> {
    let count = bytes.div_ceil(8) as usize;
    let mut words = reserve(count)?;
    words.resize(count, 0);
    Ok(words)
}

pub(super) fn source_bytes(source: Source<'_>) -> Result<&[u8]> {
    match source {
        Source::Host(bytes) => Ok(bytes),
        Source::Device(buffer) => Err(foreign_memory(NAME, buffer.device_name())),
    }
}

pub(super) fn sink_bytes(sink: Sink<'_>) -> Result<&mut [u8]> {
    match sink {
        Sink::Host(bytes) => Ok(bytes),
        Sink::Device(buffer) => Err(foreign_memory(NAME, buffer.device_name())),
    }
}

/// A view of host memory to read, of 2 to 4 dimensions of which the last is contiguous.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostInput<'a, T> {
    data: &'a [T],
    pub layout: Layout,
}

impl<'a, T: Pod> HostInput<'a, T> {
    pub fn new(input: Input<'a>) -> Result<Self> {
        let bytes = source_bytes(input.memory)?;
        let data = whole_elements(bytes.len(), size_of::<T>());
        let data = bytemuck::try_cast_slice(&bytes[..data]).map_err(|_| misaligned::<T>(bytes.as_ptr() as usize))?;
        Ok(Self { data, layout: input.layout })
    }

    /// `len` elements from the given position of the leading dimensions on.
    #[inline]
    pub fn row(&self, position: &[usize], len: usize) -> &'a [T] {
        &self.data[offset_of(&self.layout, position)..][..len]
    }

    /// The rows of one batch row, of a view of rank 4.
    #[inline(always)]
    pub fn batch_rows(&self, batch: usize) -> BatchRows<&'a [T]> {
        BatchRows { data: self.data, offsets: RowOffsets::new(&self.layout, batch) }
    }

    /// The element at a position of all dimensions.
    #[inline]
    pub fn at(&self, position: &[usize]) -> T {
        self.data[offset_of(&self.layout, position)]
    }
}

/// Where the rows of one batch row lie, `[S, H]` of them.
#[derive(Debug, Clone, Copy)]
struct RowOffsets {
    first: usize,
    token: usize,
    head: usize,
}

impl RowOffsets {
    fn new(layout: &Layout, batch: usize) -> Self {
        let stride = |dim: usize| layout.strides().get(dim).map_or(0, |&stride| stride as usize);
        Self { first: offset_of(layout, &[batch]), token: stride(1), head: stride(2) }
    }

    #[inline(always)]
    fn at(self, token: usize, head: usize) -> usize {
        self.first + token * self.token + head * self.head
    }
}

/// The rows of one batch row. To ask for a row costs two multiplications: rows are short.
#[derive(Debug, Clone, Copy)]
pub(super) struct BatchRows<D> {
    data: D,
    offsets: RowOffsets,
}

impl<'a, T> BatchRows<&'a [T]> {
    #[inline(always)]
    pub fn row(&self, token: usize, head: usize, len: usize) -> &'a [T] {
        &self.data[self.offsets.at(token, head)..][..len]
    }
}

impl<T: Pod> BatchRows<&HostOutput<'_, T>> {
    /// # Safety
    /// As [`HostOutput::row`].
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "as HostOutput::row")]
    pub unsafe fn row(&self, token: usize, head: usize, len: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { self.data.elements(self.offsets.at(token, head), len) }
    }
}

/// `[B, S, H, D]` in segments along S. The first one, which is the only one of most calls, is found
/// by a comparison.
#[derive(Debug)]
pub(super) struct InSegments<H> {
    first: H,
    /// Tokens of the first one; all there can be if there are no others.
    first_len: usize,
    rest: Vec<Segment<H>>,
}

/// One of the segments that follow the first.
#[derive(Debug)]
struct Segment<H> {
    view: H,
    /// Tokens of all segments before it.
    start: usize,
}

pub(super) type InputSegments<'a, T> = InSegments<HostInput<'a, T>>;
pub(super) type OutputSegments<'a, T> = InSegments<HostOutput<'a, T>>;

impl<H> InSegments<H> {
    fn new<V>(
        views: Segmented<V>,
        layout: impl Fn(&V) -> &Layout,
        mut host: impl FnMut(V) -> Result<H>,
    ) -> Result<Self> {
        let several = match views {
            Segmented::One(view) => return Ok(Self { first: host(view)?, first_len: usize::MAX, rest: Vec::new() }),
            Segmented::Several(several) => several,
        };
        let mut start = 0;
        let mut segments = Vec::with_capacity(several.len());
        for view in several {
            let len = layout(&view).shape().get(1).copied().unwrap_or(0);
            // Tokens are counted in an i32 (checked by problem).
            segments.push((Segment { view: host(view)?, start }, len));
            start += len;
        }
        let mut segments = segments.into_iter();
        let Some((Segment { view: first, .. }, first_len)) = segments.next() else {
            return Err(Error::SegmentCount { argument: "segments", limit: MAX_SEGMENTS, got: 0 });
        };
        let rest = segments.map(|(segment, _)| segment).collect();
        Ok(Self { first, first_len, rest })
    }

    /// The segment of a token that the first does not have, and the token's place in it: the last one
    /// that starts at it or before. Empty ones that start there too come earlier.
    #[cold]
    #[inline(never)]
    fn later(&self, token: usize) -> (&H, usize) {
        let found = self.rest.iter().rev().find(|segment| segment.start <= token);
        found.map_or((&self.first, token), |segment| (&segment.view, token - segment.start))
    }
}

impl<'a, T: Pod> InputSegments<'a, T> {
    pub fn inputs(segments: Segmented<Input<'a>>) -> Result<Self> {
        Self::new(segments, |segment| &segment.layout, HostInput::new)
    }

    /// The rows of one batch row.
    #[inline(always)]
    pub fn batch_rows(&self, batch: usize) -> SegmentRows<'_, HostInput<'a, T>, &'a [T]> {
        SegmentRows { first: self.first.batch_rows(batch), first_len: self.first_len, all: self, batch }
    }
}

impl<'a, T: Pod> OutputSegments<'a, T> {
    pub fn outputs(segments: Segmented<Output<'a>>) -> Result<Self> {
        Self::new(segments, |segment| &segment.layout, HostOutput::new)
    }

    /// The rows of one batch row.
    #[inline(always)]
    pub fn batch_rows(&self, batch: usize) -> SegmentRows<'_, HostOutput<'a, T>, &HostOutput<'a, T>> {
        SegmentRows { first: self.first.batch_rows(batch), first_len: self.first_len, all: self, batch }
    }
}

/// The rows of one batch row, of whichever segment.
#[derive(Debug)]
pub(super) struct SegmentRows<'s, H, D> {
    first: BatchRows<D>,
    first_len: usize,
    all: &'s InSegments<H>,
    batch: usize,
}

impl<'a, T: Pod> SegmentRows<'_, HostInput<'a, T>, &'a [T]> {
    #[inline(always)]
    pub fn row(&self, token: usize, head: usize, len: usize) -> &'a [T] {
        if token < self.first_len { self.first.row(token, head, len) } else { self.later_row(token, head, len) }
    }

    #[cold]
    #[inline(never)]
    fn later_row(&self, token: usize, head: usize, len: usize) -> &'a [T] {
        let (segment, token) = self.all.later(token);
        segment.row(&[self.batch, token, head], len)
    }
}

impl<'s, T: Pod> SegmentRows<'s, HostOutput<'_, T>, &'s HostOutput<'_, T>> {
    /// # Safety
    /// As [`HostOutput::row`].
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "as HostOutput::row")]
    pub unsafe fn row(&self, token: usize, head: usize, len: usize) -> &mut [T] {
        if token < self.first_len {
            // SAFETY: the caller's promise.
            return unsafe { self.first.row(token, head, len) };
        }
        let (segment, token) = self.all.later(token);
        // SAFETY: the caller's promise.
        unsafe { segment.row(&[self.batch, token, head], len) }
    }
}

/// A view of host memory that several threads write, each to rows of its own; the last dimension is
/// contiguous.
#[derive(Debug)]
pub(super) struct HostOutput<'a, T> {
    data: *mut T,
    len: usize,
    pub layout: Layout,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: the struct stands for a `&mut [T]` whose parts are handed out by `row`, whose callers
// keep threads apart; `T` is plain data (`Pod`) that may be written from any thread.
unsafe impl<T: Pod + Send> Sync for HostOutput<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Pod + Send> Send for HostOutput<'_, T> {}

impl<'a, T: Pod> HostOutput<'a, T> {
    pub fn new(output: Output<'a>) -> Result<Self> {
        let bytes = sink_bytes(output.memory)?;
        let address = bytes.as_ptr() as usize;
        let len = whole_elements(bytes.len(), size_of::<T>());
        let data: &mut [T] = bytemuck::try_cast_slice_mut(&mut bytes[..len]).map_err(|_| misaligned::<T>(address))?;
        Ok(Self { data: data.as_mut_ptr(), len: data.len(), layout: output.layout, memory: PhantomData })
    }

    /// `len` elements from the given position of the leading dimensions on.
    ///
    /// # Safety
    /// Until the row is let go, no other call asks for elements of it.
    #[inline]
    #[expect(clippy::mut_from_ref, reason = "rows are handed out one at a time each; see the safety section")]
    pub unsafe fn row(&self, position: &[usize], len: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { self.elements(offset_of(&self.layout, position), len) }
    }

    /// The rows of one batch row, of a view of rank 4.
    #[inline(always)]
    pub fn batch_rows(&self, batch: usize) -> BatchRows<&Self> {
        BatchRows { data: self, offsets: RowOffsets::new(&self.layout, batch) }
    }

    /// # Safety
    /// As [`row`](Self::row).
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "as row")]
    unsafe fn elements(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "rows lie inside the memory: checked by problem");
        // SAFETY: start..start + len lies inside the allocation of `len` elements by the line
        // above.
        let first = unsafe { self.data.add(start) };
        // SAFETY: in bounds as above, borrowed mutably for 'a by `new`, and no other call asks for
        // these elements.
        unsafe { std::slice::from_raw_parts_mut(first, len) }
    }
}

/// Position in elements of a row; every layout's end fits a `usize`.
#[inline]
fn offset_of(layout: &Layout, position: &[usize]) -> usize {
    let steps = position.iter().zip(layout.strides()).map(|(&index, &stride)| index as u64 * stride);
    (layout.offset() + steps.sum::<u64>()) as usize
}

/// The part of `bytes` that holds whole elements.
fn whole_elements(bytes: usize, size: usize) -> usize {
    bytes / size * size
}

fn misaligned<T>(address: usize) -> Error {
    Error::Misaligned { argument: "memory", expected: align_of::<T>() as u64, got: address as u64 }
}
