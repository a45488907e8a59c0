//! The application: a wgpu device, buffers and two compute kernels. It does not know of varlen-fa.

use anyhow::{Context, Result};
use varlen_fa::wgpu::{self, BufferUsages};

/// The application's device and queue.
pub struct Application {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
}

impl Application {
    /// Any adapter, with no feature and WebGPU's default limits.
    pub fn new() -> Result<Self> {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
        let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))
            .context("this example needs a wgpu adapter (on Linux a Vulkan driver; Mesa's lavapipe will do)")?;
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?;
        Ok(Self { device, queue })
    }

    /// A buffer for `len` f32s.
    pub fn buffer(&self, label: &str, len: usize) -> wgpu::Buffer {
        self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size: len as u64 * 4,
            usage: BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    }

    /// A buffer that holds the values.
    pub fn filled(&self, label: &str, values: &[f32]) -> wgpu::Buffer {
        let buffer = self.buffer(label, values.len());
        self.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(values));
        buffer
    }

    /// What a buffer holds, after everything that was submitted.
    pub fn read(&self, buffer: &wgpu::Buffer) -> Result<Vec<f32>> {
        let staging = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("staging"),
            size: buffer.size(),
            usage: BufferUsages::COPY_DST | BufferUsages::MAP_READ,
            mapped_at_creation: false,
        });
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, buffer.size());
        self.queue.submit([encoder.finish()]);
        staging.map_async(wgpu::MapMode::Read, .., |_| {});
        self.wait()?;
        let bytes = staging.get_mapped_range(..)?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    /// Waits for everything that was submitted.
    pub fn wait(&self) -> Result<()> {
        self.device.poll(wgpu::PollType::wait_indefinitely())?;
        Ok(())
    }

    /// A kernel, one invocation for each of `items`, with its buffers bound in the order of their bindings.
    pub fn kernel(&self, source: &str, buffers: &[&wgpu::Buffer], items: usize) -> Kernel {
        let module = self.device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: None,
            source: wgpu::ShaderSource::Wgsl(source.into()),
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: Default::default(),
            cache: None,
        });
        let entries: Vec<_> = (0..)
            .zip(buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let layout = &pipeline.get_bind_group_layout(0);
        let bind_group =
            self.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries });
        Kernel { pipeline, bind_group, groups: items.div_ceil(64) as u32 }
    }
}

/// A kernel of the application's with its buffers.
pub struct Kernel {
    pipeline: wgpu::ComputePipeline,
    bind_group: wgpu::BindGroup,
    groups: u32,
}

/// Workgroups in one dimension of a dispatch; further ones lie beside them.
const MAX_GROUPS: u32 = 65_535;

impl Kernel {
    /// Records one launch.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bind_group, &[]);
        pass.dispatch_workgroups(self.groups.min(MAX_GROUPS), self.groups.div_ceil(MAX_GROUPS), 1);
    }
}
