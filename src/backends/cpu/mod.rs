//! The CPU device: a real fallback for machines without a GPU.

mod attention;
mod bf16_pairs;
mod call;
mod copy;
mod half_rows;
mod host;
mod isa;
mod lse;
mod needed_keys;
mod operands;
mod prepare_qk;
mod processor;
mod rows;
mod seen_keys;
mod softcap;
mod softmax;
mod strip;
mod threads;
mod tiles;

use std::any::Any;
use std::num::NonZeroUsize;
use std::sync::Arc;

use rayon::ThreadPool;

use self::processor::Processor;
use self::threads::Threads;
use crate::cache::DeviceId;
use crate::call::memory::{Sink, Source, Storage};
use crate::call::op::{Backend, Instant, MetadataPlace, Op, Timing, no_device_tables};
use crate::call::plan::Capabilities;
use crate::call::segments::Segmented;
use crate::config::CpuIsa;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{BackendKind, Kernel};
use crate::mask::meta::VarlenMeta;

/// The host's processor and memory. All in a process share their memory, whatever their instruction
/// set and threads; launches return when the work is done.
#[derive(Debug)]
pub(crate) struct CpuDevice {
    processor: Processor,
    threads: Threads,
    capabilities: Capabilities,
}

impl CpuDevice {
    /// The device on an instruction set, or on the processor's best one, and so many threads of the
    /// library's own. None is started yet.
    ///
    /// # Errors
    /// [`Error::NotApplicable`] if the processor lacks the instruction set.
    pub(crate) fn open(isa: Option<CpuIsa>, threads: Option<NonZeroUsize>) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Self::new(processor(isa)?, Threads::own(threads))))
    }

    /// The same on the threads of an application's pool.
    ///
    /// # Errors
    /// [`Error::NotApplicable`] if the processor lacks the instruction set.
    pub(crate) fn over(pool: Arc<ThreadPool>, isa: Option<CpuIsa>) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Self::new(processor(isa)?, Threads::of_application(pool))))
    }

    /// The device on the processor's best instruction set.
    #[cfg(test)]
    pub(crate) fn shared() -> Arc<dyn Backend> {
        Self::open(None, None).expect("every processor has an instruction set")
    }

    fn new(processor: Processor, threads: Threads) -> Self {
        Self {
            processor,
            capabilities: Capabilities {
                backend: BackendKind::Cpu,
                adapter: format!("{} threads, {}", threads.most(), processor.isa()),
                is_software: true,
                dtypes: &[DType::F32, DType::F16, DType::Bf16],
                kernels: vec![Kernel::CpuTiled],
                max_buffer_bytes: isize::MAX as u64,
                max_binding_bytes: isize::MAX as u64,
                has_timestamps: false,
                machine: None,
            },
            threads,
        }
    }
}

/// An instruction set of the processor, or its best one.
fn processor(isa: Option<CpuIsa>) -> Result<Processor> {
    let found = Processor::all().find(|processor| isa.is_none_or(|isa| isa == processor.isa()));
    found.ok_or_else(|| {
        let names: Vec<_> = Processor::all().map(|processor| processor.isa().name()).collect();
        let got = isa.map_or("none", CpuIsa::name).to_owned();
        Error::NotApplicable { argument: "cpu_isa", got, why: format!("the processor has {}", names.join(", ")) }
    })
}

impl Backend for CpuDevice {
    fn id(&self) -> DeviceId {
        DeviceId::CPU
    }

    fn name(&self) -> &str {
        host::NAME
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
            Op::Attention(attention) => attention::attend(attention, self.processor, &self.threads),
            Op::Pack { pairs, meta } => {
                pairs.into_iter().try_for_each(|(from, to)| copy::pack(Segmented::One(from), to, meta, &self.threads))
            }
            Op::Scatter { packed, padded, meta } => copy::scatter(packed, Segmented::One(padded), meta, &self.threads),
            Op::Zero(out) => copy::zero(out, &self.threads),
            Op::NoKeys(lse) => lse::no_keys(lse),
            Op::Merge(merge) => lse::merge(merge, &self.threads),
            Op::PrepareQk(call) => prepare_qk::prepare_qk(call, self.processor, &self.threads),
            Op::Metadata { .. } => Err(no_device_tables(host::NAME)),
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
