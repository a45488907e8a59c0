//! The wgpu device: opening it, and what it does with each operation.

use std::any::Any;
use std::collections::BTreeSet;
use std::sync::Arc;

use wgpu::{BufferUsages, DeviceType, Features};

use crate::backends::rows::HEAD_DIM_STEP;
use crate::cache::DeviceId;
use crate::call::cost::Machine;
use crate::call::memory::{Sink, Source, Storage};
use crate::call::op::{Attention, Backend, Instant, Later, MetadataPlace, Op, Steps, Timing};
use crate::call::plan::Capabilities;
use crate::call::self_check::Subject;
use crate::config::Config;
use crate::error::Result;
use crate::kernel::{BackendKind, Kernel, MAX_HEAD_DIM};
use crate::mask::meta::VarlenMeta;

use super::buffer::WgpuBuffer;
use super::context::Context;
use super::coop::Coop;
use super::copy::Move;
use super::device_meta::DeviceMeta;
use super::fault::Faults;
use super::launcher::Launcher;
use super::launches::Launches;
use super::pace::Pace;
use super::recorder::Recorder;
use super::scratch::Taker;
use super::shader::Algorithm;
use super::tilings::tilings;
use super::timer::Timer;
use super::transfer::COPY_ALIGNMENT;
use super::trust::{Defendant, VERDICTS};
use super::{adapter, attention, copy, external, lse, metadata, prepare_qk, transfer, wait};

/// Keys that a query sees on average, up to which the smaller tiles of the kernel on cooperative matrices are quicker: on an
/// H200 up to about 300 at head dimension 128, and 2000 at 64 (docs/log/wgsl-coop.md).
const FEW_KEYS: u64 = 256;

/// A wgpu device with its queue, and what was compiled and allocated on it.
#[derive(Debug)]
pub(crate) struct WgpuDevice {
    context: Context,
    capabilities: Capabilities,
    launcher: Launcher,
    pace: Arc<Pace>,
    timer: Timer,
    /// Cooperative matrices; `None` if the kernel on them cannot run.
    coop: Option<Coop>,
}

impl WgpuDevice {
    /// Opens the best adapter whose kernels compute what `reference`, a kernel of another device,
    /// does. The settings lower its limits.
    pub(crate) fn open(include_software: bool, config: Config, reference: Subject<'_>) -> Result<Self> {
        wait::now("wgpu", wait::OPENING, Self::open_async(include_software, config, reference))
    }

