//! The device: what the rest of the library sees of a GPU.

use std::any::Any;
use std::ffi::c_void;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::cache::DeviceId;
use crate::call::cost::Machine;
use crate::call::memory::{Sink, Source, Storage};
use crate::call::op::{Backend, MetadataPlace, Op, Timing};
use crate::call::plan::Capabilities;
use crate::config::DeviceChoice;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{BackendKind, Kernel};
use crate::mask::meta::VarlenMeta;

use super::attention;
use super::driver::context::Context;
use super::driver::external::{self, ExternalHandles};
use super::driver::fault::{self, Faults};
use super::driver::lane::Lane;
use super::driver::memory::CudaBuffer;
use super::driver::probe::{self, CudaDeviceInfo};
use super::driver::scratch::KeptScratch;
use super::driver::timer::Timers;
use super::driver::zeroed::KeptCounts;
use super::kernels::module::{AttentionImages, KERNELS_CUDA, Modules};
use super::kernels::tiles::tilings;
use super::launcher::Launcher;
use super::tensors::{copy, lse, metadata, prepare_qk};
use super::trust::{self, TrialDevice};

/// A CUDA device. Launches go to one stream, in the order of the calls, from any thread.
#[derive(Debug)]
pub struct CudaDevice {
    name: Arc<str>,
    capabilities: Capabilities,
    launcher: Launcher,
    timers: Timers,
}

impl CudaDevice {
    /// Opens the device with an ordinal, for one kernel alone or for all that can be trusted.
    pub fn open(ordinal: usize, kernel: Option<Kernel>) -> Result<Self> {
        let unavailable =
            |why: String| Error::DeviceUnavailable { device: DeviceChoice::Cuda(ordinal).to_string(), why };
        let info = CudaDeviceInfo::probe(ordinal).map_err(unavailable)?;
        if info.driver_version < KERNELS_CUDA {
            return Err(unavailable(format!("{info}: {}", older_driver(info.driver_version))));
        }
        let capabilities = capabilities_of(&info);
        let name: Arc<str> = capabilities.to_string().into();
        // Fits: the driver counts devices in an i32, and has this one.
        let index = ordinal as i32;
        let context = Context::open(index, Faults::new(&name)).map_err(|error| {
            unavailable(format!("{info}: making a CUDA context failed: {}", fault::describe(error)))
        })?;
        let device = Self::in_context(context, name, capabilities, &info).map_err(unavailable)?;
        device.with_trusted_kernels(index, kernel)
    }

    /// A device in an external context, on a stream of it, and its ordinal.
    ///
    /// # Safety
    /// As for [`ExternalHandles::check`]; both live until the last copy of the device and of
    /// everything made with it is dropped.
    pub unsafe fn external(context: *mut c_void, stream: *mut c_void, kernel: Option<Kernel>) -> Result<(Self, usize)> {
        let unavailable =
            |why: String| Error::DeviceUnavailable { device: "cuda (an external context)".to_owned(), why };
        ExternalHandles::check_values(context, stream)?;
        probe::start_driver().map_err(unavailable)?;
        let asked = |error| unavailable(format!("asking the driver failed: {}", fault::describe(error)));
        let driver_version = probe::driver_version().map_err(asked)?;
        // Before any other call: an older driver lacks some of those below.
        if driver_version < KERNELS_CUDA {
            return Err(unavailable(older_driver(driver_version)));
        }
        // SAFETY: by the caller's promise.
        let handles = unsafe { ExternalHandles::check(context, stream) }?;
        let info = CudaDeviceInfo::of(handles.index).map_err(unavailable)?;
        let capabilities = capabilities_of(&info);
        // Devices on one GPU do not take one another's tensors, so messages must tell them apart.
        let name: Arc<str> = format!("{capabilities} on the external stream {:#x}", stream as usize).into();
        // SAFETY: checked as far as the driver can tell, and live by the caller's promise;
        // `handles` has made the context current.
        let context = unsafe { Context::external(handles.context, handles.stream, handles.index, Faults::new(&name)) };
        let context = context.map_err(asked)?;
        // Never negative: the driver counts devices from 0.
        let ordinal = handles.index.unsigned_abs() as usize;
        let device = Self::in_context(context, name, capabilities, &info).map_err(unavailable)?;
        Ok((device.with_trusted_kernels(handles.index, kernel)?, ordinal))
    }

