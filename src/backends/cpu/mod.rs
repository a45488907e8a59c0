//! The CPU device: a real fallback for machines without a GPU.

mod attention;
mod call;
mod copy;
mod host;
mod needed_keys;
mod rows;
mod softmax;
mod strip;
mod tiles;

use std::any::Any;
use std::sync::{Arc, LazyLock};

use crate::cache::DeviceId;
use crate::call::op::{Backend, Instant, MetadataPlace, Op, Sink, Source, Storage, Timing, no_device_tables};
use crate::call::plan::Capabilities;
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::{BackendKind, Kernel};
use crate::mask::meta::VarlenMeta;

const NAME: &str = BackendKind::Cpu.name();

/// The host's processor and memory. There is one in a process; launches return when the work is done.
#[derive(Debug)]
pub(crate) struct CpuDevice {
    capabilities: Capabilities,
}

impl CpuDevice {
    pub(crate) fn shared() -> Arc<dyn Backend> {
        static SHARED: LazyLock<Arc<CpuDevice>> = LazyLock::new(|| Arc::new(CpuDevice::new()));
        Arc::clone(&SHARED) as Arc<dyn Backend>
    }

    fn new() -> Self {
        Self {
            capabilities: Capabilities {
                backend: BackendKind::Cpu,
                adapter: format!("{} threads, {}", rayon::current_num_threads(), instruction_set()),
                is_software: true,
                dtypes: &[DType::F32, DType::F16, DType::Bf16],
                kernels: vec![Kernel::CpuTiled],
                max_buffer_bytes: isize::MAX as u64,
                max_binding_bytes: isize::MAX as u64,
                has_timestamps: false,
            },
        }
    }
}

/// The vector instructions that the kernel was dispatched to.
fn instruction_set() -> &'static str {
    match pulp::Arch::new() {
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        pulp::Arch::V3(_) => "AVX2",
        #[cfg(target_arch = "x86_64")]
        pulp::Arch::V4(_) => "AVX-512",
        #[cfg(target_arch = "aarch64")]
        pulp::Arch::Neon(_) => "NEON",
        _ => "portable code",
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
            Op::Attention(attention) => attention::attend(attention),
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
