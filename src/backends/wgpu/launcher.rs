//! Compiles shaders, and submits launches or records them for the application.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use wgpu::{
    BindGroupEntry, BindingResource, BindingType, BufferBinding, BufferBindingType, BufferUsages, ShaderRuntimeChecks,
    ShaderSource, ShaderStages,
};

use crate::call::op::Instant;
use crate::error::Result;

use super::context::Context;
use super::dispatch::{BINDING_ALIGNMENT, Launch};
use super::launches::Launches;
use super::pace::Pace;
use super::params::AttentionParams;
use super::recorder::{Dispatch, Recorder};
use super::shader::{ParamsIn, Shader, source};
use super::timer::Timer;
use super::transfer;

/// Uniform parameters lie this far apart, since each is a binding.
const SLOT_BYTES: usize = BINDING_ALIGNMENT as usize;
/// Bytes of immediates that every parameter struct fits into. Some devices have fewer; the
/// parameters of copies may fit there too.
pub(super) const IMMEDIATE_BYTES: u32 = size_of::<AttentionParams>() as u32;
const PARAMS_USAGE: BufferUsages = BufferUsages::UNIFORM.union(BufferUsages::COPY_DST);
/// A buffer of parameters has room for at least this many launches.
const MIN_SLOTS: usize = 16;
/// Buffers of parameters kept for reuse, one for each thread that submits at the same time.
const PARAMS_POOL_LEN: usize = 4;

#[derive(Debug)]
struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

/// A launch and its bind group.
#[derive(Debug)]
struct Bound<'a> {
    pipeline: Arc<Pipeline>,
    bind_group: wgpu::BindGroup,
    /// None if the parameters are in a buffer.
    immediates: Option<&'a [u8]>,
    groups: [u32; 3],
}

