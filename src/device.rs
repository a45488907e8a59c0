//! Devices: which one to compute on, and the only place that knows the backends by name.

#[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
use std::ffi::c_void;
use std::fmt;
#[cfg(feature = "wgpu")]
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::ThreadPool;

use crate::backends::cpu::CpuDevice;
use crate::backends::fork;
use crate::call::op::{Backend, Timing};
use crate::call::plan::Capabilities;
use crate::call::problem::DeviceInfo;
#[cfg(feature = "wgpu")]
use crate::call::self_check::Subject;
use crate::config::{Config, DeviceChoice};
use crate::error::{Error, Result};
use crate::kernel::BackendKind;
#[cfg(feature = "wgpu")]
use crate::kernel::Kernel;
use crate::mask::meta::VarlenMeta;
use crate::process::{self, OfProcess};

/// A device to compute on, with its settings. Cheap to clone: clones share the device.
#[derive(Debug, Clone)]
pub struct Device {
    backend: OfProcess<dyn Backend>,
    config: Config,
}

/// One device that this build knows of, as [`Device::list`] finds it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DeviceReport {
    /// What to ask for to get it.
    pub choice: DeviceChoice,
    /// What it can do, or why it cannot be used.
    pub status: Result<Capabilities>,
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.status {
            Ok(capabilities) => write!(f, "{}: {}", self.choice, capabilities.adapter),
            Err(Error::DeviceUnavailable { why, .. }) => write!(f, "{}: not available: {why}", self.choice),
            Err(error) => write!(f, "{}: not available: {error}", self.choice),
        }
    }
}

impl Device {
    /// The device that the environment asks for (`VARLEN_FA_DEVICE`), or the best one present: CUDA, then a hardware wgpu
    /// adapter, then the CPU. A software wgpu adapter is taken only when asked for: the CPU device is faster.
    ///
    /// # Errors
    /// [`Error::Environment`] for values that are not understood, [`Error::DeviceUnavailable`] if a device that was asked for
    /// by name cannot be used, [`Error::NotApplicable`] if it has not the kernel that was asked for (`VARLEN_FA_KERNEL`).
    pub fn from_env() -> Result<Self> {
        Self::with_config(Config::from_env()?)
    }

