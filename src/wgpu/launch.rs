//! Recording and submitting compute launches.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use wgpu::{
    BindGroupEntry, BindingResource, BindingType, BufferBinding, BufferBindingType, BufferUsages, ShaderRuntimeChecks,
    ShaderSource, ShaderStages,
};

use crate::error::Result;

use super::buffer::Allocator;
use super::fault::Faults;
use super::shader::Shader;
use super::timer::Timer;

/// Uniform parameters lie this far apart: WebGPU's `min_uniform_buffer_offset_alignment`.
const SLOT_BYTES: usize = 256;
/// Launches of one submission.
const SLOTS: usize = 256;

/// A part of a buffer.
#[derive(Debug, Clone)]
pub(super) struct Window {
    pub buffer: wgpu::Buffer,
    /// A multiple of 256.
    pub offset: u64,
    /// A multiple of 16, at least 16.
    pub size: u64,
}

impl Window {
    pub fn whole(buffer: &wgpu::Buffer) -> Self {
        Self { buffer: buffer.clone(), offset: 0, size: buffer.size() }
    }
}

/// One dispatch.
#[derive(Debug)]
pub(super) struct Launch {
    pub shader: Shader,
    /// The shader's parameter struct; at most 256 bytes.
    pub params: Vec<u8>,
    /// In the order of the shader's bindings.
    pub windows: Vec<Window>,
    pub groups: [u32; 3],
}

#[derive(Debug)]
struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

/// Compiles shaders once and submits launches.
#[derive(Debug)]
pub(super) struct Launcher {
    device: wgpu::Device,
    queue: wgpu::Queue,
    faults: Arc<Faults>,
    pipelines: Mutex<HashMap<Shader, Arc<Pipeline>>>,
    /// The lock is held from writing the parameters to submitting the launches that read them.
    uniforms: Mutex<wgpu::Buffer>,
}

impl Launcher {
    pub fn new(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        faults: &Arc<Faults>,
        allocator: &Allocator,
    ) -> Result<Self> {
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let uniforms = allocator.raw("params", (SLOT_BYTES * SLOTS) as u64, usage)?;
        Ok(Self {
            device: device.clone(),
            queue: queue.clone(),
            faults: Arc::clone(faults),
            pipelines: Mutex::default(),
            uniforms: Mutex::new(uniforms),
        })
    }

    /// Submits launches in order; each sees what the ones before it wrote.
    pub fn submit(&self, launches: &[Launch], timer: &Timer) -> Result<()> {
        self.faults.check()?;
        for part in launches.chunks(SLOTS) {
            let pipelines = part.iter().map(|launch| self.pipeline(launch.shader)).collect::<Result<Vec<_>>>()?;
            let uniforms = self.uniforms.lock().unwrap_or_else(PoisonError::into_inner);
            let mut params = vec![0; part.len() * SLOT_BYTES];
            for (slot, launch) in params.chunks_exact_mut(SLOT_BYTES).zip(part) {
                slot[..launch.params.len()].copy_from_slice(&launch.params);
            }
            self.queue.write_buffer(&uniforms, 0, &params);
            let bind_groups: Vec<_> = part
                .iter()
                .zip(&pipelines)
                .enumerate()
                .map(|(slot, (launch, pipeline))| self.bind_group(launch, pipeline, &uniforms, slot))
                .collect();
            let mut encoder = self.device.create_command_encoder(&Default::default());
            {
                let timestamp_writes = timer.next_pass()?;
                let timestamp_writes = timestamp_writes.as_ref().map(|pass| pass.writes());
                let mut pass = encoder
                    .begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("varlen-fa"), timestamp_writes });
                for ((launch, pipeline), bind_group) in part.iter().zip(&pipelines).zip(&bind_groups) {
                    pass.set_pipeline(&pipeline.pipeline);
                    pass.set_bind_group(0, bind_group, &[]);
                    let [x, y, z] = launch.groups;
                    pass.dispatch_workgroups(x, y, z);
                }
            }
            self.queue.submit([encoder.finish()]);
        }
        self.faults.check()
    }

    fn bind_group(
        &self,
        launch: &Launch,
        pipeline: &Pipeline,
        uniforms: &wgpu::Buffer,
        slot: usize,
    ) -> wgpu::BindGroup {
        let binding = |buffer, offset, size| {
            BindingResource::Buffer(BufferBinding { buffer, offset, size: std::num::NonZeroU64::new(size) })
        };
        let params = binding(uniforms, (slot * SLOT_BYTES) as u64, SLOT_BYTES as u64);
        let storage = launch.windows.iter().map(|window| binding(&window.buffer, window.offset, window.size));
        let entries: Vec<_> = std::iter::once(params)
            .chain(storage)
            .enumerate()
            .map(|(index, resource)| BindGroupEntry { binding: index as u32, resource })
            .collect();
        let layout = &pipeline.layout;
        self.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
    }

    fn pipeline(&self, shader: Shader) -> Result<Arc<Pipeline>> {
        let mut pipelines = self.pipelines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = pipelines.get(&shader) {
            return Ok(Arc::clone(pipeline));
        }
        let compiled = self.faults.capture(&self.device, "compiling a shader", 0, || Arc::new(self.compile(shader)))?;
        pipelines.insert(shader, Arc::clone(&compiled));
        Ok(compiled)
    }

    fn compile(&self, shader: Shader) -> Pipeline {
        let name = shader.entry_point();
        let descriptor =
            wgpu::ShaderModuleDescriptor { label: Some(name), source: ShaderSource::Wgsl(shader.source().into()) };
        // Bounds checks and loop counters cost these kernels several times their run time: they keep loops from unrolling.
        let checks = ShaderRuntimeChecks { bounds_checks: false, force_loop_bounding: false, ..Default::default() };
        // SAFETY: without these checks a shader must stay inside its bindings and end its loops. The shaders are this crate's
        // own. Tensor positions are sums of index · stride with every index below its dimension, and `problem` checked that such
        // sums stay inside each view; `Window`s cover the views' batch rows from the offset that the parameters count from. Index
        // lists come from `VarlenMeta` and `CuSeqlens`, whose constructors keep them inside the tensors, and `problem` compared
        // their sizes with the tensors'. Positions in private and workgroup arrays are bounded by constants. Every loop counts
        // up to a bound that does not change in it.
        let module = unsafe { self.device.create_shader_module_trusted(descriptor, checks) };
        let entry = |index: usize, ty| wgpu::BindGroupLayoutEntry {
            binding: index as u32,
            visibility: ShaderStages::COMPUTE,
            ty: BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let storage = shader.bindings().iter().map(|binding| BufferBindingType::Storage { read_only: !binding.writes });
        let entries: Vec<_> = std::iter::once(BufferBindingType::Uniform)
            .chain(storage)
            .enumerate()
            .map(|(index, ty)| entry(index, ty))
            .collect();
        let layout = self
            .device
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(name), entries: &entries });
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(name),
            // Everything read from workgroup memory was written before; see the shaders.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        Pipeline { pipeline, layout }
    }
}