    /// The device with its kernels, or why they cannot be loaded.
    fn in_context(
        context: Context,
        name: Arc<str>,
        capabilities: Capabilities,
        info: &CudaDeviceInfo,
    ) -> Result<Self, String> {
        let modules = {
            let _current = context.enter().map_err(|error| error.to_string())?;
            Modules::of(&context, &AttentionImages::of(info.compute_capability))
                .map_err(|error| format!("{info}: {}", why_not_loaded(error)))?
        };
        let launcher = Launcher {
            id: DeviceId::unique(),
            context: Arc::new(context),
            modules,
            // Never negative: the driver counts them.
            multiprocessors: info.multiprocessors.unsigned_abs().max(1) as usize,
            max_buffer_bytes: capabilities.max_buffer_bytes,
            kept: KeptScratch::default(),
            counts: KeptCounts::default(),
        };
        Ok(Self { name, capabilities, launcher, timers: Timers::default() })
    }

    /// The device with one kernel alone, which need not be trusted, or with those that can be.
    ///
    /// # Errors
    /// [`Error::NotApplicable`] if it does not have the kernel, [`Error::DeviceUnavailable`] if a
    /// kernel lost the context when it was tried.
    fn with_trusted_kernels(mut self, index: i32, only: Option<Kernel>) -> Result<Self> {
        let kernels = &self.capabilities.kernels;
        self.capabilities.kernels = match only {
            Some(kernel) if kernels.contains(&kernel) => vec![kernel],
            Some(kernel) => {
                let why = format!("{} does not run it", self.capabilities);
                return Err(Error::NotApplicable { argument: "kernel", got: kernel.name().to_owned(), why });
            }
            None => {
                let device_name = self.capabilities.to_string();
                trust::trusted(index, &device_name, kernels, || self.on_own_stream(index))?
            }
        };
        Ok(self)
    }

    /// Another device in the same context and with the same kernels, on a stream of its own. It
    /// must be dropped first.
    fn on_own_stream(&self, index: i32) -> Result<Self> {
        Ok(Self {
            name: Arc::clone(&self.name),
            capabilities: self.capabilities.clone(),
            launcher: self.launcher.on_own_stream(index)?,
            timers: Timers::default(),
        })
    }

    /// The context's loss, if it is lost.
    pub fn check(&self) -> Result<()> {
        self.launcher.context.faults.check()
    }

    /// A lane for copies from other devices of this process.
    pub fn lane(&self) -> Result<Lane> {
        Lane::new(&self.launcher.context, self.launcher.id)
    }

    /// The context, for what has a lane of its own.
    #[cfg(feature = "nccl")]
    pub fn context(&self) -> &Arc<Context> {
        &self.launcher.context
    }

    /// External memory as memory of this device; checked as far as the driver can tell.
    ///
    /// # Safety
    /// As for [`CudaBuffer::external`].
    pub unsafe fn external_memory(&self, address: u64, bytes: u64) -> Result<CudaBuffer> {
        let Launcher { id, context, .. } = &self.launcher;
        {
            let _current = context.enter()?;
            external::check_memory(context, address, bytes)?;
        }
        // SAFETY: by the caller's promise.
        Ok(unsafe { CudaBuffer::external(context, *id, address, bytes) })
    }
}

impl TrialDevice for CudaDevice {
    fn context(&self) -> &Context {
        &self.launcher.context
    }
}

fn capabilities_of(info: &CudaDeviceInfo) -> Capabilities {
    let (major, minor) = info.compute_capability;
    let driver = probe::version(info.driver_version);
    // Never negative: the driver counts them.
    let multiprocessors = info.multiprocessors.unsigned_abs() as usize;
    Capabilities {
        backend: BackendKind::Cuda,
        adapter: format!("{}, sm_{major}{minor}, driver CUDA {driver}", info.name),
        is_software: false,
        dtypes: &[DType::F16, DType::Bf16],
        kernels: AttentionImages::of(info.compute_capability).kernels().collect(),
        max_buffer_bytes: info.memory_bytes,
        // Kernels count bytes in 64 bits.
        max_binding_bytes: info.memory_bytes,
        has_timestamps: true,
        machine: Machine::new(info.compute_capability, multiprocessors, tilings(info.shared_bytes_a_multiprocessor)),
    }
}

fn older_driver(version: i32) -> String {
    let (driver, kernels) = (probe::version(version), probe::version(KERNELS_CUDA));
    format!("the driver for CUDA {driver} is older than the kernels' {kernels}; a newer NVIDIA driver runs them")
}

