//! Buffers: tensors' own, and scratch that is reused from call to call.

use std::any::Any;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use wgpu::BufferUsages;

use crate::backend::DeviceBuffer;
use crate::cache::DeviceId;
use crate::error::{Error, Result};

use super::fault::Faults;

/// Tensors are bound as 16-byte words, and an empty one must still be bindable.
const WORD_BYTES: u64 = 16;
/// Scratch buffers kept for reuse; more than one packed call needs.
const POOL_LEN: usize = 12;

/// A tensor's memory.
#[derive(Debug)]
pub(super) struct WgpuBuffer {
    pub raw: wgpu::Buffer,
    size: u64,
    device: DeviceId,
    device_name: Arc<str>,
    space: u64,
}

impl DeviceBuffer for WgpuBuffer {
    fn device(&self) -> DeviceId {
        self.device
    }

    fn device_name(&self) -> &str {
        &self.device_name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn space(&self) -> u64 {
        self.space
    }

    /// A launch cannot both read and write one buffer.
    fn touched(&self, _bytes: Range<u64>) -> Range<u64> {
        0..self.size
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Makes buffers of one device.
#[derive(Debug)]
pub(super) struct Allocator {
    device: wgpu::Device,
    faults: Arc<Faults>,
    id: DeviceId,
    device_name: Arc<str>,
    max_buffer_bytes: u64,
    pool: Mutex<Vec<wgpu::Buffer>>,
}

impl Allocator {
    pub fn new(device: &wgpu::Device, faults: &Arc<Faults>, id: DeviceId, device_name: &Arc<str>) -> Self {
        Self {
            device: device.clone(),
            faults: Arc::clone(faults),
            id,
            device_name: Arc::clone(device_name),
            max_buffer_bytes: device.limits().max_buffer_size,
            pool: Mutex::default(),
        }
    }

    /// Memory for a tensor.
    pub fn tensor(&self, size: u64) -> Result<WgpuBuffer> {
        static NEXT_SPACE: AtomicU64 = AtomicU64::new(1);
        let raw = self.storage("tensor", size)?;
        let space = NEXT_SPACE.fetch_add(1, Ordering::Relaxed);
        Ok(WgpuBuffer { raw, size, device: self.id, device_name: Arc::clone(&self.device_name), space })
    }

    /// A storage buffer that can be copied from and to.
    pub fn storage(&self, label: &'static str, size: u64) -> Result<wgpu::Buffer> {
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        self.raw(label, size.next_multiple_of(WORD_BYTES).max(WORD_BYTES), usage)
    }

    pub fn raw(&self, label: &'static str, size: u64, usage: BufferUsages) -> Result<wgpu::Buffer> {
        if size > self.max_buffer_bytes {
            let (limit_name, limit) = ("max_buffer_size (bytes)", self.max_buffer_bytes);
            return Err(Error::TooLarge { argument: label, limit_name, limit, got: size });
        }
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false };
        self.faults.capture(&self.device, "creating a buffer", size, || self.device.create_buffer(&descriptor))
    }

    /// Scratch of at least `size` bytes, with whatever an earlier call left in it. Give it back as soon as the launches that
    /// use it are recorded: launches recorded later run after them.
    pub fn take_scratch(&self, size: u64) -> Result<wgpu::Buffer> {
        let fits = |buffer: &wgpu::Buffer| buffer.size() >= size && buffer.size() / 2 <= size.max(WORD_BYTES);
        {
            let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
            let found = (0..pool.len()).filter(|&i| fits(&pool[i])).min_by_key(|&i| pool[i].size());
            if let Some(index) = found {
                return Ok(pool.remove(index));
            }
        }
        self.storage("scratch", size)
    }

    pub fn give_back(&self, scratch: impl IntoIterator<Item = wgpu::Buffer>) {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        pool.extend(scratch);
        let excess = pool.len().saturating_sub(POOL_LEN);
        pool.drain(..excess);
    }
}
