//! The WGSL device: compute shaders on Vulkan, Metal, DirectX 12 and WebGPU adapters. It needs no optional feature; where an adapter
//! has cooperative matrices, attention runs on them.

mod adapter;
mod attention;
#[cfg(not(target_arch = "wasm32"))]
mod blocking;
#[cfg(target_arch = "wasm32")]
mod browser;
mod buffer;
mod coop;
mod copy;
mod fault;
mod foreign;
#[cfg(target_arch = "wasm32")]
mod later;
mod launch;
mod launches;
mod metadata;
mod pace;
mod params;
mod placement;
mod recorder;
mod shader;
mod timer;
mod transfer;

use std::any::Any;
use std::sync::Arc;

use wgpu::{BufferUsages, DeviceType, Features};

use crate::cache::DeviceId;
#[cfg(target_arch = "wasm32")]
use crate::call::op::Later;
use crate::call::op::{Backend, Instant, Op, Sink, Source, Storage, Timing, no_device_tables};
use crate::call::plan::Capabilities;
use crate::call::problem::HEAD_DIM_STEP;
use crate::config::Config;
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::{BackendKind, Kernel, MAX_HEAD_DIM};
use crate::mask::meta::VarlenMeta;

use buffer::{Allocator, WgpuBuffer};
use coop::Coop;
use fault::Faults;
use launch::Launcher;
use launches::Launches;
use pace::Pace;
use shader::Algorithm;
use timer::Timer;

pub use recorder::Recorder;

/// Copies between host and device are of whole u32s.
const COPY_STEP: usize = 4;

/// A wgpu device with its queue and what was compiled and allocated on it.
#[derive(Debug)]
pub(crate) struct WgpuDevice {
    id: DeviceId,
    name: Arc<str>,
    capabilities: Capabilities,
    device: wgpu::Device,
    queue: wgpu::Queue,
    faults: Arc<Faults>,
    allocator: Allocator,
    launcher: Launcher,
    pace: Arc<Pace>,
    timer: Timer,
    /// What it has of cooperative matrices, if the kernel on them can run.
    coop: Option<Coop>,
    /// Bound where a shader variant has a binding that it does not use, to read and to write.
    unused: [wgpu::Buffer; 2],
}

impl WgpuDevice {
    /// Opens the best adapter; the settings lower its limits.
    pub(crate) async fn open_async(include_software: bool, config: Config) -> Result<Self> {
        let (device, queue, coop) = adapter::open(include_software, config.max_binding_bytes).await?;
        let mut opened = Self::over(device, queue, coop, config)?;
        opened.faults.listen();
        opened.offer_coop(config.kernel);
        Ok(opened)
    }

    /// Computes on the application's device, whose handlers stay as they are.
    pub(crate) fn foreign(device: &wgpu::Device, queue: &wgpu::Queue, config: Config) -> Result<Self> {
        foreign::expect_limits(&device.limits())?;
        let coop = Coop::of_device(device);
        let mut device = Self::over(device.clone(), queue.clone(), coop, config)?;
        device.expect_own_queue()?;
        device.offer_coop(config.kernel);
        Ok(device)
    }

    /// Offers the kernel on cooperative matrices, before all others, if it passes its check: they are experimental in wgpu, and
    /// drivers are known that compute them wrong. A kernel that the settings ask for is left alone, unchecked.
    fn offer_coop(&mut self, only: Option<Kernel>) {
        if self.coop.is_none() || only == Some(Kernel::WgslPortable) {
            return;
        }
        if only == Some(Kernel::WgslCoop) {
            self.capabilities.kernels = vec![Kernel::WgslCoop];
            return;
        }
        let started = Instant::now();
        let refused = match coop::differs(self) {
            Ok(None) => {
                log::debug!("{}: kernel {} passed its check, {:?}", self.name, Kernel::WgslCoop, started.elapsed());
                self.capabilities.kernels.insert(0, Kernel::WgslCoop);
                return;
            }
            Ok(Some(apart)) => format!("its results are {apart} off"),
            Err(error) => error.to_string(),
        };
        log::warn!("{}: kernel {} is not used: {refused}", self.name, Kernel::WgslCoop);
    }

