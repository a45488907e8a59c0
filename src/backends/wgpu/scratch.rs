//! Scratch that is kept from call to call: wgpu clears every new buffer before its first use, and
//! drivers take long to make and to free large ones.
//!
//! Every operation writes scratch before it reads it, so operations may share it if none of them
//! runs between the launches of another. Those of a recording lie in one command buffer, whatever
//! the order in which command buffers are submitted. Those of a submission of the library may lie
//! in several, between which a recording may be submitted. So each kind has scratch of its own, and
//! a submission has it to itself until all of its command buffers are submitted.

use std::sync::{Mutex, PoisonError};

/// Free scratch of a device, by who takes it.
#[derive(Debug, Default)]
pub(super) struct Kept {
    recordings: Mutex<Vec<wgpu::Buffer>>,
    submissions: Mutex<Vec<wgpu::Buffer>>,
}

/// Who takes scratch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taker {
    /// Launches that are recorded into one command buffer of the application.
    Recording,
    /// Launches that the library submits.
    Submission,
}

impl Kept {
    fn of(&self, taker: Taker) -> &Mutex<Vec<wgpu::Buffer>> {
        match taker {
            Taker::Recording => &self.recordings,
            Taker::Submission => &self.submissions,
        }
    }

    /// Scratch of at least `size` bytes. If all is too small, the largest is dropped: what replaces
    /// it does for both. So as many buffers are kept as were in use at once, each as large as some
    /// call needs.
    pub fn take(&self, taker: Taker, size: u64) -> Option<wgpu::Buffer> {
        let mut free = self.of(taker).lock().unwrap_or_else(PoisonError::into_inner);
        let index = smallest_of(&free, size).or_else(|| largest(&free))?;
        let buffer = free.swap_remove(index);
        (buffer.size() >= size).then_some(buffer)
    }

    pub fn give_back(&self, taker: Taker, scratch: impl IntoIterator<Item = wgpu::Buffer>) {
        self.of(taker).lock().unwrap_or_else(PoisonError::into_inner).extend(scratch);
    }

    /// Frees all that no call holds; what submitted or recorded commands use, once they are done.
    pub fn release(&self) {
        for taker in [Taker::Recording, Taker::Submission] {
            self.of(taker).lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }
}

/// The place of the smallest buffer of at least `size` bytes.
pub(super) fn smallest_of(buffers: &[wgpu::Buffer], size: u64) -> Option<usize> {
    (0..buffers.len()).filter(|&i| buffers[i].size() >= size).min_by_key(|&i| buffers[i].size())
}

fn largest(buffers: &[wgpu::Buffer]) -> Option<usize> {
    (0..buffers.len()).max_by_key(|&i| buffers[i].size())
}
