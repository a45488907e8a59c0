//! What waits for the device: everywhere but in a browser, where `browser.rs` stands in its place.

use crate::call::op::{Instant, Timing};
use crate::config::Config;
use crate::error::Result;

use super::{WgpuDevice, foreign, transfer};

impl WgpuDevice {
    /// Opens the best adapter; the settings lower its limits.
    pub(crate) fn open(include_software: bool, config: Config) -> Result<Self> {
        pollster::block_on(Self::open_async(include_software, config))
    }

    /// That the queue is the device's.
    pub(super) fn expect_own_queue(&self) -> Result<()> {
        foreign::expect_own_queue(&self.queue, &self.faults)
    }

    /// Waits for all work submitted so far.
    pub(super) fn wait(&self) -> Result<()> {
        self.faults.wait()
    }

    /// Copies bytes of a buffer to the host, from a whole u32 on, after all work submitted so far.
    pub(super) fn read(&self, from: (&wgpu::Buffer, u64), into: &mut [u8]) -> Result<()> {
        transfer::download(self.handles(), &self.allocator, &self.faults, from, into)
    }

    /// Ends a timing.
    pub(super) fn timing(&self, started: Instant) -> Result<Timing> {
        self.timer.stop(started, self.handles(), &self.allocator, &self.faults)
    }
}