    /// The given device; `VARLEN_FA` and `VARLEN_FA_KERNEL` still apply, `VARLEN_FA_DEVICE` is not read.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn new(choice: DeviceChoice) -> Result<Self> {
        Self::with_config(Config::from_env_for(choice)?)
    }

    /// A device with given settings; the environment is not read.
    ///
    /// When a GPU is opened for the first time in a process, its newer kernels are compared with its oldest one, which takes some
    /// milliseconds. One that fails is not used, as a warning in the log says: see [`Capabilities::kernels`]. On a wgpu adapter
    /// the oldest kernel is compared with the CPU. An adapter that fails is not used: the next one is, or the device is not
    /// available. [`Config::kernel`] skips the comparison.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] if a device that was asked for by name cannot be used, [`Error::NotApplicable`] if it has not the
    /// kernel that was asked for.
    pub fn with_config(config: Config) -> Result<Self> {
        let backend = match config.device {
            DeviceChoice::Auto => {
                let backend = BY_PREFERENCE.into_iter().find_map(|choice| {
                    open(choice, Adapters::HardwareOnly, config)
                        .inspect_err(|error| log::info!("{choice} is not selected: {error}"))
                        .ok()
                });
                match backend {
                    Some(backend) => backend,
                    None => open(DeviceChoice::Cpu, Adapters::All, config)?,
                }
            }
            choice => open(choice, Adapters::All, config)?,
        };
        log::info!("computing on {}", backend.name());
        Ok(Self::over(backend, config))
    }

    /// [`with_config`](Self::with_config) for code that also runs in a browser, where a GPU can only be opened without waiting:
    /// there the other constructors refuse [`DeviceChoice::Wgpu`] with [`Error::WouldBlock`] and take the CPU by themselves.
    /// Elsewhere it waits as they do.
    ///
    /// # Errors
    /// As [`with_config`](Self::with_config).
    pub async fn with_config_async(config: Config) -> Result<Self> {
        let backend = match config.device {
            DeviceChoice::Auto => {
                let mut backend = None;
                for choice in BY_PREFERENCE {
                    let opened = open_async(choice, Adapters::HardwareOnly, config).await;
                    backend = opened.inspect_err(|error| log::info!("{choice} is not selected: {error}")).ok();
                    if backend.is_some() {
                        break;
                    }
                }
                match backend {
                    Some(backend) => backend,
                    None => open(DeviceChoice::Cpu, Adapters::All, config)?,
                }
            }
            choice => open_async(choice, Adapters::All, config).await?,
        };
        log::info!("computing on {}", backend.name());
        Ok(Self::over(backend, config))
    }

    /// The application's own wgpu device, with whatever features and limits it was created with: WebGPU's default limits do,
    /// and no feature is needed. Everything runs on `queue`, which must be the device's. `config.device` is ignored.
    ///
    /// The wgpu device stays the application's. Its uncaptured-error handler and its device-lost callback are left as they are:
    /// our own calls run inside error scopes, and their errors are returned. It is never destroyed here, and not waited for
    /// but in this call and in those that say so. Waiting and launching run callbacks that the application has pending on the
    /// device, as `Device::poll` and `Queue::submit` do.
    ///
    /// Make one `Device` of a wgpu device and clone it: memory of one is foreign to another.
    ///
    /// # Errors
    /// [`Error::DeviceLimit`] that names a limit which the shaders do not fit, [`Error::QueueMismatch`], [`Error::NotApplicable`],
    /// [`Error::DeviceLost`], [`Error::OutOfMemory`].
    #[cfg(feature = "wgpu")]
    pub fn from_wgpu(device: &::wgpu::Device, queue: &::wgpu::Queue, config: Config) -> Result<Self> {
        prepare(DeviceChoice::Wgpu)?;
        let cpu = reference_device()?;
        let backend = crate::backends::wgpu::WgpuDevice::external(device, queue, config, reference(&*cpu))?;
        expect_kernel(&backend, config)?;
        log::info!("computing on the application's {}", backend.name());
        Ok(Self::over(Arc::new(backend), config.with_device(DeviceChoice::Wgpu)))
    }

    /// The CPU device on the threads of the application's rayon pool, which stays the application's;
    /// `config.device` and `config.threads` are ignored. A pool of one thread means the calling
    /// thread. In a child made by `fork` the pool's threads are gone, and as many of the library's
    /// own take their place.
    ///
    /// To compute on rayon's global pool, call from one of its threads (in `rayon::scope`, for
    /// example) and leave `config.threads` unset.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use varlen_fa::{Config, Device, rayon::ThreadPoolBuilder};
    ///
    /// let pool = Arc::new(ThreadPoolBuilder::new().num_threads(2).build()?);
    /// let device = Device::from_thread_pool(pool, Config::from_env()?)?;
    /// assert!(device.capabilities().adapter.starts_with("2 threads"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::NotApplicable`] if the processor lacks `config.cpu_isa`, or the CPU device
    /// `config.kernel`.
    pub fn from_thread_pool(pool: Arc<ThreadPool>, config: Config) -> Result<Self> {
        fork::watch();
        let backend = CpuDevice::over(pool, config.cpu_isa)?;
        expect_kernel(&*backend, config)?;
        log::info!("computing on {}", backend.name());
        Ok(Self::over(backend, config.with_device(DeviceChoice::Cpu)))
    }

    /// A device over a CUDA context and stream of the caller's, which stay the caller's. Launches, copies and allocations go to
    /// that stream and no other, in the order of the calls, so they need no events between them and the caller's own work there.
    ///
    /// Both are raw handles of the driver API; those of the runtime API are the same. From cudarc, whatever its version,
    /// they are `context.cu_ctx().cast()` and `stream.cu_stream().cast()`.
    ///
    /// - `context`: a `CUcontext`. Null takes the stream's context, or with the default stream the one that is current in this
    ///   thread. It is made current during each call, and then again whichever was.
    /// - `stream`: a `CUstream` of that context. Null is the legacy default stream. `CU_STREAM_PER_THREAD` is refused: calls
    ///   from different threads would have no order.
    /// - `config`: as everywhere, but for its `device`, which becomes that of the context. Where kernels are compared, as when
    ///   [any device](Self::with_config) is opened, that is on a stream of the library's own.
    ///
    /// Kernels are loaded once a context, however many devices are made over it. Each device takes its own memory alone, and
    /// that of another stream is refused: nothing would order the work of the two. The caller who orders it with events can lay
    /// a [`DeviceMemory`](crate::DeviceMemory) of each over the same addresses.
    ///
    /// # While the stream is being captured into a graph
    /// [`forward_into`](crate::MaskedAttention::forward_into) is captured: kernels, copies, and scratch memory as nodes that the
    /// graph allocates and frees itself (so it cannot be a child graph or be cloned, as the driver says of such nodes; a GPU
    /// without memory pools, as in some virtual machines, cannot capture calls that need scratch).
    /// Metadata and masks that the device has not seen yet are uploaded at once, on another stream, and are not part of the
    /// graph; [`VarlenMeta::upload_to`] does so beforehand. The graph uses them and the tensors where they lie: they and the
    /// device must outlive its last run. What returns new memory, copies from or to the host, waits, or measures time is refused
    /// with [`Error::StreamCaptured`], and the capture goes on. After any other error, end the capture and drop its graph:
    /// it may hold half of the call.
    ///
    /// # Errors
    /// [`Error::Handle`] for a handle that the driver does not know as a context or stream, or a stream of another context;
    /// [`Error::StreamCaptured`] if the stream is being captured; [`Error::DeviceUnavailable`] with the reason, as of
    /// [`with_config`](Self::with_config): no driver, too old a driver or device, no memory for the kernels.
    ///
    /// # Safety
    /// `context` and `stream` are null, or live: the driver need not notice other pointers before it follows them. They live
    /// until the last clone of the device is dropped, and every tensor, memory, mask and metadata used with it: drop those
    /// first, then the stream, then the context. No capture of the stream begins or ends during a call.
    ///
    /// # Example
    /// ```no_run
    /// use std::{ffi::c_void, ptr};
    /// use varlen_fa::{
    ///     AttentionMask, Config, DType, Device, DeviceMemory, Layout, MaskedAttention, Plan, Result, VarlenMeta,
    /// };
    ///
    /// /// Attention of a fused bf16 projection `[B, S, 3H, D]`, on the application's stream.
    /// ///
    /// /// # Safety
    /// /// The stream is live; the addresses are of tensors that nothing uses meanwhile but this stream.
    /// unsafe fn attend(stream: *mut c_void, qkv: u64, out: u64, meta: &VarlenMeta) -> Result<Plan> {
    ///     let (batch, seq, heads, dim) = (meta.batch(), meta.seq(), 8, 64);
    ///     // Once per application, in practice.
    ///     let device = unsafe { Device::from_cuda(ptr::null_mut(), stream, Config::default()) }?;
    ///     let bytes = 2 * (batch * seq * heads * dim) as u64;
    ///     let qkv = unsafe { DeviceMemory::from_cuda(&device, qkv, 3 * bytes) }?;
    ///     let mut out = unsafe { DeviceMemory::from_cuda(&device, out, bytes) }?;
    ///
    ///     let fused = qkv.view(DType::Bf16, Layout::contiguous(&[batch, seq, 3 * heads, dim])?);
    ///     let part = |i: usize| fused.slice(2, i * heads..(i + 1) * heads);
    ///     let out = out.view_mut(DType::Bf16, Layout::contiguous(&[batch, seq, heads, dim])?);
    ///     MaskedAttention::new(&device).forward_into(part(0)?, part(1)?, part(2)?, AttentionMask::varlen(meta), out)
    /// }
    /// ```
    #[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
    pub unsafe fn from_cuda(context: *mut c_void, stream: *mut c_void, config: Config) -> Result<Self> {
        prepare(DeviceChoice::Cuda(0))?;
        // SAFETY: by the caller's promise.
        let (backend, ordinal) = unsafe { crate::backends::cuda::external(context, stream, config.kernel) }?;
        log::info!("computing on {}", backend.name());
        Ok(Self::over(backend, config.with_device(DeviceChoice::Cuda(ordinal))))
    }

    /// What may be asked for on this machine: each CUDA device that the driver knows, and one where there is none, wgpu's best
    /// adapter, and the CPU. None of them is opened.
    #[must_use]
    pub fn choices() -> Vec<DeviceChoice> {
        let cuda = (0..cuda_devices().max(1)).map(DeviceChoice::Cuda);
        cuda.chain([DeviceChoice::Wgpu, DeviceChoice::Cpu]).collect()
    }

    /// Every device of [`choices`](Self::choices), with what it can do or why it cannot be used. Opens them all.
    #[must_use]
    pub fn list() -> Vec<DeviceReport> {
        Self::choices()
            .into_iter()
            .map(|choice| DeviceReport {
                choice,
                status: open(choice, Adapters::All, Config::default()).map(|backend| backend.capabilities().clone()),
            })
            .collect()
    }

    /// What the device can do.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        self.backend.capabilities()
    }

    /// The device's settings.
    #[must_use]
    pub fn config(&self) -> Config {
        self.config
    }

    /// The device's kind and adapter, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        self.backend.name()
    }

    /// Waits for all work launched so far.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], or whatever failed since the last call; [`Error::WouldBlock`] on a wgpu device in a browser.
    pub fn synchronize(&self) -> Result<()> {
        self.backend()?.synchronize()
    }

    /// Frees the scratch memory that a wgpu device keeps for later calls, which need it for copies of
    /// segments and of rows at odd places, and for packed rows. As many buffers are kept as calls had in
    /// use at once, each as large as the largest that some call needed. What submitted or recorded
    /// commands use is freed once they are done. The next call that needs scratch makes it anew. On
    /// other devices nothing happens: the CPU's calls keep none, and CUDA's is in the device's memory
    /// pool.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] for a GPU in a forked process.
    pub fn release_scratch(&self) -> Result<()> {
        self.backend()?.release_scratch();
        Ok(())
    }

    /// [`synchronize`](Self::synchronize) for code that also runs in a browser: there it gives the thread back until the work is
    /// done, elsewhere it waits. In a browser what fails in a launch comes out of a later call, at the latest of this one.
    ///
    /// # Errors
    /// As [`synchronize`](Self::synchronize).
    pub async fn synchronize_async(&self) -> Result<()> {
        self.backend()?.synchronize_async().await
    }

    /// Runs `work` and gives the time its launches took: on the device if it has timestamp queries, on the host's clock
    /// otherwise. Waits for the work. On wgpu devices one timing at a time: what other threads launch meanwhile counts too.
    ///
    /// # Errors
    /// Those of `work`, and [`Error::Backend`] if the device cannot be timed; [`Error::WouldBlock`] on a wgpu device in a browser.
    pub fn time<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(R, Timing)> {
        let started = self.backend()?.start_timer()?;
        let result = work();
        let timing = self.backend()?.stop_timer(started)?;
        Ok((result?, timing))
    }

    /// [`time`](Self::time) for code that also runs in a browser: there it gives the thread back until the work is done,
    /// elsewhere it waits. What the page launches on the device meanwhile counts too.
    ///
    /// # Errors
    /// As [`time`](Self::time).
    pub async fn time_async<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(R, Timing)> {
        let started = self.backend()?.start_timer_async().await?;
        let result = work();
        let timing = self.backend()?.stop_timer_async(started).await?;
        Ok((result?, timing))
    }

    /// The wgpu device and queue in use, on wgpu devices.
    #[cfg(feature = "wgpu")]
    #[must_use]
    pub fn wgpu(&self) -> Option<(&::wgpu::Device, &::wgpu::Queue)> {
        self.wgpu_backend().ok().map(crate::backends::wgpu::WgpuDevice::handles)
    }

    /// Compiles shaders with this cache of the wgpu device from now on, so that the next start of the application need not: keep
    /// what `cache.get_data()` gives at the end and create the cache from it. Each shader is compiled once a device in any
    /// case, and the drivers of most GPUs have caches of their own; it is those of phones that gain.
    ///
    /// Caches need `wgpu::Features::PIPELINE_CACHE`, which devices that this crate opens have wherever the adapter does. Creating
    /// one is unsafe in wgpu, since drivers trust its data. What was compiled before stays: the small shaders with which
    /// kernels are checked when a process makes its first device of an adapter.
    ///
    /// # Errors
    /// [`Error::DeviceKind`] if this is not a wgpu device, [`Error::Backend`] for a cache of another one (one of another
    /// `wgpu::Instance` cannot always be told from the device's own), [`Error::DeviceLost`].
    #[cfg(feature = "wgpu")]
    pub fn set_pipeline_cache(&self, cache: &::wgpu::PipelineCache) -> Result<()> {
        self.wgpu_backend()?.set_pipeline_cache(cache)
    }

    /// The cache that [`set_pipeline_cache`](Self::set_pipeline_cache) has set last, if any.
    #[cfg(feature = "wgpu")]
    #[must_use]
    pub fn pipeline_cache(&self) -> Option<::wgpu::PipelineCache> {
        self.wgpu_backend().ok()?.pipeline_cache()
    }

    #[cfg(feature = "wgpu")]
    pub(crate) fn wgpu_backend(&self) -> Result<&crate::backends::wgpu::WgpuDevice> {
        let got = || Error::DeviceKind { argument: "device", expected: "wgpu", got: self.name().to_owned() };
        self.backend()?.as_any().downcast_ref().ok_or_else(got)
    }

    /// What executes calls: no GPU in a child made by `fork`, where its driver could hang.
    pub(crate) fn backend(&self) -> Result<&dyn Backend> {
        if self.backend.is_own() || self.capabilities().backend == BackendKind::Cpu {
            return Ok(&**self.backend);
        }
        let why = "it was opened in another process, which was then forked; no GPU works in the child".to_owned();
        Err(Error::DeviceLost { device: self.name().to_owned(), why })
    }

    fn over(backend: Arc<dyn Backend>, config: Config) -> Self {
        Self { backend: OfProcess::new(backend), config }
    }

    pub(crate) fn info(&self) -> DeviceInfo<'_> {
        DeviceInfo { id: self.backend.id(), name: self.name(), dtypes: self.capabilities().dtypes }
    }
}

