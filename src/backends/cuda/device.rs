//! The device: what the rest of the library sees of a GPU.

use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::cache::DeviceId;
use crate::call::op::{Backend, MetadataPlace, Op, Sink, Source, Storage, Timing};
use crate::call::plan::Capabilities;
use crate::config::DeviceChoice;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{BackendKind, Kernel};
use crate::mask::meta::VarlenMeta;

use super::caller::{self, CallerHandles};
use super::context::Context;
use super::fault::{self, Faults};
use super::memory::CudaBuffer;
use super::module::{AttentionImages, Entry, Function, KERNELS_CUDA, Modules};
use super::probe::{self, CudaDeviceInfo};
use super::timer::Timers;

/// A CUDA device. Launches go to one stream, in the order of the calls, from whatever threads they come.
#[derive(Debug)]
pub(super) struct CudaDevice {
    pub(super) id: DeviceId,
    name: Arc<str>,
    pub(super) capabilities: Capabilities,
    pub(super) context: Arc<Context>,
    pub(super) multiprocessors: usize,
    modules: Arc<Modules>,
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

    /// A device over the caller's context and stream, and its ordinal.
    ///
    /// # Safety
    /// As of [`CallerHandles::check`]; both live until the last copy of the device and of everything made with it is dropped.
    pub unsafe fn over(context: *mut c_void, stream: *mut c_void, kernel: Option<Kernel>) -> Result<(Self, usize)> {
        let unavailable =
            |why: String| Error::DeviceUnavailable { device: "cuda (the caller's context)".to_owned(), why };
        CallerHandles::check_values(context, stream)?;
        probe::start_driver().map_err(unavailable)?;
        let asked = |error| unavailable(format!("asking the driver failed: {}", fault::describe(error)));
        let driver_version = probe::driver_version().map_err(asked)?;
        // First of all: an older driver lacks calls that come below.
        if driver_version < KERNELS_CUDA {
            return Err(unavailable(older_driver(driver_version)));
        }
        // SAFETY: by the caller's promise.
        let handles = unsafe { CallerHandles::check(context, stream) }?;
        let info = CudaDeviceInfo::of(handles.index).map_err(unavailable)?;
        let capabilities = capabilities_of(&info);
        // Devices over one GPU do not take one another's tensors, so messages must tell them apart.
        let name: Arc<str> = format!("{capabilities} on the caller's stream {:#x}", stream as usize).into();
        // SAFETY: checked as far as the driver can tell, and live by the caller's promise; `handles` has made it current.
        let context = unsafe { Context::over(handles.context, handles.stream, handles.index, Faults::new(&name)) };
        let context = context.map_err(asked)?;
        // Never negative: the driver counts devices from 0.
        let ordinal = handles.index.unsigned_abs() as usize;
        let device = Self::in_context(context, name, capabilities, &info).map_err(unavailable)?;
        Ok((device.with_trusted_kernels(handles.index, kernel)?, ordinal))
    }

