//! An application with a wgpu device of its own, and one attention call with its tensors in the application's buffers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, ensure};
use varlen_fa::wgpu::{self, BufferUsages};
use varlen_fa::{
    AttentionMask, Config, DType, Device, DeviceMemory, Kernel, KeyMask, Layout, MaskedAttention, TensorView,
    TensorViewMut, VarlenMeta,
};
use varlen_fa_testkit::{OracleShape, random};

use super::super::call::{Call, Mask, tensor_shapes};
use super::super::memory::{download, narrow, poison, sentinel, upload};

/// Usage of a buffer that is computed on and read back, and nothing else.
pub const READABLE: BufferUsages = BufferUsages::STORAGE.union(BufferUsages::COPY_SRC);

/// The application's side: a device with handlers of its own.
pub struct Application {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    adapter: wgpu::Adapter,
    raised: Arc<Mutex<Vec<String>>>,
    lost: Arc<AtomicUsize>,
}

impl Application {
    /// A device of the adapter that `like` is of, with no feature and WebGPU's default limits.
    pub fn new(like: &Device) -> Result<Self> {
        Self::with(like, wgpu::Features::empty(), wgpu::Limits::default())
    }

    pub fn with(like: &Device, required_features: wgpu::Features, required_limits: wgpu::Limits) -> Result<Self> {
        let adapter = adapter(like)?;
        let (device, queue) = open(&adapter, required_features, required_limits)?;
        let (raised, lost) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let (errors, losses) = (Arc::clone(&raised), Arc::clone(&lost));
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            errors.lock().unwrap_or_else(PoisonError::into_inner).push(error.to_string());
        }));
        device.set_device_lost_callback(move |_, _| {
            losses.fetch_add(1, Ordering::Relaxed);
        });
        Ok(Self { device, queue, adapter, raised, lost })
    }

    /// Another device of the same adapter and `wgpu::Instance`.
    pub fn sibling(&self) -> Result<(wgpu::Device, wgpu::Queue)> {
        self.sibling_with(wgpu::Features::empty())
    }

    pub fn sibling_with(&self, features: wgpu::Features) -> Result<(wgpu::Device, wgpu::Queue)> {
        open(&self.adapter, features, wgpu::Limits::default())
    }

    /// Whether the adapter has a feature.
    pub fn offers(&self, feature: wgpu::Features) -> bool {
        self.adapter.features().contains(feature)
    }

    /// Storage buffers of a shader that the adapter allows.
    pub fn storage_buffers(&self) -> u32 {
        self.adapter.limits().max_storage_buffers_per_shader_stage
    }

    /// The library's device over this one.
    pub fn attach(&self) -> Result<Device> {
        self.attach_with(Config::default())
    }

    pub fn attach_with(&self, config: Config) -> Result<Device> {
        Ok(Device::from_wgpu(&self.device, &self.queue, config)?)
    }

    /// Errors that reached the application's handler so far.
    pub fn raised(&self) -> Vec<String> {
        self.raised.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How often the application heard that the device was lost.
    pub fn losses(&self) -> usize {
        self.lost.load(Ordering::Relaxed)
    }

    /// A buffer with exactly this usage that holds the bytes.
    pub fn buffer(&self, usage: BufferUsages, bytes: &[u8]) -> Result<wgpu::Buffer> {
        let size = bytes.len() as u64;
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("application"),
            size,
            usage,
            mapped_at_creation: true,
        });
        buffer.get_mapped_range_mut(..)?.copy_from_slice(bytes);
        buffer.unmap();
        Ok(buffer)
    }

    /// What a buffer of usage `COPY_SRC` holds, after everything that was submitted.
    pub fn read(&self, buffer: &wgpu::Buffer) -> Result<Vec<u8>> {
        let staging = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("application's staging"),
            size: buffer.size(),
            usage: BufferUsages::COPY_DST | BufferUsages::MAP_READ,
            mapped_at_creation: false,
        });
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, buffer.size());
        self.queue.submit([encoder.finish()]);
        staging.map_async(wgpu::MapMode::Read, .., |_| {});
        self.device.poll(wgpu::PollType::wait_indefinitely())?;
        let bytes = staging.get_mapped_range(..)?.to_vec();
        Ok(bytes)
    }

    pub fn encoder(&self) -> wgpu::CommandEncoder {
        self.device.create_command_encoder(&Default::default())
    }

    /// Fails if an error reached the application's handler.
    pub fn expect_quiet(&self) -> Result<()> {
        let raised = self.raised();
        ensure!(raised.is_empty(), "the application's handler got {raised:?}");
        Ok(())
    }
}