impl VarlenMeta {
    /// Makes the device's copy of the metadata now rather than at its first use there. It is kept with the metadata either way.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn upload_to(&self, device: &Device) -> Result<()> {
        device.backend()?.upload_meta(self)
    }
}

/// What [`DeviceChoice::Auto`] tries before the CPU.
const BY_PREFERENCE: [DeviceChoice; 2] = [DeviceChoice::Cuda(0), DeviceChoice::Wgpu];

/// Which wgpu adapters may be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Adapters {
    HardwareOnly,
    All,
}

/// CUDA devices that the driver knows.
fn cuda_devices() -> usize {
    #[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
    if prepare(DeviceChoice::Cuda(0)).is_ok() {
        return crate::backends::cuda::count();
    }
    0
}

/// Must come before any backend is opened. A driver that was started in a process, even in vain, is
/// not asked again in a child made by `fork`: it might hang.
///
/// # Errors
/// [`Error::DeviceUnavailable`] in such a child.
fn prepare(choice: DeviceChoice) -> Result<()> {
    /// The process that first opened a GPU of the kind, plus 1.
    static CUDA: AtomicUsize = AtomicUsize::new(0);
    static WGPU: AtomicUsize = AtomicUsize::new(0);
    fork::watch();
    let first = match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu => return Ok(()),
        DeviceChoice::Cuda(_) => &CUDA,
        DeviceChoice::Wgpu => &WGPU,
    };
    let own = process::current() + 1;
    match first.compare_exchange(0, own, Ordering::Relaxed, Ordering::Relaxed) {
        Err(other) if other != own => {
            let why = "the process was forked from one that had opened a GPU before".to_owned();
            Err(Error::DeviceUnavailable { device: choice.to_string(), why })
        }
        _ => Ok(()),
    }
}

