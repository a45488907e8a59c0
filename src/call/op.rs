//! The seam between the library and its devices: what a backend is given, and what it must do.

use std::any::Any;
use std::fmt::Debug;
use std::pin::Pin;
use std::time::Duration;

// The standard library's clock panics in a browser.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use std::time::Instant;
#[cfg(target_arch = "wasm32")]
pub(crate) use web_time::Instant;

use crate::cache::{BuildCopies, DeviceId};
use crate::call::memory::{Input, Output, Sink, Source, Storage};
use crate::call::plan::{Capabilities, Plan};
use crate::call::prepare_qk::PrepareQk;
use crate::call::problem::AttentionProblem;
use crate::call::segments::Segmented;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::mask::cu_seqlens::CuSeqlens;
use crate::mask::key_mask::KeyMask;
use crate::mask::key_ranges::KeyRanges;
use crate::mask::meta::VarlenMeta;
use crate::score_modifiers::ScoreModifiers;

/// A result that a browser gives later, and any other place at once.
pub(crate) type Later<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// Tables of a device, where a device was given them that builds none.
pub(crate) fn no_device_tables(device: &str) -> Error {
    let why = "it does not build metadata itself; build VarlenMeta on the host".to_owned();
    Error::NotApplicable { argument: "device", got: device.to_owned(), why }
}

/// Which queries meet which keys, and where they lie.
#[derive(Debug)]
pub(crate) enum Rows<'a> {
    /// Padded tensors, every query row computed. Rows that `zero_rows` does not keep are written as zeros instead.
    Dense { key_mask: Option<&'a KeyMask>, zero_rows: Option<&'a KeyMask> },
    /// Padded tensors of which only the valid tokens count; rows of masked queries are written as zeros. `plan.path` says
    /// whether to work in place or to pack.
    Varlen { query: &'a VarlenMeta, key: &'a VarlenMeta },
    /// The same with metadata in tables of the device, which only a device that builds them has.
    DeviceVarlen { query: DeviceTables<'a>, key: DeviceTables<'a> },
    /// Packed rows.
    Packed { query: &'a CuSeqlens, key: &'a CuSeqlens },
}

/// Metadata in the memory of the device that built it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceTables<'a> {
    pub memory: Source<'a>,
    pub batch: usize,
    pub seq: usize,
    /// What the device makes of them for its kernels.
    #[cfg_attr(
        any(not(feature = "cuda"), target_arch = "wasm32"),
        allow(dead_code, reason = "CUDA devices alone keep something")
    )]
    pub kept: &'a BuildCopies,
}

/// A `[B, S]` mask to read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MaskInput<'a> {
    pub memory: Source<'a>,
    pub layout: Layout,
    pub element_bytes: usize,
}

/// Where a device keeps metadata of masks that it has already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MetadataPlace {
    /// In host memory, where its tensors are too.
    Host,
    /// In tables that it builds itself.
    Device,
    /// It does not build metadata.
    Nowhere,
}

/// One attention call: `out = softmax(q·kᵀ·scale + bias) · v`, head by head, where scores may be modified.
#[derive(Debug)]
pub(crate) struct Attention<'a> {
    pub problem: &'a AttentionProblem,
    pub plan: Plan,
    pub q: Segmented<Input<'a>>,
    pub k: Segmented<Input<'a>>,
    pub v: Segmented<Input<'a>>,
    pub out: Segmented<Output<'a>>,
    /// The log-sum-exp of every row, f32 and natural logarithm: `[H, total_q]` with [`Rows::Packed`], else `[B, H, Sq]`. −∞
    /// for a row without a key, and where the output's row is masked.
    pub lse: Option<Output<'a>>,
    pub rows: Rows<'a>,
    /// Which of the keys that count each query sees.
    pub ranges: Option<&'a KeyRanges>,
    /// What else happens to the scores; not none of all.
    pub modifiers: Option<&'a ScoreModifiers>,
    /// Added to the scaled scores, laid out as `problem.bias`; not with packed rows.
    pub bias: Option<Input<'a>>,
    /// Which keys and values are there; all if there are none.
    #[cfg_attr(
        any(not(feature = "cuda"), target_arch = "wasm32"),
        allow(dead_code, reason = "CUDA devices alone have it")
    )]
    pub arrivals: Option<Arrivals<'a>>,
}

/// Keys and values that come while a call computes, on a device whose memory others copy to. All copies are under way when the call
/// is launched. Heads come one after another, those of one batch row after those of the row before; segments that come are `[B, S, Hkv, D]`
/// whose rows are whole words of 16 bytes.
#[cfg_attr(any(not(feature = "cuda"), target_arch = "wasm32"), allow(dead_code, reason = "CUDA devices alone have it"))]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrivals<'a> {
    /// A `u32` of the device's memory, which counts the heads that are there, modulo 2³².
    pub count: Source<'a>,
    /// What it says before the first.
    pub before: u32,
}

impl<'a> Attention<'a> {
    /// The same call of another problem: kernels may compute with a larger head dimension than tensors have.
    #[cfg(any(feature = "wgpu", all(feature = "cuda", not(target_arch = "wasm32"))))]
    pub(crate) fn on<'p>(self, problem: &'p AttentionProblem) -> Attention<'p>
    where
        'a: 'p,
    {
        Attention { problem, ..self }
    }
}