    fn over(device: wgpu::Device, queue: wgpu::Queue, coop: Option<Coop>, config: Config) -> Result<Self> {
        let (info, limits) = (device.adapter_info(), device.limits());
        // The shaders count 16-byte words in 32 bits, and Vulkan's bindings end below 2 GiB.
        let largest = limits.max_storage_buffer_binding_size.min((1 << 31) - 256);
        let capabilities = Capabilities {
            backend: BackendKind::Wgpu,
            adapter: adapter::name(&info),
            is_software: info.device_type == DeviceType::Cpu,
            dtypes: &[DType::F32, DType::F16, DType::Bf16],
            kernels: vec![Kernel::WgslPortable],
            max_buffer_bytes: limits.max_buffer_size,
            max_binding_bytes: config.max_binding_bytes.map_or(largest, |bytes| largest.min(bytes)),
            has_timestamps: device.features().contains(Features::TIMESTAMP_QUERY),
        };
        let id = DeviceId::unique();
        let name: Arc<str> = capabilities.to_string().into();
        let faults = Faults::of(&device, &name);
        let allocator = Allocator::new(&device, &faults, id, &name)?;
        let launcher = Launcher::new(&device, &queue, &faults);
        let unused = [allocator.storage("unused", 0)?, allocator.storage("unused", 0)?];
        let pace = Arc::new(Pace::new(config.max_dispatch_operations, info.device_type));
        let timer = Timer::new(&name);
        Ok(Self { id, name, capabilities, device, queue, faults, allocator, launcher, pace, timer, coop, unused })
    }

    pub(crate) fn handles(&self) -> (&wgpu::Device, &wgpu::Queue) {
        (&self.device, &self.queue)
    }

    /// Compiles with the application's cache from now on.
    pub(crate) fn set_pipeline_cache(&self, cache: &wgpu::PipelineCache) -> Result<()> {
        self.launcher.set_pipeline_cache(cache)
    }

    /// A new buffer that holds the bytes.
    fn uploaded(&self, label: &'static str, bytes: &[u8]) -> Result<wgpu::Buffer> {
        let buffer = self.allocator.storage(label, bytes.len() as u64)?;
        transfer::upload(&self.queue, &self.faults, &buffer, bytes)?;
        Ok(buffer)
    }

    /// The application's buffer as memory of this device.
    pub(crate) fn import(&self, buffer: wgpu::Buffer) -> Result<Storage> {
        self.faults.check()?;
        Ok(Storage::Device(Box::new(self.allocator.foreign(buffer)?)))
    }

    /// Records an operation for the application to submit.
    pub(crate) fn encode(&self, op: Op<'_>, recorder: Recorder<'_>) -> Result<()> {
        self.launcher.record(self.launches(op)?.as_slice(), &self.allocator, recorder)
    }

    fn launches(&self, op: Op<'_>) -> Result<Launches<'_>> {
        let mut launches = Launches::new(&self.allocator);
        match op {
            Op::Attention(attention) => self.record_attention(&attention, &mut launches)?,
            Op::Pack { pairs, meta } => {
                for (from, to) in &pairs {
                    self.record_pack(from, to, meta, &mut launches)?;
                }
            }
            Op::Scatter { packed, padded, meta } => self.record_scatter(&packed, &padded, meta, &mut launches)?,
            Op::Zero(out) => self.record_zero(&out, &mut launches)?,
            Op::Metadata { .. } => return Err(no_device_tables(self.name())),
        }
        Ok(launches)
    }

    fn source<'a>(&self, source: Source<'a>) -> Result<&'a WgpuBuffer> {
        source.owned_by(self)
    }

    fn sink<'a>(&self, sink: &Sink<'a>) -> Result<&'a WgpuBuffer> {
        sink.owned_by(self)
    }

    /// The buffer of a source that the host may copy from.
    fn readable<'a>(&self, source: Source<'a>) -> Result<&'a wgpu::Buffer> {
        let buffer = self.source(source)?;
        buffer.expect_usage("memory", BufferUsages::COPY_SRC)?;
        buffer.expect_unmapped("memory")?;
        Ok(&buffer.raw)
    }
}

