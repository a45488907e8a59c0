//! Scratch that calls use again, one after another: to allocate and to free it takes the driver
//! longer than to launch a kernel.

use std::ops::Deref;
use std::sync::{Mutex, PoisonError};

use crate::call::memory::DeviceBuffer;

use super::memory::CudaBuffer;

/// Buffers that are kept at most: one for each thread that launches at the same moment.
const MOST: usize = 4;
/// Larger ones are freed.
const LARGEST: u64 = 64 << 20;

/// Scratch of calls that came before, for those that come. All uses are in the order of one stream.
#[derive(Debug)]
pub struct KeptScratch<Buffer = CudaBuffer>(Mutex<Vec<Buffer>>);

/// Scratch of one call. When it is dropped, it is kept for calls whose work comes later.
#[derive(Debug)]
pub struct LentScratch<'a, Buffer: DeviceBuffer = CudaBuffer> {
    /// None only while it is dropped.
    buffer: Option<Buffer>,
    kept: Option<&'a KeptScratch<Buffer>>,
}

impl<Buffer> Default for KeptScratch<Buffer> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<Buffer: DeviceBuffer> KeptScratch<Buffer> {
    /// The smallest buffer that is large enough.
    pub fn take(&self, bytes: u64) -> Option<Buffer> {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = buffers.iter().enumerate().filter(|(_, buffer)| buffer.size() >= bytes);
        let (at, _) = fitting.min_by_key(|(_, buffer)| buffer.size())?;
        Some(buffers.swap_remove(at))
    }

    /// A buffer for one call, kept afterwards.
    pub fn lend(&self, buffer: Buffer) -> LentScratch<'_, Buffer> {
        LentScratch { buffer: Some(buffer), kept: Some(self) }
    }

    /// Frees all that no call has.
    pub fn clear(&self) {
        let buffers = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        // Freed without the lock.
        drop(buffers);
    }

    fn put(&self, buffer: Buffer) {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.push(buffer);
        let smallest = buffers.iter().enumerate().min_by_key(|(_, buffer)| buffer.size());
        let given_up = match smallest {
            Some((at, _)) if buffers.len() > MOST => Some(buffers.swap_remove(at)),
            _ => None,
        };
        drop(buffers);
        // Freed without the lock.
        drop(given_up);
    }
}

impl<Buffer: DeviceBuffer> LentScratch<'_, Buffer> {
    /// A buffer that is not kept, since it is a graph's own.
    pub fn of_graph(buffer: Buffer) -> Self {
        Self { buffer: Some(buffer), kept: None }
    }
}

impl<Buffer: DeviceBuffer> Deref for LentScratch<'_, Buffer> {
    type Target = Buffer;

    fn deref(&self) -> &Buffer {
        match &self.buffer {
            Some(buffer) => buffer,
            None => unreachable!("it is there until it is dropped"),
        }
    }
}

impl<Buffer: DeviceBuffer> Drop for LentScratch<'_, Buffer> {
    fn drop(&mut self) {
        let Some(kept) = self.kept else { return };
        if let Some(buffer) = self.buffer.take_if(|buffer| buffer.size() <= LARGEST) {
            kept.put(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::any::Any;
    use std::ops::Range;

    use super::*;
    use crate::cache::DeviceId;

    /// So many bytes that are nowhere.
    #[derive(Debug)]
    struct Bytes(u64);

    impl DeviceBuffer for Bytes {
        fn device(&self) -> DeviceId {
            DeviceId::CPU
        }
        fn device_name(&self) -> &str {
            "none"
        }
        fn size(&self) -> u64 {
            self.0
        }
        fn space(&self) -> u64 {
            1
        }
        fn touched(&self, bytes: Range<u64>) -> Range<u64> {
            bytes
        }
        fn as_any(&self) -> &dyn Any {
            self
        }
    }

    fn sizes(kept: &KeptScratch<Bytes>) -> Vec<u64> {
        let buffers = kept.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sizes: Vec<_> = buffers.iter().map(DeviceBuffer::size).collect();
        sizes.sort_unstable();
        sizes
    }

    #[test]
    fn a_call_has_the_smallest_that_is_large_enough() {
        let kept = KeptScratch::default();
        assert!(kept.take(0).is_none());
        for size in [300, 100, 200] {
            drop(kept.lend(Bytes(size)));
        }
        let sized = |bytes| kept.take(bytes).map(|buffer| buffer.size());
        assert_eq!((sized(301), sized(101)), (None, Some(200)));
        // Another call does not have the same at the same time.
        let lent = kept.take(101).map(|buffer| kept.lend(buffer));
        assert_eq!((lent.as_ref().map(|lent| lent.size()), sized(101)), (Some(300), None));
        drop(lent);
        assert_eq!(sizes(&kept), [100, 300]);
        kept.clear();
        assert!(sizes(&kept).is_empty());
    }

    #[test]
    fn few_are_kept_and_none_that_are_large_or_a_graphs() {
        let kept = KeptScratch::default();
        drop([5, 1, 4, 2, 3].map(|size| kept.lend(Bytes(size))));
        assert_eq!(sizes(&kept), [2, 3, 4, 5]);
        drop(kept.lend(Bytes(LARGEST + 1)));
        drop(LentScratch::of_graph(Bytes(9)));
        assert_eq!(sizes(&kept), [2, 3, 4, 5]);
    }
}
