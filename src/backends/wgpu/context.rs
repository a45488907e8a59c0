//! A wgpu device and its queue, with what every operation on them uses.

use std::sync::Arc;

use crate::cache::DeviceId;
use crate::error::Result;

use super::buffer::Allocator;
use super::dispatch::Window;
use super::fault::Faults;

/// A wgpu device and its queue, its faults and its buffers.
#[derive(Debug)]
pub(super) struct Context {
    pub id: DeviceId,
    pub name: Arc<str>,
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub faults: Arc<Faults>,
    pub allocator: Allocator,
    /// Bytes of the largest binding.
    pub max_binding_bytes: u64,
    /// Storage buffers of a shader: [`MAX_STORAGE_BUFFERS`](super::shader::MAX_STORAGE_BUFFERS) at least.
    pub max_storage_buffers: usize,
    /// Bound where a shader variant has a binding that it does not use, to read and to write.
    unused: [wgpu::Buffer; 2],
}

impl Context {
    pub fn new(
        (device, queue): (wgpu::Device, wgpu::Queue),
        faults: Arc<Faults>,
        name: &Arc<str>,
        max_binding_bytes: u64,
    ) -> Result<Self> {
        let id = DeviceId::unique();
        let allocator = Allocator::new(&device, &faults, id, name)?;
        let max_storage_buffers = device.limits().max_storage_buffers_per_shader_stage as usize;
        let unused = [allocator.storage("unused", 0)?, allocator.storage("unused", 0)?];
        Ok(Self {
            id,
            name: Arc::clone(name),
            device,
            queue,
            faults,
            allocator,
            max_binding_bytes,
            max_storage_buffers,
            unused,
        })
    }

    /// Zeros, which nobody overwrites: for a binding that nobody reads.
    pub fn unused_read(&self) -> Window {
        Window::whole(&self.unused[0])
    }

    /// For a binding that nobody writes.
    pub fn unused_write(&self) -> Window {
        Window::whole(&self.unused[1])
    }
}