impl Backend for WgpuDevice {
    fn id(&self) -> DeviceId {
        self.id
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn alloc(&self, bytes: u64) -> Result<Storage> {
        Ok(Storage::Device(Box::new(self.allocator.tensor(bytes)?)))
    }

    fn upload(&self, to: Sink<'_>, bytes: &[u8]) -> Result<()> {
        let buffer = self.sink(&to)?;
        buffer.expect_usage("memory", BufferUsages::COPY_DST)?;
        buffer.expect_unmapped("memory")?;
        let whole = bytes.len() / COPY_STEP * COPY_STEP;
        if whole == bytes.len() || !buffer.is_foreign() {
            return transfer::upload(&self.queue, &self.faults, &buffer.raw, bytes);
        }
        // Copies are of whole u32s; what the last one holds beside our bytes is the application's.
        buffer.expect_usage("memory", BufferUsages::COPY_SRC)?;
        let mut padded = bytes.to_vec();
        padded.resize(whole + COPY_STEP, 0);
        self.read((&buffer.raw, whole as u64), &mut padded[whole..])?;
        padded[..bytes.len()].copy_from_slice(bytes);
        transfer::upload(&self.queue, &self.faults, &buffer.raw, &padded)
    }

    fn download(&self, from: Source<'_>, into: &mut [u8]) -> Result<()> {
        self.read((self.readable(from)?, 0), into)
    }

    fn execute(&self, op: Op<'_>) -> Result<()> {
        if let Op::Zero(out) = &op
            && self.clear_whole(out)?
        {
            return Ok(());
        }
        self.launcher.submit(&self.launches(op)?, &self.allocator, &self.timer, &self.pace)
    }

    fn upload_meta(&self, meta: &VarlenMeta) -> Result<()> {
        self.indices(meta)?;
        self.inv_indices(meta)?;
        self.cu_seqlens(meta.cu_seqlens())?;
        self.token_lists(meta)?;
        // Every tile size that a call may want; each is made once.
        for head_dim in (HEAD_DIM_STEP..=MAX_HEAD_DIM).step_by(HEAD_DIM_STEP) {
            let coop = self.coop.map(|coop| Algorithm::Coop(coop.tile(head_dim)));
            for algorithm in coop.into_iter().chain([Algorithm::Portable]) {
                self.tiles(meta.cu_seqlens(), algorithm.tile_rows(head_dim))?;
                self.fused_tiles(meta, algorithm.tile_rows(head_dim))?;
            }
        }
        // What dense paths use instead.
        self.mask_bits(meta.key_mask()).map(drop)
    }

    fn synchronize(&self) -> Result<()> {
        self.wait()
    }

    fn start_timer(&self) -> Result<Instant> {
        // On the host's clock, earlier work must not count.
        self.wait()?;
        self.timer.start(&self.device, &self.faults)?;
        Ok(Instant::now())
    }

    fn stop_timer(&self, started: Instant) -> Result<Timing> {
        self.timing(started)
    }

    #[cfg(target_arch = "wasm32")]
    fn download_async<'a>(&'a self, from: Source<'a>, into: &'a mut [u8]) -> Later<'a, ()> {
        Box::pin(async move { self.read_async((self.readable(from)?, 0), into).await })
    }

    #[cfg(target_arch = "wasm32")]
    fn synchronize_async(&self) -> Later<'_, ()> {
        Box::pin(self.wait_async())
    }

    #[cfg(target_arch = "wasm32")]
    fn start_timer_async(&self) -> Later<'_, Instant> {
        Box::pin(async move {
            self.wait_async().await?;
            self.timer.start(&self.device, &self.faults)?;
            Ok(Instant::now())
        })
    }

    #[cfg(target_arch = "wasm32")]
    fn stop_timer_async(&self, started: Instant) -> Later<'_, Timing> {
        Box::pin(self.timing_async(started))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