    /// The device with its kernels; otherwise, why they cannot be had.
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
        Ok(Self {
            id: DeviceId::unique(),
            name,
            capabilities,
            context: Arc::new(context),
            // Never negative: the driver counts them.
            multiprocessors: info.multiprocessors.unsigned_abs().max(1) as usize,
            modules,
            timers: Timers::default(),
        })
    }

    /// Another device over the same context and kernels, on a stream of its own; to be dropped first.
    pub(super) fn on_own_stream(&self, index: i32) -> Result<Self> {
        let _current = self.context.enter()?;
        let context = self.context.done(self.context.with_own_stream(index), "making a stream")?;
        Ok(Self {
            id: DeviceId::unique(),
            name: Arc::clone(&self.name),
            capabilities: self.capabilities.clone(),
            context: Arc::new(context),
            multiprocessors: self.multiprocessors,
            modules: Arc::clone(&self.modules),
            timers: Timers::default(),
        })
    }

    /// The context's loss, if it is lost.
    pub fn check(&self) -> Result<()> {
        self.context.faults.check()
    }

    /// Memory with whatever contents that may outlive a capture of the stream, so there is none during one; the context is
    /// current.
    pub(super) fn lasting(&self, bytes: u64) -> Result<CudaBuffer> {
        self.context.expect_no_capture("allocating a tensor")?;
        self.scratch(bytes)
    }

    /// Memory with whatever contents, to be dropped before the call ends; the context is current.
    pub(super) fn scratch(&self, bytes: u64) -> Result<CudaBuffer> {
        let limit = self.capabilities.max_buffer_bytes;
        if bytes > limit {
            let limit_name = "the device's memory (bytes)";
            return Err(Error::TooLarge { argument: "tensor", limit_name, limit, got: bytes });
        }
        CudaBuffer::new(&self.context, self.id, bytes)
    }

    /// The caller's memory as this device's; checked as far as the driver can tell.
    ///
    /// # Safety
    /// As of [`CudaBuffer::over`].
    pub(super) unsafe fn memory_over(&self, address: u64, bytes: u64) -> Result<CudaBuffer> {
        {
            let _current = self.context.enter()?;
            caller::check_memory(&self.context, address, bytes)?;
        }
        // SAFETY: by the caller's promise.
        Ok(unsafe { CudaBuffer::over(&self.context, self.id, address, bytes) })
    }

    pub(super) fn function(&self, entry: Entry) -> Result<Function> {
        self.modules.function(&self.context, entry)
    }

    pub(super) fn source<'a>(&self, source: Source<'a>) -> Result<&'a CudaBuffer> {
        source.owned_by(self.id, &self.name)
    }

    pub(super) fn sink<'a>(&self, sink: &Sink<'a>) -> Result<&'a CudaBuffer> {
        sink.owned_by(self.id, &self.name)
    }
}

fn capabilities_of(info: &CudaDeviceInfo) -> Capabilities {
    let (major, minor) = info.compute_capability;
    let driver = probe::version(info.driver_version);
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
    }
}

fn older_driver(version: i32) -> String {
    let (driver, kernels) = (probe::version(version), probe::version(KERNELS_CUDA));
    format!("the driver for CUDA {driver} is older than the kernels' {kernels}; a newer NVIDIA driver runs them")
}

/// Why the driver does not take the kernels.
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
        self.id
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn alloc(&self, bytes: u64) -> Result<Storage> {
        let _current = self.context.enter()?;
        Ok(Storage::Device(Box::new(self.lasting(bytes)?)))
    }

    fn metadata_place(&self) -> MetadataPlace {
        MetadataPlace::Device
    }

    fn alloc_metadata(&self, batch: usize, seq: usize) -> Result<Storage> {
        let _current = self.context.enter()?;
        Ok(Storage::Device(Box::new(self.empty_metadata(batch, seq)?)))
    }

    fn upload(&self, to: Sink<'_>, bytes: &[u8]) -> Result<()> {
        let _current = self.context.enter()?;
        self.sink(&to)?.upload(bytes)
    }

    fn download(&self, from: Source<'_>, into: &mut [u8]) -> Result<()> {
        let _current = self.context.enter()?;
        self.source(from)?.download(into)
    }

    fn execute(&self, op: Op<'_>) -> Result<()> {
        let _current = self.context.enter()?;
        match op {
            Op::Attention(attention) => self.attend(&attention),
            Op::Pack { pairs, meta } => self.pack(&pairs, meta),
            Op::Scatter { packed, padded, meta } => self.scatter(&packed, &padded, meta),
            Op::Zero(out) => self.zero(&out),
            Op::Metadata { mask, tables } => self.build_metadata(&mask, &tables),
        }
    }

    fn synchronize(&self) -> Result<()> {
        let _current = self.context.enter()?;
        self.context.synchronize()
    }

    fn upload_meta(&self, meta: &VarlenMeta) -> Result<()> {
        let _current = self.context.enter()?;
        self.host_tables(meta)?;
        // What dense paths use instead.
        self.mask_bits(meta.key_mask()).map(drop)
    }

    fn start_timer(&self) -> Result<Instant> {
        let _current = self.context.enter()?;
        self.timers.start(&self.context)
    }

    fn stop_timer(&self, started: Instant) -> Result<Timing> {
        let _current = self.context.enter()?;
        self.timers.stop(&self.context, started)
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
            let refused = unsafe { CudaDevice::over(context as *mut c_void, stream as *mut c_void, None) }.err();
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