#[cfg_attr(not(feature = "wgpu"), expect(unused_variables, reason = "only wgpu has software adapters"))]
fn open(choice: DeviceChoice, adapters: Adapters, config: Config) -> Result<Arc<dyn Backend>> {
    prepare(choice)?;
    let backend = match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu => CpuDevice::open(config.cpu_isa, config.threads)?,
        #[cfg(feature = "wgpu")]
        DeviceChoice::Wgpu => {
            let software = adapters == Adapters::All;
            let cpu = reference_device()?;
            Arc::new(crate::backends::wgpu::WgpuDevice::open(software, config, reference(&*cpu))?)
        }
        #[cfg(not(feature = "wgpu"))]
        DeviceChoice::Wgpu => return Err(not_built(choice, "wgpu")),
        #[cfg(all(feature = "cuda", not(target_arch = "wasm32")))]
        DeviceChoice::Cuda(ordinal) => crate::backends::cuda::open(ordinal, config.kernel)?,
        #[cfg(any(not(feature = "cuda"), target_arch = "wasm32"))]
        DeviceChoice::Cuda(_) => return Err(not_built(choice, "cuda")),
    };
    expect_kernel(&*backend, config)?;
    Ok(backend)
}

/// What kernels of other devices are compared with. The calls are small: one thread will do.
#[cfg(feature = "wgpu")]
fn reference_device() -> Result<Arc<dyn Backend>> {
    CpuDevice::open(None, Some(NonZeroUsize::MIN))
}

