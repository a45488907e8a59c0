//! The CPU device: a real fallback for machines without a GPU.

mod attention;
mod call;
mod copy;
mod half_rows;
mod host;
mod isa;
mod needed_keys;
mod rows;
mod softmax;
mod strip;
mod tiles;

use std::any::Any;
use std::sync::{Arc, LazyLock};

use self::isa::Processor;
use crate::cache::DeviceId;
use crate::call::op::{Backend, Instant, MetadataPlace, Op, Sink, Source, Storage, Timing, no_device_tables};
use crate::call::plan::Capabilities;
use crate::config::CpuIsa;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{BackendKind, Kernel};
use crate::mask::meta::VarlenMeta;

const NAME: &str = BackendKind::Cpu.name();

/// The host's processor and memory. There is one for each instruction set in a process, and they
/// share their memory; launches return when the work is done.
#[derive(Debug)]
pub(crate) struct CpuDevice {
    processor: Processor,
    capabilities: Capabilities,
}

impl CpuDevice {
    /// The device on an instruction set, or on the processor's best one.
    ///
    /// # Errors
    /// [`Error::NotApplicable`] if the processor lacks the instruction set.
    pub(crate) fn open(isa: Option<CpuIsa>) -> Result<Arc<dyn Backend>> {
        static SHARED: LazyLock<Vec<Arc<CpuDevice>>> =
            LazyLock::new(|| Processor::all().map(|processor| Arc::new(CpuDevice::new(processor))).collect());
        let found = SHARED.iter().find(|device| isa.is_none_or(|isa| isa == device.processor.isa()));
        let device = found.ok_or_else(|| {
            let names: Vec<_> = SHARED.iter().map(|device| device.processor.isa().name()).collect();
            let got = isa.map_or("none", CpuIsa::name).to_owned();
            Error::NotApplicable { argument: "cpu_isa", got, why: format!("the processor has {}", names.join(", ")) }
        })?;
        Ok(Arc::clone(device) as Arc<dyn Backend>)
    }

    /// The device on the processor's best instruction set.
    #[cfg(test)]
    pub(crate) fn shared() -> Arc<dyn Backend> {
        Self::open(None).expect("every processor has an instruction set")
    }

    fn new(processor: Processor) -> Self {
        Self {
            processor,
            capabilities: Capabilities {
                backend: BackendKind::Cpu,
                adapter: format!("{} threads, {}", rayon::current_num_threads(), processor.isa()),
                is_software: true,
                dtypes: &[DType::F32, DType::F16, DType::Bf16],
                kernels: vec![Kernel::CpuTiled],
                max_buffer_bytes: isize::MAX as u64,
                max_binding_bytes: isize::MAX as u64,
                has_timestamps: false,
                machine: None,
            },
        }
    }
}

impl Backend for CpuDevice {
    fn id(&self) -> DeviceId {
        DeviceId::CPU
    }

    fn name(&self) -> &str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn alloc(&self, bytes: u64) -> Result<Storage> {
        host::alloc_words(bytes).map(Storage::Host)
    }

    fn metadata_place(&self) -> MetadataPlace {
        MetadataPlace::Host
    }

    fn upload(&self, to: Sink<'_>, bytes: &[u8]) -> Result<()> {
        let memory = host::sink_bytes(to)?;
        memory[..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn download(&self, from: Source<'_>, into: &mut [u8]) -> Result<()> {
        let memory = host::source_bytes(from)?;
        into.copy_from_slice(&memory[..into.len()]);
        Ok(())
    }

    fn execute(&self, op: Op<'_>) -> Result<()> {
        match op {
            Op::Attention(attention) => attention::attend(attention, self.processor),
            Op::Pack { pairs, meta } => pairs.into_iter().try_for_each(|(from, to)| copy::pack(from, to, meta)),
            Op::Scatter { packed, padded, meta } => copy::scatter(packed, padded, meta),
            Op::Zero(out) => copy::zero(out),
            Op::Metadata { .. } => Err(no_device_tables(NAME)),
        }
    }

    fn upload_meta(&self, _meta: &VarlenMeta) -> Result<()> {
        // The metadata's own tables are where they are needed.
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn start_timer(&self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn stop_timer(&self, started: Instant) -> Result<Timing> {
        Ok(Timing { duration: started.elapsed(), by_device: false })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