    /// [`open`](Self::open) in a form that may give up the thread.
    pub(crate) async fn open_async(include_software: bool, config: Config, reference: Subject<'_>) -> Result<Self> {
        let mut failure = None;
        for adapter in adapter::candidates(include_software).await? {
            let (device, queue, coop) = adapter::open(&adapter, config.max_binding_bytes).await?;
            let mut opened = Self::over(device, queue, coop, config)?;
            opened.context.faults.listen();
            match opened.offer_kernels(config.kernel, reference).await {
                Ok(()) => return Ok(opened),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        Err(failure.unwrap_or_else(|| adapter::unavailable("no adapter".to_owned())))
    }

    /// Computes on an external device, whose handlers stay as they are.
    pub(crate) fn external(
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        config: Config,
        reference: Subject<'_>,
    ) -> Result<Self> {
        external::expect_limits(&device.limits())?;
        let coop = Coop::of_device(device);
        let mut device = Self::over(device.clone(), queue.clone(), coop, config)?;
        // A browser cannot tell without waiting: there a launch on another device's queue fails
        // later, and kernels are not compared.
        #[cfg(not(target_arch = "wasm32"))]
        {
            external::expect_own_queue(&device.context)?;
            pollster::block_on(device.offer_kernels(config.kernel, reference))?;
        }
        #[cfg(target_arch = "wasm32")]
        let _ = (reference, &mut device);
        Ok(device)
    }

    fn over(device: wgpu::Device, queue: wgpu::Queue, coop: Option<Coop>, config: Config) -> Result<Self> {
        let (info, limits) = (device.adapter_info(), device.limits());
        // The shaders count 16-byte words in 32 bits, and Vulkan's bindings end below 2 GiB.
        let largest = limits.max_storage_buffer_binding_size.min((1 << 31) - 256);
        let capabilities = Capabilities {
            backend: BackendKind::Wgpu,
            adapter: adapter::name(&info),
            is_software: info.device_type == DeviceType::Cpu,
            dtypes: Kernel::WgslPortable.dtypes(),
            kernels: vec![Kernel::WgslPortable],
            max_buffer_bytes: limits.max_buffer_size,
            max_binding_bytes: config.max_binding_bytes.map_or(largest, |bytes| largest.min(bytes)),
            has_timestamps: device.features().contains(Features::TIMESTAMP_QUERY),
            machine: (info.device_type == DeviceType::DiscreteGpu).then(|| Machine::of_adapter(tilings())),
        };
        let name: Arc<str> = capabilities.to_string().into();
        let faults = Faults::of(&device, &name);
        let launcher = Launcher::new(&device);
        let context = Context::new((device, queue), faults, &name, capabilities.max_binding_bytes)?;
        let pace = Arc::new(Pace::new(config.max_dispatch_operations, info.device_type));
        Ok(Self { context, capabilities, launcher, pace, timer: Timer::new(&name), coop })
    }

    /// Offers the kernels that pass their self-check, the fastest first. Drivers drop barriers, and
    /// some compute cooperative matrices wrong, which are experimental in wgpu. A kernel that the
    /// settings ask for is used unchecked.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`](crate::Error::DeviceUnavailable) if the portable kernel fails: nothing is left to compute with.
    /// [`Error::DeviceLost`](crate::Error::DeviceLost) if the device was lost meanwhile.
    async fn offer_kernels(&mut self, only: Option<Kernel>, reference: Subject<'_>) -> Result<()> {
        if let Some(kernel) = only {
            if kernel == Kernel::WgslCoop && self.coop.is_some() {
                self.capabilities.kernels = vec![Kernel::WgslCoop];
            }
            return Ok(());
        }
        if let Err(why) = self.verdict(Kernel::WgslPortable, reference).await {
            self.context.faults.check_lost()?;
            let (name, kernel) = (&self.context.name, Kernel::WgslPortable);
            log::warn!(
                "{name}: kernel {kernel} failed its self-check, so the adapter is not used. Please report this line \
                 to the authors of varlen-fa: {why}"
            );
            let advice = format!("{}={kernel} uses it unchecked", Config::KERNEL_VARIABLE);
            return Err(adapter::unavailable(format!("{name} computes wrong results ({advice}): {why}")));
        }
        if self.coop.is_some() {
            let portable = Subject::new(self, Kernel::WgslPortable);
            match self.verdict(Kernel::WgslCoop, portable).await {
                Ok(()) => self.capabilities.kernels.insert(0, Kernel::WgslCoop),
                Err(why) => log::warn!(
                    "{}: kernel {} failed its self-check and is not used: {why}",
                    self.context.name,
                    Kernel::WgslCoop
                ),
            }
        }
        Ok(())
    }

    async fn verdict(&self, kernel: Kernel, reference: Subject<'_>) -> Result<(), String> {
        let coop = self.coop.filter(|_| kernel == Kernel::WgslCoop);
        let defendant = Defendant { adapter: self.context.device.adapter_info(), kernel, coop };
        VERDICTS.of(&defendant, Subject::new(self, kernel), reference).await
    }

    pub(crate) fn handles(&self) -> (&wgpu::Device, &wgpu::Queue) {
        (&self.context.device, &self.context.queue)
    }

    /// Compiles with an external cache from now on.
    pub(crate) fn set_pipeline_cache(&self, cache: &wgpu::PipelineCache) -> Result<()> {
        self.launcher.set_pipeline_cache(&self.context, cache)
    }

    /// The external cache that was set last.
    pub(crate) fn pipeline_cache(&self) -> Option<wgpu::PipelineCache> {
        self.launcher.pipeline_cache()
    }

    /// An external buffer as memory of this device.
    pub(crate) fn import(&self, buffer: wgpu::Buffer) -> Result<Storage> {
        self.context.faults.check()?;
        Ok(Storage::device(self.context.allocator.external(buffer)?))
    }

    /// Records an operation for the application to submit.
    pub(crate) fn encode(&self, op: Op<'_>, recorder: Recorder<'_>) -> Result<()> {
        self.encode_all(Box::new(|encode| encode(op)), recorder)
    }

    /// Records several operations, all of them or none.
    pub(crate) fn encode_all(&self, steps: Steps<'_>, recorder: Recorder<'_>) -> Result<()> {
        self.launcher.record(&self.context, self.launches(steps, Taker::Recording)?.as_slice(), recorder)
    }

    /// The launches of all operations together.
    fn launches(&self, steps: Steps<'_>, taker: Taker) -> Result<Launches<'_>> {
        let mut launches = Launches::new(&self.context.allocator, taker);
        steps(&mut |op| self.add(op, &mut launches))?;
        Ok(launches)
    }

    fn add(&self, op: Op<'_>, launches: &mut Launches<'_>) -> Result<()> {
        let context = &self.context;
        match op {
            Op::Attention(call) => attention::record(context, self.algorithm(&call), &self.pace, call, launches),
            Op::Pack { pairs, meta } => {
                pairs.iter().try_for_each(|(from, to)| copy::move_rows(context, Move::Pack, from, to, meta, launches))
            }
            Op::Scatter { packed, padded, meta } => {
                copy::move_rows(context, Move::Scatter, &packed, &padded, meta, launches)
            }
            Op::Zero(out) => copy::zero(context, &out, launches),
            Op::NoKeys(lse) => lse::no_keys(context, &lse, launches),
            Op::Merge(merge) => lse::merge(context, &merge, launches),
            Op::PrepareQk(call) => prepare_qk::prepare_qk(context, &call, launches),
            Op::Metadata { mask, tables } => {
                let tables: &DeviceMeta = tables.memory.owned_by(context.id, &context.name)?;
                tables.build(context, &mask, launches)
            }
        }
    }

    fn algorithm(&self, attention: &Attention<'_>) -> Algorithm {
        match (attention.plan.kernel, self.coop) {
            (Kernel::WgslCoop, Some(coop)) => {
                let head_dim = attention.problem.shape.head_dim;
                let sees_few = attention.ranges.is_some_and(|ranges| ranges.mean_keys() <= FEW_KEYS);
                Algorithm::Coop(if sees_few { coop.tile_for_few_keys(head_dim) } else { coop.tile(head_dim) })
            }
            _ => Algorithm::Portable,
        }
    }

    /// Rows of every tile that a call may want.
    fn tile_rows(&self) -> BTreeSet<usize> {
        let head_dims = (HEAD_DIM_STEP..=MAX_HEAD_DIM).step_by(HEAD_DIM_STEP);
        head_dims
            .flat_map(|head_dim| {
                let tiles = self.coop.map(|coop| [coop.tile(head_dim), coop.tile_for_few_keys(head_dim)]);
                let coop = tiles.into_iter().flatten().map(Algorithm::Coop);
                let algorithms = coop.chain([Algorithm::Portable]);
                algorithms.map(move |algorithm| algorithm.tile_rows(head_dim))
            })
            .collect()
    }

    /// The buffer of a source that the host may copy from.
    fn readable<'a>(&self, source: Source<'a>) -> Result<&'a wgpu::Buffer> {
        let buffer: &WgpuBuffer = source.owned_by(self.context.id, &self.context.name)?;
        buffer.expect_usage("memory", BufferUsages::COPY_SRC)?;
        buffer.expect_unmapped("memory")?;
        Ok(&buffer.raw)
    }

    /// Copies bytes to a buffer that is external and may hold the application's bytes right
    /// behind them, in the same u32.
    fn upload_part(&self, buffer: &WgpuBuffer, bytes: &[u8]) -> Result<()> {
        buffer.expect_usage("memory", BufferUsages::COPY_SRC)?;
        let whole = bytes.len() / COPY_ALIGNMENT * COPY_ALIGNMENT;
        let mut padded = bytes.to_vec();
        padded.resize(whole + COPY_ALIGNMENT, 0);
        let last = transfer::download(&self.context, (&buffer.raw, whole as u64), &mut padded[whole..]);
        wait::now(self.name(), wait::READING, last)?;
        padded[..bytes.len()].copy_from_slice(bytes);
        transfer::upload(&self.context, &buffer.raw, &padded)
    }
}

impl Backend for WgpuDevice {
    fn id(&self) -> DeviceId {
        self.context.id
    }