fn dispatch(pass: &mut dyn Dispatch, launches: &[Bound<'_>]) {
    for Bound { pipeline, bind_group, immediates, groups } in launches {
        pass.dispatch(&pipeline.pipeline, bind_group, *immediates, *groups);
    }
}

/// Compiles each shader once; submits or records launches.
#[derive(Debug)]
pub(super) struct Launcher {
    /// Immediates that a shader may have: 0 without the feature.
    max_immediate_bytes: u32,
    pipelines: Mutex<HashMap<Shader, Arc<Pipeline>>>,
    /// An external cache.
    pipeline_cache: Mutex<Option<wgpu::PipelineCache>>,
    /// Buffers of parameters whose launches are submitted: a later write to one comes after them.
    params_pool: Mutex<Vec<wgpu::Buffer>>,
}

impl Launcher {
    pub fn new(device: &wgpu::Device) -> Self {
        let has_immediates = device.features().contains(wgpu::Features::IMMEDIATES);
        Self {
            max_immediate_bytes: if has_immediates { device.limits().max_immediate_size } else { 0 },
            pipelines: Mutex::default(),
            pipeline_cache: Mutex::default(),
            params_pool: Mutex::default(),
        }
    }

    /// Submits launches in order, as one command buffer, or several if they are long. Each launch
    /// sees what earlier ones wrote. No lock is held meanwhile: a submission runs the
    /// application's callbacks.
    pub fn submit(&self, context: &Context, launches: &Launches<'_>, timer: &Timer, pace: &Arc<Pace>) -> Result<()> {
        context.faults.check()?;
        let submissions = launches.submissions();
        if submissions.is_empty() {
            return Ok(());
        }
        let list = launches.as_slice();
        let params = self.has_uniforms(list).then(|| self.take_params(context, list.len())).transpose()?;
        let bound = self.bind(context, list, params.as_ref())?;
        log::debug!("submitting {} dispatches in {} command buffers", list.len(), submissions.len());
        let passes =
            submissions.into_iter().map(|range| Ok((range, timer.next_pass()?))).collect::<Result<Vec<_>>>()?;
        let started = Instant::now();
        context.faults.capture("a launch", 0, || {
            for (range, timestamps) in passes {
                let mut encoder = context.device.create_command_encoder(&Default::default());
                {
                    let timestamp_writes = timestamps.as_ref().map(|pass| pass.writes());
                    let descriptor = wgpu::ComputePassDescriptor { label: Some("varlen-fa"), timestamp_writes };
                    dispatch(&mut encoder.begin_compute_pass(&descriptor), &bound[range]);
                }
                context.queue.submit([encoder.finish()]);
            }
        })?;
        if let Some(params) = params {
            let mut pool = self.params_pool.lock().unwrap_or_else(PoisonError::into_inner);
            if pool.len() < PARAMS_POOL_LEN {
                pool.push(params);
            }
        }
        context.faults.check()?;
        let telling = launches.main().filter(|&(shader, operations)| pace.is_telling(shader, operations));
        let Some((shader, operations)) = telling else { return Ok(()) };
        let pace = Arc::clone(pace);
        let done = move || pace.learn(shader, operations, started.elapsed());
        context.faults.capture("a launch", 0, || context.queue.on_submitted_work_done(done))
    }

    /// Records launches in order. Nothing is recorded on an error. The application decides
    /// whether, when and in which order the recording is submitted: the parameters lie in the
    /// recording, or in a buffer of its own that is written before the next submission of any
    /// kind.
    pub fn record(&self, context: &Context, launches: &[Launch], recorder: Recorder<'_>) -> Result<()> {
        context.faults.check()?;
        if launches.is_empty() {
            return Ok(());
        }
        log::debug!("recording {} dispatches", launches.len());
        let bytes = (launches.len() * SLOT_BYTES) as u64;
        let buffer = || context.allocator.unproven("params", bytes, PARAMS_USAGE);
        let params = self.has_uniforms(launches).then(buffer).transpose()?;
        let bound = self.bind(context, launches, params.as_ref())?;
        context.faults.capture("recording", 0, || {
            recorder.pass(|pass| dispatch(pass, &bound));
        })
    }

    fn params_in(&self, shader: Shader) -> ParamsIn {
        if shader.params_bytes() <= self.max_immediate_bytes { ParamsIn::Immediates } else { ParamsIn::Uniform }
    }

    fn has_uniforms(&self, launches: &[Launch]) -> bool {
        launches.iter().any(|launch| self.params_in(launch.shader) == ParamsIn::Uniform)
    }

    fn take_params(&self, context: &Context, launches: usize) -> Result<wgpu::Buffer> {
        let bytes = |slots: usize| (slots * SLOT_BYTES) as u64;
        {
            let mut pool = self.params_pool.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(index) = pool.iter().position(|buffer| buffer.size() >= bytes(launches)) {
                return Ok(pool.swap_remove(index));
            }
        }
        context.allocator.unproven("params", bytes(launches.next_power_of_two().max(MIN_SLOTS)), PARAMS_USAGE)
    }

    /// Compiles what is not compiled yet, has the parameters written before the next submission if
    /// there is a buffer for them, and makes the bind groups.
    fn bind<'a>(
        &self,
        context: &Context,
        launches: &'a [Launch],
        params: Option<&wgpu::Buffer>,
    ) -> Result<Vec<Bound<'a>>> {
        let pipelines =
            launches.iter().map(|launch| self.pipeline(context, launch.shader)).collect::<Result<Vec<_>>>()?;
        if let Some(params) = params {
            let mut slots = vec![0; launches.len() * SLOT_BYTES];
            for (slot, launch) in slots.chunks_exact_mut(SLOT_BYTES).zip(launches) {
                slot[..launch.params.len()].copy_from_slice(&launch.params);
            }
            transfer::write(context, params, 0..slots.len() as u64, &slots)?;
        }
        let bound = context.faults.capture("binding buffers", 0, || {
            let bind = |(slot, (launch, pipeline)): (usize, (&'a Launch, Arc<Pipeline>))| {
                let is_uniform = self.params_in(launch.shader) == ParamsIn::Uniform;
                let bind_group = bind_group(context, launch, &pipeline, params.filter(|_| is_uniform), slot);
                let immediates = (!is_uniform).then_some(launch.params.as_slice());
                Bound { pipeline, bind_group, immediates, groups: launch.groups }
            };
            launches.iter().zip(pipelines).enumerate().map(bind).collect()
        });
        bound.map_err(|error| {
            // Name the buffer, if it is an external one.
            let windows = launches.iter().flat_map(|launch| &launch.windows);
            let external = windows.filter_map(|window| Some((window.argument?, &window.buffer)));
            external
                .filter_map(|(argument, buffer)| context.allocator.expect_bindable(argument, buffer).err())
                .next()
                .unwrap_or(error)
        })
    }

    fn pipeline(&self, context: &Context, shader: Shader) -> Result<Arc<Pipeline>> {
        let mut pipelines = self.pipelines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = pipelines.get(&shader) {
            return Ok(Arc::clone(pipeline));
        }
        let cache = self.pipeline_cache();
        let started = Instant::now();
        let compiled = context
            .faults
            .capture("compiling a shader", 0, || Arc::new(self.compile(context, shader, cache.as_ref())))?;
        log::debug!("compiled {shader:?} in {:?}", started.elapsed());
        pipelines.insert(shader, Arc::clone(&compiled));
        Ok(compiled)
    }

    /// The external cache in use.
    pub fn pipeline_cache(&self) -> Option<wgpu::PipelineCache> {
        self.pipeline_cache.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Compiles with an external cache from now on. A small shader shows whether it is one of this
    /// device.
    pub fn set_pipeline_cache(&self, context: &Context, cache: &wgpu::PipelineCache) -> Result<()> {
        let (shader, operation) = (Shader::ZeroRows, "compiling a shader with a pipeline cache");
        // wgpu panics where the cache belongs to another instance.
        let compile = || catch_unwind(AssertUnwindSafe(|| self.compile(context, shader, Some(cache))));
        let Ok(compiled) = context.faults.capture(operation, 0, compile)? else {
            return Err(context.faults.explain(operation, "the cache belongs to another wgpu instance".to_owned()));
        };
        self.pipelines.lock().unwrap_or_else(PoisonError::into_inner).insert(shader, Arc::new(compiled));
        *self.pipeline_cache.lock().unwrap_or_else(PoisonError::into_inner) = Some(cache.clone());
        Ok(())
    }

    fn compile(&self, context: &Context, shader: Shader, cache: Option<&wgpu::PipelineCache>) -> Pipeline {
        let (name, params_in) = (shader.entry_point(), self.params_in(shader));
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(name),
            source: ShaderSource::Wgsl(source(shader, params_in).into()),
        };
        // Bounds checks and loop counters multiply the run time of these kernels: they keep loops
        // from unrolling.
        let checks = ShaderRuntimeChecks { bounds_checks: false, force_loop_bounding: false, ..Default::default() };
        // SAFETY: without these checks a shader must stay inside its bindings and end its loops.
        // All shaders are this crate's. Tensor positions are sums of index · stride with every
        // index below its dimension, and `problem` checked that such sums stay inside each view.
        // `Window`s cover the views' batch rows from the offset that the parameters count from.
        // Index lists come from `VarlenMeta` and `CuSeqlens`, whose constructors keep them inside
        // the tensors, or from shaders that write every element of every list, whatever the mask
        // holds; `problem` compared their sizes with the tensors'. A token list names
        // each of the S tokens of its batch row once, and kernels read it only for rows and keys
        // that their tile has. Ranges of keys end at the last of them, whoever numbered them.
        // Segments of an output have all its tokens together, which `problem` checked. Positions in private and workgroup arrays are bounded by
        // constants, and so are the matrices that are loaded from workgroup arrays and stored to
        // them, with their strides. Every loop counts up to a bound that does not change in it;
        // the loop over steps of keys advances by a step at least each time.
        let module = unsafe { context.device.create_shader_module_trusted(descriptor, checks) };
        let layout = bind_group_layout(context, shader, params_in);
        let pipeline_layout = context.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: match params_in {
                ParamsIn::Uniform => 0,
                ParamsIn::Immediates => shader.params_bytes(),
            },
        });
        let pipeline = context.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(name),
            // Everything read from workgroup memory was written before; see the shaders.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache,
        });
        Pipeline { pipeline, layout }
    }
}