fn open(
    adapter: &wgpu::Adapter,
    required_features: wgpu::Features,
    required_limits: wgpu::Limits,
) -> Result<(wgpu::Device, wgpu::Queue)> {
    let experimental_features = if required_features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        // SAFETY: the features have known bugs; the library uses this one after a check of its results.
        unsafe { wgpu::ExperimentalFeatures::enabled() }
    } else {
        wgpu::ExperimentalFeatures::disabled()
    };
    let descriptor =
        wgpu::DeviceDescriptor { required_features, required_limits, experimental_features, ..Default::default() };
    Ok(pollster::block_on(adapter.request_device(&descriptor))?)
}

/// The adapter that a device is of, found anew.
fn adapter(like: &Device) -> Result<wgpu::Adapter> {
    let info = like.wgpu().context("not a wgpu device")?.0.adapter_info();
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    adapters
        .into_iter()
        .find(|adapter| {
            let found = adapter.get_info();
            (&found.name, found.backend) == (&info.name, info.backend)
        })
        .ok_or_else(|| anyhow!("the adapter {} is gone", info.name))
}

/// Bits as bytes of memory.
pub fn bytes(bits: &[u32], dtype: DType) -> Vec<u8> {
    bits.iter().flat_map(|bits| bits.to_le_bytes()[..dtype.size()].to_vec()).collect()
}

/// Bytes of memory as bits.
pub fn bits(bytes: &[u8], dtype: DType) -> Vec<u32> {
    let word = |part: &[u8]| part.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
    bytes.chunks_exact(dtype.size()).map(word).collect()
}

/// A self-attention call on random values, some tokens of which are masked and hold NaN and infinities.
pub struct Case {
    pub dtype: DType,
    /// q, k and v, row-major.
    pub inputs: [Vec<u32>; 3],
    pub shapes: [[usize; 4]; 3],
    pub mask: KeyMask,
    pub meta: VarlenMeta,
}

impl Case {
    pub fn new(dtype: DType, seed: u64) -> Result<Self> {
        let shape = OracleShape { batch: 2, seq_q: 70, seq_k: 70, heads: 4, kv_heads: 2, head_dim: 32 };
        let keep = random::bernoulli_mask(seed, shape.batch * shape.seq_k, 0.6)?;
        let call = Call::random(shape, Mask::Varlen(keep.clone()), dtype, seed);
        let shapes = tensor_shapes(shape);
        let inputs = [0, 1, 2].map(|input| {
            let row = shapes[input][2] * shapes[input][3];
            let values = call.values[input].iter().enumerate();
            let bits = |(place, &value)| if keep[place / row] { narrow(value, dtype) } else { poison(place, dtype) };
            values.map(bits).collect()
        });
        let mask = KeyMask::from_bool(shape.batch, shape.seq_k, &keep)?;
        let meta = VarlenMeta::from_key_mask(&mask)?;
        Ok(Self { dtype, inputs, shapes, mask, meta })
    }

    /// The output that a device of the library's own gives.
    pub fn expected(&self, device: &Device, mask: AttentionMask<'_>) -> Result<Vec<u32>> {
        self.expected_by(&portable(device), mask)
    }

    /// The same of a layer with settings.
    pub fn expected_by(&self, layer: &MaskedAttention, mask: AttentionMask<'_>) -> Result<Vec<u32>> {
        let tensor = |input: usize| upload(layer.device(), self.dtype, &self.inputs[input], &self.shapes[input]);
        let (q, k, v) = (tensor(0)?, tensor(1)?, tensor(2)?);
        let out = download(&layer.forward(&q, &k, &v, mask)?.out)?;
        ensure!(out.iter().any(|&bits| bits != 0), "the expected output is all zeros: nothing is tested");
        Ok(out)
    }

