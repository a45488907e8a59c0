//! Devices: which one to compute on, and the only place that knows the backends by name.

use std::fmt;
use std::sync::Arc;

use crate::backend::{Backend, Timing};
use crate::config::{Config, DeviceChoice};
use crate::cpu::CpuDevice;
use crate::error::{Error, Result};
use crate::plan::Capabilities;
use crate::problem::DeviceInfo;

/// A device to compute on, with its settings. Cheap to clone: clones share the device.
#[derive(Debug, Clone)]
pub struct Device {
    backend: Arc<dyn Backend>,
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
    /// by name cannot be used.
    pub fn from_env() -> Result<Self> {
        Self::with_config(Config::from_env()?)
    }

    /// The given device; `VARLEN_FA` still applies, `VARLEN_FA_DEVICE` does not.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn new(choice: DeviceChoice) -> Result<Self> {
        Self::with_config(Config::from_env()?.with_device(choice))
    }

    /// A device with given settings; the environment is not read.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] if a device that was asked for by name cannot be used.
    pub fn with_config(config: Config) -> Result<Self> {
        let backend = match config.device {
            DeviceChoice::Auto => {
                let backend = [DeviceChoice::Cuda(0), DeviceChoice::Wgpu].into_iter().find_map(|choice| {
                    open(choice, Adapters::HardwareOnly, config)
                        .inspect_err(|error| log::info!("{choice} is not selected: {error}"))
                        .ok()
                });
                backend.unwrap_or_else(CpuDevice::shared)
            }
            choice => open(choice, Adapters::All, config)?,
        };
        log::info!("computing on {}", backend.name());
        Ok(Self { backend, config })
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
    /// [`Error::DeviceLimit`] that names a limit which the shaders do not fit, [`Error::QueueMismatch`],
    /// [`Error::DeviceLost`], [`Error::OutOfMemory`].
    #[cfg(feature = "wgpu")]
    pub fn from_wgpu(device: &::wgpu::Device, queue: &::wgpu::Queue, config: Config) -> Result<Self> {
        let backend = crate::wgpu_backend::WgpuDevice::foreign(device, queue, config.max_binding_bytes)?;
        log::info!("computing on the application's {}", backend.name());
        Ok(Self { backend: Arc::new(backend), config: config.with_device(DeviceChoice::Wgpu) })
    }

    /// Every device that this build knows of, with what it can do or why it cannot be used.
    #[must_use]
    pub fn list() -> Vec<DeviceReport> {
        [DeviceChoice::Cuda(0), DeviceChoice::Wgpu, DeviceChoice::Cpu]
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
    /// [`Error::DeviceLost`], or whatever failed since the last call.
    pub fn synchronize(&self) -> Result<()> {
        self.backend.synchronize()
    }

    /// Runs `work` and gives the time its launches took: on the device if it has timestamp queries, on the host's clock
    /// otherwise. Waits for the work. On wgpu devices one timing at a time: what other threads launch meanwhile counts too.
    ///
    /// # Errors
    /// Those of `work`, and [`Error::Backend`] if the device cannot be timed.
    pub fn time<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<(R, Timing)> {
        let started = self.backend.start_timer()?;
        let result = work();
        let timing = self.backend.stop_timer(started)?;
        Ok((result?, timing))
    }

    /// The wgpu device and queue in use, on wgpu devices.
    #[cfg(feature = "wgpu")]
    #[must_use]
    pub fn wgpu(&self) -> Option<(&::wgpu::Device, &::wgpu::Queue)> {
        self.wgpu_backend().ok().map(crate::wgpu_backend::WgpuDevice::handles)
    }

    #[cfg(feature = "wgpu")]
    pub(crate) fn wgpu_backend(&self) -> Result<&crate::wgpu_backend::WgpuDevice> {
        let got = || Error::DeviceKind { argument: "device", expected: "wgpu", got: self.name().to_owned() };
        self.backend.as_any().downcast_ref().ok_or_else(got)
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    pub(crate) fn info(&self) -> DeviceInfo<'_> {
        DeviceInfo { id: self.backend.id(), name: self.name(), dtypes: self.capabilities().dtypes }
    }
}

/// Which wgpu adapters may be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Adapters {
    HardwareOnly,
    All,
}

#[cfg_attr(not(feature = "wgpu"), expect(unused_variables, reason = "only wgpu has software adapters"))]
fn open(choice: DeviceChoice, adapters: Adapters, config: Config) -> Result<Arc<dyn Backend>> {
    match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(CpuDevice::shared()),
        #[cfg(feature = "wgpu")]
        DeviceChoice::Wgpu => {
            let software = adapters == Adapters::All;
            Ok(Arc::new(crate::wgpu_backend::WgpuDevice::open(software, config.max_binding_bytes)?))
        }
        #[cfg(not(feature = "wgpu"))]
        DeviceChoice::Wgpu => Err(not_built(choice, "wgpu")),
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(ordinal) => crate::cuda::open(ordinal),
        #[cfg(not(feature = "cuda"))]
        DeviceChoice::Cuda(_) => Err(not_built(choice, "cuda")),
    }
}

#[cfg(not(all(feature = "wgpu", feature = "cuda")))]
fn not_built(choice: DeviceChoice, feature: &str) -> Error {
    Error::DeviceUnavailable {
        device: choice.to_string(),
        why: format!("varlen-fa was built without its feature `{feature}`"),
    }
}