#[cfg(feature = "wgpu")]
fn reference(cpu: &dyn Backend) -> Subject<'_> {
    Subject::new(cpu, Kernel::CpuTiled)
}

/// The kernel that the settings ask for is the device's.
fn expect_kernel(backend: &dyn Backend, config: Config) -> Result<()> {
    match config.kernel {
        Some(kernel) if !backend.capabilities().kernels.contains(&kernel) => {
            let why = format!("{} does not run it", backend.capabilities());
            Err(Error::NotApplicable { argument: "kernel", got: kernel.name().to_owned(), why })
        }
        _ => Ok(()),
    }
}

/// The same, where opening is only possible without waiting.
async fn open_async(choice: DeviceChoice, adapters: Adapters, config: Config) -> Result<Arc<dyn Backend>> {
    #[cfg(all(feature = "wgpu", target_arch = "wasm32"))]
    if choice == DeviceChoice::Wgpu {
        prepare(choice)?;
        let software = adapters == Adapters::All;
        let cpu = reference_device()?;
        return Ok(Arc::new(crate::backends::wgpu::WgpuDevice::open_async(software, config, reference(&*cpu)).await?));
    }
    open(choice, adapters, config)
}

#[cfg(not(all(feature = "wgpu", feature = "cuda", not(target_arch = "wasm32"))))]
fn not_built(choice: DeviceChoice, feature: &str) -> Error {
    Error::DeviceUnavailable {
        device: choice.to_string(),
        why: format!("varlen-fa was built without its feature `{feature}`"),
    }
}