/// Why the driver does not load the kernels.
fn why_not_loaded(error: DriverError) -> String {
    let hint = match error.0 {
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => "there are no kernels for this device in varlen-fa",
        CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION | CUresult::CUDA_ERROR_INVALID_IMAGE => {
            "the driver does not know the kernels' format; a newer NVIDIA driver may"
        }
        CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND | CUresult::CUDA_ERROR_JIT_COMPILATION_DISABLED => {
            "the device is newer than the compiled kernels, and the driver's own compiler is missing or disabled"
        }
        _ => "loading the kernels failed",
    };
    format!("{hint}: {}", fault::describe(error))
}

impl Backend for CudaDevice {
    fn id(&self) -> DeviceId {
        self.launcher.id
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn alloc(&self, bytes: u64) -> Result<Storage> {
        let _current = self.launcher.context.enter()?;
        Ok(Storage::device(self.launcher.lasting(bytes)?))
    }

    fn metadata_place(&self) -> MetadataPlace {
        MetadataPlace::Device
    }

    fn alloc_metadata(&self, batch: usize, seq: usize) -> Result<Storage> {
        let _current = self.launcher.context.enter()?;
        Ok(Storage::device(metadata::empty_tables(&self.launcher, batch, seq)?))
    }

    fn upload(&self, to: Sink<'_>, bytes: &[u8]) -> Result<()> {
        let _current = self.launcher.context.enter()?;
        self.launcher.sink(&to)?.upload(bytes)
    }

    fn download(&self, from: Source<'_>, into: &mut [u8]) -> Result<()> {
        let _current = self.launcher.context.enter()?;
        self.launcher.source(from)?.download(into)
    }

    fn execute(&self, op: Op<'_>) -> Result<()> {
        let launcher = &self.launcher;
        let _current = launcher.context.enter()?;
        match op {
            Op::Attention(attention) => attention::attend(launcher, attention),
            Op::Pack { pairs, meta } => copy::pack(launcher, &pairs, meta),
            Op::Scatter { packed, padded, meta } => copy::scatter(launcher, &packed, &padded, meta),
            Op::Zero(out) => copy::zero(launcher, &out),
            Op::NoKeys(lse) => lse::no_keys(launcher, &lse),
            Op::Merge(merge) => lse::merge(launcher, &merge),
            Op::PrepareQk(call) => prepare_qk::prepare_qk(launcher, &call),
            Op::Metadata { mask, tables } => {
                let built = metadata::build(launcher, &mask, &tables);
                built.and_then(|()| attention::renew_lists(launcher, &tables)).inspect_err(|_| tables.kept.lose())
            }
        }
    }

    fn stay_current(&self) -> Result<Box<dyn Debug + '_>> {
        Ok(Box::new(self.launcher.context.enter()?))
    }

    fn synchronize(&self) -> Result<()> {
        let _current = self.launcher.context.enter()?;
        self.launcher.context.synchronize()
    }

    fn upload_meta(&self, meta: &VarlenMeta) -> Result<()> {
        let _current = self.launcher.context.enter()?;
        metadata::upload(&self.launcher, meta)
    }

    fn start_timer(&self) -> Result<Instant> {
        let _current = self.launcher.context.enter()?;
        self.timers.start(&self.launcher.context)
    }

    fn stop_timer(&self, started: Instant) -> Result<Timing> {
        let _current = self.launcher.context.enter()?;
        self.timers.stop(&self.launcher.context, started)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_unavailable_with_the_reason() {
        let error = CudaDevice::open(usize::MAX, None).err();
        assert!(matches!(error, Some(Error::DeviceUnavailable { why, .. }) if why.contains("NVIDIA driver")));
    }

    #[test]
    fn handles_that_cannot_be_are_refused_without_a_driver() {
        for (context, stream, expected) in
            [(0, 2, "stream"), (0x10, 0, "context"), (0x7f00_1003_usize, 0_usize, "context"), (0, 8, "stream")]
        {
            // SAFETY: no driver is asked about handles that are refused by their values.
            let refused = unsafe { CudaDevice::external(context as *mut c_void, stream as *mut c_void, None) }.err();
            assert!(
                matches!(&refused, Some(Error::Handle { argument, .. }) if *argument == expected),
                "{context:#x}, {stream:#x}: {refused:?}"
            );
        }
    }

    #[test]
    fn an_old_driver_is_named_with_both_versions() {
        let why = older_driver(12_040);
        assert!(why.contains("12.4") && why.contains("13.0"), "{why}");
    }
}