/// Parameters at binding 0 if they are in a buffer, then the shader's storage buffers and its table
/// of heads.
fn bind_group_layout(context: &Context, shader: Shader, params_in: ParamsIn) -> wgpu::BindGroupLayout {
    let entry = |(binding, ty)| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: ShaderStages::COMPUTE,
        ty: BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
        count: None,
    };
    let storage =
        shader.bindings().into_iter().map(|binding| BufferBindingType::Storage { read_only: !binding.writes });
    let params = (params_in == ParamsIn::Uniform).then_some((0, BufferBindingType::Uniform));
    let heads = shader.has_head_table().then_some(BufferBindingType::Uniform);
    let entries: Vec<_> = params.into_iter().chain((1..).zip(storage.chain(heads))).map(entry).collect();
    let label = Some(shader.entry_point());
    context.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries })
}

/// Binds what a launch binds; its parameters lie in `slot`, if they are in a buffer.
fn bind_group(
    context: &Context,
    launch: &Launch,
    pipeline: &Pipeline,
    params: Option<&wgpu::Buffer>,
    slot: usize,
) -> wgpu::BindGroup {
    let binding = |buffer, offset, size| {
        BindingResource::Buffer(BufferBinding { buffer, offset, size: std::num::NonZeroU64::new(size) })
    };
    let params = params.map(|buffer| (0, binding(buffer, (slot * SLOT_BYTES) as u64, SLOT_BYTES as u64)));
    let storage = launch.windows.iter().map(|window| binding(&window.buffer, window.offset, window.size));
    let entries: Vec<_> = params
        .into_iter()
        .chain((1..).zip(storage))
        .map(|(binding, resource)| BindGroupEntry { binding, resource })
        .collect();
    let layout = &pipeline.layout;
    context.device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
}