    fn name(&self) -> &str {
        &self.context.name
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn alloc(&self, bytes: u64) -> Result<Storage> {
        Ok(Storage::device(self.context.allocator.tensor(bytes)?))
    }

    fn metadata_place(&self) -> MetadataPlace {
        MetadataPlace::Device
    }

    fn alloc_metadata(&self, batch: usize, seq: usize) -> Result<Storage> {
        let meta = DeviceMeta::alloc(&self.context, batch, seq, self.tile_rows())?;
        let mut launches = Launches::new(&self.context.allocator, Taker::Submission);
        meta.build_empty(&self.context, &mut launches);
        self.launcher.submit(&self.context, &launches, &self.timer, &self.pace)?;
        Ok(Storage::device(meta))
    }

    fn upload(&self, to: Sink<'_>, bytes: &[u8]) -> Result<()> {
        let buffer: &WgpuBuffer = to.owned_by(self.context.id, &self.context.name)?;
        buffer.expect_usage("memory", BufferUsages::COPY_DST)?;
        buffer.expect_unmapped("memory")?;
        if buffer.is_external() && !bytes.len().is_multiple_of(COPY_ALIGNMENT) {
            return self.upload_part(buffer, bytes);
        }
        transfer::upload(&self.context, &buffer.raw, bytes)
    }

    fn download(&self, from: Source<'_>, into: &mut [u8]) -> Result<()> {
        let source = (self.readable(from)?, 0);
        wait::now(self.name(), wait::READING, transfer::download(&self.context, source, into))
    }

    fn execute(&self, op: Op<'_>) -> Result<()> {
        if let Op::Zero(out) = &op
            && copy::clear_whole(&self.context, out)?
        {
            return Ok(());
        }
        self.execute_all(Box::new(|execute| execute(op)))
    }

    fn execute_all(&self, steps: Steps<'_>) -> Result<()> {
        self.launcher.submit(&self.context, &self.launches(steps, Taker::Submission)?, &self.timer, &self.pace)
    }

    fn upload_meta(&self, meta: &VarlenMeta) -> Result<()> {
        let context = &self.context;
        metadata::indices(context, meta)?;
        metadata::inv_indices(context, meta)?;
        metadata::cu_seqlens(context, meta.cu_seqlens())?;
        metadata::token_lists(context, meta)?;
        for tile_rows in self.tile_rows() {
            metadata::packed_tiles(context, meta.cu_seqlens(), tile_rows)?;
            metadata::fused_tiles(context, meta, tile_rows)?;
        }
        // What dense paths use instead.
        metadata::mask_bits(context, meta.key_mask()).map(drop)
    }

    fn synchronize(&self) -> Result<()> {
        wait::now(self.name(), wait::WAITING, self.synchronize_async())
    }

    fn release_scratch(&self) {
        self.context.allocator.kept.release();
    }

    fn start_timer(&self) -> Result<Instant> {
        wait::now(self.name(), wait::WAITING, self.start_timer_async())
    }

    fn stop_timer(&self, started: Instant) -> Result<Timing> {
        wait::now(self.name(), wait::TIMING, self.stop_timer_async(started))
    }

    fn download_async<'a>(&'a self, from: Source<'a>, into: &'a mut [u8]) -> Later<'a, ()> {
        Box::pin(async move { transfer::download(&self.context, (self.readable(from)?, 0), into).await })
    }

    fn synchronize_async(&self) -> Later<'_, ()> {
        Box::pin(wait::for_work(&self.context))
    }

    fn start_timer_async(&self) -> Later<'_, Instant> {
        Box::pin(async move {
            // On the host's clock, earlier work must not count.
            wait::for_work(&self.context).await?;
            self.timer.start(&self.context)?;
            Ok(Instant::now())
        })
    }

    fn stop_timer_async(&self, started: Instant) -> Later<'_, Timing> {
        Box::pin(self.timer.stop(&self.context, started))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