    pub fn out_shape(&self) -> [usize; 4] {
        self.shapes[0]
    }

    pub fn out_len(&self) -> usize {
        self.inputs[0].len()
    }
}

/// The layer by the kernel that an application's device without any feature has, whatever the library's own device prefers.
pub fn portable(device: &Device) -> MaskedAttention {
    MaskedAttention::new(device).with_kernel(Kernel::WgslPortable)
}

/// A row-major layout at an offset in elements.
pub fn at(shape: &[usize], offset: usize) -> Result<Layout> {
    let contiguous = Layout::contiguous(shape)?;
    Ok(Layout::strided(shape, contiguous.strides(), offset as u64)?)
}

/// The tensors of a case in the application's buffers: the inputs in one, one after the other, the output in another.
pub struct InPlace {
    pub inputs: DeviceMemory,
    pub out: DeviceMemory,
    pub out_buffer: wgpu::Buffer,
    dtype: DType,
    layouts: [Layout; 3],
    out_layout: Layout,
}

/// Elements of the output's buffer after the output.
const ROOM_AFTER: usize = 64;

impl InPlace {
    /// With `gap` elements before each input, `out_offset` before the output, and sentinels wherever no input lies.
    pub fn new(application: &Application, device: &Device, case: &Case, gap: usize, out_offset: usize) -> Result<Self> {
        let mut arena = Vec::new();
        let mut layouts = Vec::new();
        for (bits, shape) in case.inputs.iter().zip(&case.shapes) {
            arena.resize(arena.len() + gap, sentinel(case.dtype));
            layouts.push(at(shape, arena.len())?);
            arena.extend_from_slice(bits);
        }
        // Buffers that are written when they are created have a multiple of 4 bytes.
        arena.resize(arena.len().next_multiple_of(2), sentinel(case.dtype));
        let inputs = application.buffer(BufferUsages::STORAGE, &bytes(&arena, case.dtype))?;
        let around = vec![sentinel(case.dtype); out_offset + case.out_len() + ROOM_AFTER];
        let out_buffer = application.buffer(READABLE, &bytes(&around, case.dtype))?;
        Ok(Self {
            inputs: DeviceMemory::from_wgpu(device, inputs)?,
            out: DeviceMemory::from_wgpu(device, out_buffer.clone())?,
            out_buffer,
            dtype: case.dtype,
            layouts: layouts.try_into().map_err(|_| anyhow!("three inputs"))?,
            out_layout: at(&case.out_shape(), out_offset)?,
        })
    }

    /// q, k and v.
    pub fn views(&self) -> [TensorView<'_>; 3] {
        self.layouts.map(|layout| self.inputs.view(self.dtype, layout))
    }

    /// q, k, v and the output.
    pub fn call(&mut self) -> ([TensorView<'_>; 3], TensorViewMut<'_>) {
        let Self { inputs, out, dtype, layouts, out_layout, .. } = self;
        (layouts.map(|layout| inputs.view(*dtype, layout)), out.view_mut(*dtype, *out_layout))
    }

    /// The output; an error if anything around it was written.
    pub fn output(&self, application: &Application) -> Result<Vec<u32>> {
        let memory = bits(&application.read(&self.out_buffer)?, self.dtype);
        let start = self.out_layout.offset() as usize;
        let (before, rest) = memory.split_at(start);
        let (out, after) = rest.split_at(self.out_layout.numel());
        let is_sentinel = |&bits: &u32| bits == sentinel(self.dtype);
        ensure!(before.iter().all(is_sentinel), "the memory before the output was written");
        ensure!(after.iter().all(is_sentinel), "the memory after the output was written");
        Ok(out.to_vec())
    }

    /// Fails if the output or anything around it was written.
    pub fn expect_untouched(&self, application: &Application) -> Result<()> {
        let memory = bits(&application.read(&self.out_buffer)?, self.dtype);
        let written = memory.iter().position(|&bits| bits != sentinel(self.dtype));
        ensure!(written.is_none(), "element {written:?} of the output's memory was written");
        Ok(())
    }
}
