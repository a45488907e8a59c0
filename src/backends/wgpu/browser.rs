//! What elsewhere waits for the device. The thread of a browser's page may not: here the forms that wait are errors which name those
//! that give the thread back.

use crate::call::op::{Instant, Timing};
use crate::config::Config;
use crate::error::{Error, Result};

use super::{WgpuDevice, transfer};

impl WgpuDevice {
    pub(crate) fn open(_include_software: bool, _config: Config) -> Result<Self> {
        let (operation, instead) = ("opening a GPU", "Device::with_config_async");
        Err(Error::WouldBlock { device: "wgpu".to_owned(), operation, instead })
    }

    /// Cannot be told without waiting: a launch on another device's queue is an error of that launch.
    pub(super) fn expect_own_queue(&self) -> Result<()> {
        Ok(())
    }

    pub(super) fn wait(&self) -> Result<()> {
        Err(self.would_block("waiting for its work", "Device::synchronize_async or Device::time_async"))
    }

    pub(super) async fn wait_async(&self) -> Result<()> {
        self.faults.wait_async(&self.queue).await
    }

    pub(super) fn read(&self, _from: (&wgpu::Buffer, u64), _into: &mut [u8]) -> Result<()> {
        let instead = "Tensor::to_vec_async, DeviceMemory::read_async, or a write of whole u32s";
        Err(self.would_block("reading memory", instead))
    }

    pub(super) async fn read_async(&self, from: (&wgpu::Buffer, u64), into: &mut [u8]) -> Result<()> {
        transfer::download_async(self.handles(), &self.allocator, &self.faults, from, into).await
    }

    pub(super) fn timing(&self, _started: Instant) -> Result<Timing> {
        Err(self.would_block("timing", "Device::time_async"))
    }

    pub(super) async fn timing_async(&self, started: Instant) -> Result<Timing> {
        self.timer.stop_async(started, self.handles(), &self.allocator, &self.faults).await
    }

    fn would_block(&self, operation: &'static str, instead: &'static str) -> Error {
        Error::WouldBlock { device: self.name.to_string(), operation, instead }
    }
}