/// Attention over some of the keys: its output, `[B, S, H, D]`, and its log-sum-exp, `[B, H, S]` f32.
#[derive(Debug)]
pub(crate) struct MergePart<'a> {
    pub out: Input<'a>,
    pub lse: Input<'a>,
}

/// Attention over the keys of both parts. All tensors are padded ones.
#[derive(Debug)]
pub(crate) struct Merge<'a> {
    pub parts: [MergePart<'a>; 2],
    pub out: Output<'a>,
    pub lse: Option<Output<'a>>,
}

/// Work for a device. Every operand has passed the checks of `problem`.
#[derive(Debug)]
pub(crate) enum Op<'a> {
    Attention(Attention<'a>),
    /// Copies the valid rows of each padded input to its packed output.
    Pack {
        pairs: Vec<(Input<'a>, Output<'a>)>,
        meta: &'a VarlenMeta,
    },
    /// Copies packed rows to the valid rows of the padded output and writes zeros to the others.
    Scatter {
        packed: Input<'a>,
        padded: Output<'a>,
        meta: &'a VarlenMeta,
    },
    /// Writes zeros to every element of the view, and to nothing else.
    Zero(Output<'a>),
    /// Writes the log-sum-exp of rows without keys, −∞, to every element of a `[B, H, S]` f32 view, and to nothing else.
    NoKeys(Output<'a>),
    Merge(Merge<'a>),
    PrepareQk(PrepareQk<'a>),
    /// Builds the metadata of a mask in tables of [`Backend::alloc_metadata`].
    Metadata {
        mask: MaskInput<'a>,
        tables: DeviceTables<'a>,
    },
}

/// Hands operations to what executes them, in their order.
pub(crate) type Steps<'a> = Box<dyn FnOnce(&mut dyn FnMut(Op<'_>) -> Result<()>) -> Result<()> + 'a>;

/// A device. Launches do not wait: results are there for later calls on the same device and for [`Backend::download`].
pub(crate) trait Backend: Debug + Send + Sync {
    fn id(&self) -> DeviceId;
    /// The device's name, for messages: its kind and its adapter.
    fn name(&self) -> &str;
    fn capabilities(&self) -> &Capabilities;
    /// New memory with contents that are not specified.
    fn alloc(&self, bytes: u64) -> Result<Storage>;
    /// Where metadata of masks on the device is kept.
    fn metadata_place(&self) -> MetadataPlace {
        MetadataPlace::Nowhere
    }
    /// Tables of a `[batch, seq]` mask, without any valid token; only where [`MetadataPlace::Device`] is.
    fn alloc_metadata(&self, _batch: usize, _seq: usize) -> Result<Storage> {
        Err(no_device_tables(self.name()))
    }
    /// Copies host bytes to the start of the memory.
    fn upload(&self, to: Sink<'_>, bytes: &[u8]) -> Result<()>;
    /// Copies the first `into.len()` bytes to the host, after all work launched so far.
    fn download(&self, from: Source<'_>, into: &mut [u8]) -> Result<()>;
    fn execute(&self, op: Op<'_>) -> Result<()>;
    /// Executes several operations, each of which sees what those before it wrote. A device that submits work does so once,
    /// and not at all if one of them fails.
    fn execute_all(&self, steps: Steps<'_>) -> Result<()> {
        steps(&mut |op| self.execute(op))
    }
    /// Makes the device the thread's current one until the result is dropped, where there is such a thing, so that calls in between
    /// need not each do so.
    fn stay_current(&self) -> Result<Box<dyn Debug + '_>> {
        Ok(Box::new(()))
    }
    /// Waits for all work launched so far.
    fn synchronize(&self) -> Result<()>;
    /// Frees memory that is kept for the copies and steps of later calls, where the device keeps any itself.
    fn release_scratch(&self) {}
    /// Makes the copies of the metadata that calls use, so that none of them has to.
    fn upload_meta(&self, meta: &VarlenMeta) -> Result<()>;
    /// Starts to add up the time that launches take on the device; gives the host's time.
    fn start_timer(&self) -> Result<Instant>;
    /// Waits for all work and gives the time since [`Backend::start_timer`] gave `started`.
    fn stop_timer(&self, started: Instant) -> Result<Timing>;
    /// [`download`](Self::download) in a form that may give up the thread instead of waiting. Only a browser's device has one.
    fn download_async<'a>(&'a self, from: Source<'a>, into: &'a mut [u8]) -> Later<'a, ()> {
        Box::pin(async move { self.download(from, into) })
    }
    /// The same of [`synchronize`](Self::synchronize).
    fn synchronize_async(&self) -> Later<'_, ()> {
        Box::pin(async move { self.synchronize() })
    }
    /// The same of [`start_timer`](Self::start_timer).
    fn start_timer_async(&self) -> Later<'_, Instant> {
        Box::pin(async move { self.start_timer() })
    }
    /// The same of [`stop_timer`](Self::stop_timer).
    fn stop_timer_async(&self, started: Instant) -> Later<'_, Timing> {
        Box::pin(async move { self.stop_timer(started) })
    }
    /// For accessors of one backend's own handles.
    fn as_any(&self) -> &dyn Any;
}

/// How long work took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timing {
    /// Time taken.
    pub duration: Duration,
    /// Whether the device measured it (timestamp queries around its own work); the host's clock otherwise.
    pub by_device: bool,
}
