//! External CUDA handles: devices over a context and stream of the test's own, tensors over its memory, and captures of its stream into
//! graphs.

use std::ffi::c_void;
use std::sync::{Arc, PoisonError, RwLock};
use std::{ptr, thread};

use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::sys::{CUcontext, CUgraphInstantiate_flags, CUmemAttach_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaGraph, CudaStream, result, sys};
use varlen_fa::{
    AttentionMask, Config, CuSeqlens, DType, Device, DeviceChoice, DeviceMemory, DeviceVarlenMeta, Error, KeyMask,
    KeyRanges, Layout, MaskDType, Path, Plan, Tensor, TensorView, TensorViewMut, VarlenMeta, VarlenOptions, pack,
    pack_qkv, scatter_to_padded, varlen_attention,
};
use varlen_fa_testkit::{OracleShape, random};

use super::call::{Call, Mask, tensor_shapes};
use super::check::Rules;
use super::memory::{narrow, poison, sentinel};
use super::placement::Placement;
use super::rule::Rule;
use super::trials::{Trials, Variant};

pub fn register(trials: &mut Trials) {
    trials.each_path("external/memory_at_odd_places", memory_at_odd_places);
    trials.each_path("external/capture_and_replay", capture_and_replay);
    trials.each_path("external/capture_of_new_metadata", capture_of_new_metadata);
    trials.each_kernel("external/capture_of_dense_calls", capture_of_dense_calls);
    trials.each_path_of_device_meta("external/capture_of_metadata_on_the_device", capture_of_metadata_on_the_device);
    trials.once("external/capture_of_the_first_launch", capture_of_the_first_launch);
    // What is unsafe during this kind of capture is refused to all threads.
    trials.alone("external/capture_in_the_global_mode", capture_in_the_global_mode);
    trials.once("external/what_a_capture_refuses", what_a_capture_refuses);
    trials.once("external/the_default_stream", the_default_stream);
    trials.once("external/devices_over_one_context", devices_over_one_context);
    trials.once("external/contexts_that_come_and_go", contexts_that_come_and_go);
    trials.once("external/the_callers_context_stays_current", the_callers_context_stays_current);
    trials.once("external/outputs_over_inputs", outputs_over_inputs);
    trials.once("external/elements_and_rows_beside_their_places", elements_and_rows_beside_their_places);
    trials.once("external/managed_and_page_locked_memory", managed_and_page_locked_memory);
    trials.once("external/bad_handles", bad_handles);
    // Nobody else may allocate where memory was just freed.
    trials.alone("external/bad_memory", bad_memory);
}

/// While a stream is captured nothing may wait for its whole context, which making streams and freeing memory does: captures
/// hold this for writing, those for reading.
static CAPTURE: RwLock<()> = RwLock::new(());

fn beside_no_capture() -> impl Drop {
    CAPTURE.read().unwrap_or_else(PoisonError::into_inner)
}

// ---- what an application has -------------------------------------------------------------------------------------------------

/// A context and a stream of the test's own.
#[derive(Debug, Clone)]
pub struct Application {
    /// The primary context, as most applications have it.
    pub context: Arc<CudaContext>,
    /// A stream that does not wait for the default one.
    pub stream: Arc<CudaStream>,
}

impl Application {
    /// On the first GPU.
    pub fn new() -> Result<Self> {
        Self::on_gpu(0)
    }

    pub fn on_gpu(ordinal: usize) -> Result<Self> {
        let _beside = beside_no_capture();
        let context = CudaContext::new(ordinal).map_err(driver)?;
        let stream = context.new_stream().map_err(driver)?;
        Ok(Self { context, stream })
    }

    /// The same in a context that nobody used before.
    pub fn in_a_new_context() -> Result<Self> {
        let _beside = beside_no_capture();
        result::init().map_err(driver)?;
        let device = result::device::get(0).map_err(driver)?;
        // SAFETY: the device comes from the driver; null asks for a plain context.
        let context = unsafe { result::ctx::create_v4(ptr::null_mut(), 0, device) }.map_err(driver)?;
        // SAFETY: just made, for this device; what is returned destroys it.
        let context = unsafe { CudaContext::from_raw_context(0, device, context) }.map_err(driver)?;
        let stream = context.new_stream().map_err(driver)?;
        Ok(Self { context, stream })
    }

    /// A device over both; the application outlives it in every test.
    pub fn device(&self) -> Result<Device> {
        let (context, stream) = (self.context.cu_ctx(), self.stream.cu_stream());
        // SAFETY: both are live, and the test drops the device before the application.
        Ok(unsafe { Device::from_cuda(context.cast(), stream.cast(), Config::default()) }?)
    }

    /// The variant on a device of the application's.
    pub fn variant(&self, variant: &Variant) -> Result<Variant> {
        Ok(Variant { device: self.device()?, ..variant.clone() })
    }

    /// Waits for the application's stream.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(driver)
    }

    /// Captures what `work` launches. The capture is ended whether or not the work succeeds.
    pub fn capture(&self, mode: CUstreamCaptureMode, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        let _alone = CAPTURE.write().unwrap_or_else(PoisonError::into_inner);
        self.stream.begin_capture(mode).map_err(driver).context("beginning the capture")?;
        let worked = work();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0)).map_err(driver);
        worked?;
        graph.context("ending the capture")?.context("a capture without a graph")
    }
}

/// Captures of one thread, beside which other threads do as they like.
pub const LOCAL: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

/// Memory of the application, from `cuMemAlloc`.
#[derive(Debug)]
pub struct Raw {
    /// Address of the first byte.
    pub address: u64,
    bytes: usize,
    application: Application,
}

impl Raw {
    /// New memory with whatever contents.
    pub fn alloc(application: &Application, bytes: usize) -> Result<Self> {
        let _beside = beside_no_capture();
        application.context.bind_to_thread().map_err(driver)?;
        // SAFETY: nothing is assumed of the contents.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(driver)?;
        Ok(Self { address, bytes, application: application.clone() })
    }

    /// Memory that holds 16-bit values.
    pub fn of(application: &Application, values: &[u16]) -> Result<Self> {
        let raw = Self::alloc(application, size_of_val(values))?;
        raw.write(0, values)?;
        Ok(raw)
    }

    /// Overwrites the memory from a byte on, in the stream's order.
    pub fn write(&self, at: usize, values: &[u16]) -> Result<()> {
        ensure!(at + size_of_val(values) <= self.bytes, "the test writes past its own memory");
        self.application.context.bind_to_thread().map_err(driver)?;
        let stream = self.application.stream.cu_stream();
        // SAFETY: inside the allocation, by the check; the values are borrowed until the stream is done with them, below.
        unsafe { result::memcpy_htod_async(self.address + at as u64, values, stream) }.map_err(driver)?;
        self.application.synchronize()
    }

    /// All of the memory, after the stream's work.
    pub fn read(&self) -> Result<Vec<u16>> {
        let mut values = vec![0_u16; self.bytes / 2];
        self.application.context.bind_to_thread().map_err(driver)?;
        let stream = self.application.stream.cu_stream();
        // SAFETY: as large as the allocation; borrowed until the stream is done, below.
        unsafe { result::memcpy_dtoh_async(&mut values, self.address, stream) }.map_err(driver)?;
        self.application.synchronize()?;
        Ok(values)
    }

    /// The memory from a byte on as a device's.
    pub fn on(&self, device: &Device, from: usize) -> Result<DeviceMemory> {
        let bytes = (self.bytes - from) as u64;
        // SAFETY: the memory is the test's own, which uses it on the device's stream alone, or waits in between, and frees it last.
        Ok(unsafe { DeviceMemory::from_cuda(device, self.address + from as u64, bytes) }?)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _beside = beside_no_capture();
        let freed = self.application.context.bind_to_thread().and_then(|()| {
            // SAFETY: allocated in `alloc`, and freed here alone; the driver waits for work that uses it.
            unsafe { result::free_sync(self.address) }
        });
        if let Err(error) = freed {
            eprintln!("the test's memory is not freed: {error:?}");
        }
    }
}

fn driver(error: result::DriverError) -> anyhow::Error {
    anyhow!("the CUDA driver: {error:?}")
}

// ---- a call on the application's memory ---------------------------------------------------------------------------------------

/// A tensor in the application's memory: where it starts there, in elements, and how it lies from there on.
#[derive(Debug)]
pub struct Laid {
    // Dropped before the memory itself.
    memory: DeviceMemory,
    raw: Raw,
    placement: Placement,
    shape: [usize; 4],
    dtype: DType,
    start: usize,
}

impl Laid {
    /// A tensor whose memory holds `values`, poison between them.
    pub fn new(
        application: &Application,
        device: &Device,
        (shape, placement, start): ([usize; 4], Placement, usize),
        dtype: DType,
        values: &[u16],
    ) -> Result<Self> {
        let mut contents: Vec<u16> =
            (0..start + placement.memory_len(shape)).map(|place| poison(place, dtype) as u16).collect();
        fill(&mut contents[start..], &placement, shape, values);
        let raw = Raw::of(application, &contents)?;
        let memory = raw.on(device, 2 * start)?;
        Ok(Self { memory, raw, placement, shape, dtype, start })
    }

    /// Puts other values into it.
    pub fn write(&self, values: &[u16]) -> Result<()> {
        let mut contents = self.raw.read()?;
        fill(&mut contents[self.start..], &self.placement, self.shape, values);
        self.raw.write(0, &contents)
    }

    /// To read.
    pub fn view(&self) -> Result<TensorView<'_>> {
        let whole = Layout::contiguous(&self.placement.memory_shape(self.shape))?;
        self.placement.view(self.memory.view(self.dtype, whole), self.shape)
    }

    /// To write.
    pub fn view_mut(&mut self) -> Result<TensorViewMut<'_>> {
        let whole = Layout::contiguous(&self.placement.memory_shape(self.shape))?;
        self.placement.view_mut(self.memory.view_mut(self.dtype, whole), self.shape)
    }

    /// The values, row-major; an error if the memory around them is not what it was made with.
    pub fn read(&self) -> Result<Vec<u32>> {
        let contents = self.raw.read()?;
        let (mut values, mut is_value) = (Vec::new(), vec![false; contents.len()]);
        for row in self.placement.rows(self.shape) {
            let row = self.start + row..self.start + row + self.shape[3];
            values.extend(contents[row.clone()].iter().map(|&bits| u32::from(bits)));
            is_value[row].fill(true);
        }
        let changed = (0..contents.len()).find(|&at| !is_value[at] && contents[at] != poison(at, self.dtype) as u16);
        ensure!(changed.is_none(), "element {changed:?} beside the tensor was written");
        Ok(values)
    }
}

fn fill(contents: &mut [u16], placement: &Placement, shape: [usize; 4], values: &[u16]) {
    for (row, values) in placement.rows(shape).into_iter().zip(values.chunks(shape[3])) {
        contents[row..row + shape[3]].copy_from_slice(values);
    }
}

/// A call on tensors in the application's memory.
#[derive(Debug)]
pub struct ExternalCall {
    /// What is computed.
    pub call: Call,
    inputs: [Laid; 3],
    out: Laid,
}

impl ExternalCall {
    /// The call's values where the placements and starts say: q, k, v, output.
    pub fn new(
        application: &Application,
        device: &Device,
        call: Call,
        places: [(Placement, usize); 4],
    ) -> Result<Self> {
        let laid = |shape, (placement, start), values: &[u16]| {
            Laid::new(application, device, (shape, placement, start), call.dtype, values)
        };
        let shapes = tensor_shapes(call.shape);
        let values = bits(&call);
        let inputs = [0, 1, 2].map(|input| laid(shapes[input], places[input], &values[input]));
        let [q, k, v] = inputs;
        let (shape, inputs) = (call.output_shape(), [q?, k?, v?]);
        let out = laid(shape, places[3], &vec![sentinel(call.dtype) as u16; shape.iter().product()])?;
        Ok(Self { call, inputs, out })
    }

    /// The same call on other values, written to the same memory; the output holds the sentinel again.
    pub fn rewrite(&mut self, seed: u64) -> Result<()> {
        let rule = self.call.rule.take();
        self.call = Call { rule, ..Call::random(self.call.shape, self.call.mask.clone(), self.call.dtype, seed) };
        for (input, values) in self.inputs.iter().zip(bits(&self.call)) {
            input.write(&values)?;
        }
        self.clear()
    }

    /// Fills the output with the sentinel.
    pub fn clear(&self) -> Result<()> {
        let len = self.call.output_shape().iter().product();
        self.out.write(&vec![sentinel(self.call.dtype) as u16; len])
    }

    /// Launches it.
    pub fn launch(&mut self, variant: &Variant, mask: AttentionMask<'_>) -> Result<Plan> {
        let [q, k, v] = self.inputs.each_ref().map(Laid::view);
        Ok(variant.layer().forward_into(q?, k?, v?, mask, self.out.view_mut()?)?)
    }

    /// The output.
    pub fn read(&self) -> Result<Vec<u32>> {
        self.out.read()
    }

    /// Judges the output by the oracle.
    pub fn judge(&self) -> Result<()> {
        self.call.judge(&self.read()?, &self.call.reference(usize::MAX)?, Rules::standard(self.call.dtype))
    }
}

/// The inputs' bits, poison in rows that must not matter.
fn bits(call: &Call) -> [Vec<u16>; 3] {
    let keeps = [call.mask.query_keep(), call.mask.key_keep(), call.mask.key_keep()];
    let shapes = tensor_shapes(call.shape);
    std::array::from_fn(|input| {
        let row = shapes[input][2] * shapes[input][3];
        let bits = |(at, &value): (usize, &f32)| match keeps[input] {
            Some(keep) if !keep[at / row] => poison(at, call.dtype) as u16,
            _ => narrow(value, call.dtype) as u16,
        };
        call.values[input].iter().enumerate().map(bits).collect()
    })
}

/// A call with holes in its mask, and the metadata of that.
pub fn masked_call(variant: &Variant, seed: u64) -> Result<(Call, VarlenMeta)> {
    let shape = OracleShape { batch: 3, seq_q: 150, seq_k: 150, heads: 4, kv_heads: 2, head_dim: 64 };
    let keep = random::bernoulli_mask(seed, shape.batch * shape.seq_k, 0.6)?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_bool(shape.batch, shape.seq_k, &keep)?)?;
    Ok((Call::random(shape, Mask::Varlen(keep), variant.dtype, seed), meta))
}

/// Contiguous tensors at the start of their memory.
pub const PLAIN: [(Placement, usize); 4] = [(Placement::CONTIGUOUS, 0); 4];

// ---- trials -------------------------------------------------------------------------------------------------------------------

fn memory_at_odd_places(variant: &Variant) -> Result<()> {
    let application = Application::new()?;
    let variant = application.variant(variant)?;
    // An odd number of elements before the rows of q; odd strides too for k; room of one element beside each row of v.
    let beside = Placement { order: [0, 1, 2, 3], margin: [(1, 0), (0, 1), (1, 0), (0, 1)] };
    for (seed, places) in [
        (1, [(Placement::CONTIGUOUS, 1), (Placement::HEADS_OUTSIDE, 3), (beside, 5), (Placement::CONTIGUOUS, 8)]),
        (2, [(beside, 8), (Placement::CONTIGUOUS, 4), (Placement::ROOM_AROUND, 9), (Placement::ROOM_AROUND, 16)]),
        (
            3,
            [
                (Placement::TURNED, 0),
                (Placement::ROOM_AROUND, 8),
                (Placement::TURNED, 7),
                (Placement::HEADS_OUTSIDE, 0),
            ],
        ),
    ] {
        let (call, meta) = masked_call(&variant, seed)?;
        let mut external = ExternalCall::new(&application, &variant.device, call, places)?;
        external.launch(&variant, AttentionMask::varlen(&meta))?;
        external.judge().with_context(|| format!("{places:?}"))?;
    }
    Ok(())
}

/// A graph runs again on whatever its tensors hold by then, and gives the bits of a direct call each time.
pub fn check_replays(
    application: &Application,
    variant: &Variant,
    external: &mut ExternalCall,
    mode: CUstreamCaptureMode,
    mask: AttentionMask<'_>,
) -> Result<()> {
    let before = external.read()?;
    let graph = application.capture(mode, || external.launch(variant, mask).map(drop))?;
    application.synchronize()?;
    ensure!(external.read()? == before, "the captured call ran before the graph did");
    for seed in [101, 102, 103] {
        external.rewrite(seed)?;
        graph.launch().map_err(driver)?;
        let replayed = external.read()?;
        external.judge().with_context(|| format!("replay on values {seed}"))?;
        external.clear()?;
        external.launch(variant, mask)?;
        ensure!(external.read()? == replayed, "replay on values {seed}: other bits than a direct call");
    }
    // Again without new values: nothing of a run is left over in the graph's own memory.
    let direct = external.read()?;
    for _ in 0..3 {
        external.clear()?;
        graph.launch().map_err(driver)?;
        ensure!(external.read()? == direct, "a replay on the same values gave other bits");
    }
    Ok(())
}

fn capture_and_replay(variant: &Variant) -> Result<()> {
    let application = Application::new()?;
    let variant = application.variant(variant)?;
    let (call, meta) = masked_call(&variant, 4)?;
    meta.upload_to(&variant.device)?;
    // q is copied to an aligned place inside the graph.
    let mut places = PLAIN;
    places[0] = (Placement::CONTIGUOUS, 1);
    for places in [PLAIN, places] {
        let mut external = ExternalCall::new(&application, &variant.device, call.clone(), places)?;
        check_replays(&application, &variant, &mut external, LOCAL, AttentionMask::varlen(&meta))?;
    }
    Ok(())
}

/// Metadata that the device sees for the first time in the capture.
fn capture_of_new_metadata(variant: &Variant) -> Result<()> {
    let application = Application::new()?;
    let variant = application.variant(variant)?;
    let (call, meta) = masked_call(&variant, 5)?;
    let mut external = ExternalCall::new(&application, &variant.device, call, PLAIN)?;
    check_replays(&application, &variant, &mut external, LOCAL, AttentionMask::varlen(&meta))
}

/// A graph that builds the metadata too follows whatever its mask holds, with the bits of direct calls; also with key ranges, if
/// the kernel takes them then.
fn capture_of_metadata_on_the_device(variant: &Variant) -> Result<()> {
    let application = Application::new()?;
    let variant = application.variant(variant)?;
    check_captured_metadata(&application, &variant, None)?;
    match variant.kernel.has_ranges() && variant.kernel.takes_all_with_device_meta() {
        true => check_captured_metadata(&application, &variant, Some(Rule::Window(Some(50), Some(9)))),
        false => Ok(()),
    }
}

fn masked_by<'a>(meta: &'a DeviceVarlenMeta, ranges: Option<&'a KeyRanges>) -> AttentionMask<'a> {
    let mask = AttentionMask::varlen(meta);
    ranges.map_or(mask, |ranges| mask.with_ranges(ranges))
}

fn check_captured_metadata(application: &Application, variant: &Variant, rule: Option<Rule>) -> Result<()> {
    let (mut call, _) = masked_call(variant, 12)?;
    let OracleShape { batch, seq_q, seq_k: seq, .. } = call.shape;
    let ranges = rule.as_ref().map(|rule| rule.ranges(&[batch, seq_q, seq].into())).transpose()?;
    call.rule = rule;
    let mut external = ExternalCall::new(application, &variant.device, call, PLAIN)?;
    // Any bits but zero keep a token; the mask starts at an odd element.
    let mask = Raw::of(application, &vec![0; batch * seq + 1])?;
    let memory = mask.on(&variant.device, 2)?;
    let view = memory.mask_view(MaskDType::U16, Layout::contiguous(&[batch, seq])?);
    let mut meta = DeviceVarlenMeta::new(&variant.device, batch, seq)?;
    // Whatever calls keep, a graph of a call alone follows builds outside of it.
    meta.rebuild(view)?;
    external.launch(variant, masked_by(&meta, ranges.as_ref()))?;
    let call_alone =
        application.capture(LOCAL, || external.launch(variant, masked_by(&meta, ranges.as_ref())).map(drop))?;

    let graph = application.capture(LOCAL, || {
        ensure!(
            matches!(DeviceVarlenMeta::new(&variant.device, batch, seq), Err(Error::StreamCaptured { .. })),
            "metadata that must outlive the capture is allocated in it"
        );
        meta.rebuild(view)?;
        external.launch(variant, masked_by(&meta, ranges.as_ref())).map(drop)
    })?;
    let later_call =
        application.capture(LOCAL, || external.launch(variant, masked_by(&meta, ranges.as_ref())).map(drop))?;
    for (seed, p) in [(201, 0.5), (202, 0.9), (203, 0.0), (204, 1.0)] {
        let keep = random::bernoulli_mask(seed, batch * seq, p)?;
        external.call.mask = Mask::Varlen(keep.clone());
        external.rewrite(seed)?;
        let tokens: Vec<u16> =
            keep.iter().enumerate().map(|(at, &keep)| if keep { at as u16 | 1 } else { 0 }).collect();
        mask.write(2, &tokens)?;
        graph.launch().map_err(driver)?;
        let replayed = external.read()?;
        external.judge().with_context(|| format!("replay on a mask that keeps {p}"))?;
        // The host does not know that the graph has built the metadata anew.
        external.clear()?;
        external.launch(variant, masked_by(&meta, ranges.as_ref()))?;
        ensure!(external.read()? == replayed, "a direct call after a replay on a mask that keeps {p}: other bits");
        external.clear()?;
        meta.rebuild(view)?;
        external.launch(variant, masked_by(&meta, ranges.as_ref()))?;
        ensure!(external.read()? == replayed, "replay on a mask that keeps {p}: other bits than a direct call");
        for (graph, what) in [(&call_alone, "a call alone"), (&later_call, "a call after the graph with a rebuild")] {
            external.clear()?;
            graph.launch().map_err(driver)?;
            ensure!(external.read()? == replayed, "a graph of {what} on a mask that keeps {p}: other bits");
        }
    }
    Ok(())
}

/// Kernels that no launch has looked up before, nor used the metadata; the application itself does not wait for either.
fn capture_of_the_first_launch(device: &Device) -> Result<()> {
    let application = Application::in_a_new_context()?;
    // A path without scratch memory: whether a graph may allocate in such a context is the driver's affair.
    let variant = Variant { path: Some(Path::Dense), ..packed_variant(device)? };
    let variant = application.variant(&variant)?;
    let (call, meta) = masked_call(&variant, 11)?;
    let mut external = ExternalCall::new(&application, &variant.device, call, PLAIN)?;
    check_replays(&application, &variant, &mut external, LOCAL, AttentionMask::varlen(&meta))
}

/// No mask, a key mask, and metadata of which nothing or everything is valid.
fn capture_of_dense_calls(variant: &Variant) -> Result<()> {
    let application = Application::new()?;
    let variant = application.variant(variant)?;
    let (call, _) = masked_call(&variant, 6)?;
    let keep = call.mask.key_keep().unwrap_or_default().to_vec();
    let of = |keep: &[bool]| KeyMask::from_bool(call.shape.batch, call.shape.seq_k, keep);
    let key_mask = of(&keep)?;
    let nothing = VarlenMeta::from_key_mask(&of(&vec![false; keep.len()])?)?;
    let everything = VarlenMeta::from_key_mask(&of(&vec![true; keep.len()])?)?;
    for (mask, given) in [
        (Mask::None, AttentionMask::none()),
        (Mask::Key(keep.clone()), AttentionMask::key(&key_mask)),
        (Mask::Varlen(vec![false; keep.len()]), AttentionMask::varlen(&nothing)),
        (Mask::Varlen(vec![true; keep.len()]), AttentionMask::varlen(&everything)),
    ] {
        let call = Call::random(call.shape, mask, call.dtype, 6);
        let mut external = ExternalCall::new(&application, &variant.device, call, PLAIN)?;
        check_replays(&application, &variant, &mut external, LOCAL, given)?;
    }
    Ok(())
}

/// The mode that captures begin in by default.
fn capture_in_the_global_mode(device: &Device) -> Result<()> {
    let application = Application::new()?;
    let variant = application.variant(&packed_variant(device)?)?;
    let (call, meta) = masked_call(&variant, 7)?;
    let mut external = ExternalCall::new(&application, &variant.device, call, PLAIN)?;
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    check_replays(&application, &variant, &mut external, mode, AttentionMask::varlen(&meta))
}

fn packed_variant(device: &Device) -> Result<Variant> {
    let kernel = *device.capabilities().kernels.first().context("no kernel")?;
    Ok(Variant { device: device.clone(), kernel, path: Some(Path::Packed), dtype: DType::Bf16, tile_keys: None })
}

/// Each thing that a graph cannot hold is an error of its own kind, and the capture is none the worse for it.
fn what_a_capture_refuses(device: &Device) -> Result<()> {
    let application = Application::new()?;
    let variant = application.variant(&packed_variant(device)?)?;
    let device = &variant.device;
    let (call, meta) = masked_call(&variant, 8)?;
    let mut external = ExternalCall::new(&application, device, call, PLAIN)?;

    let shape = [2, 6, 4, 16];
    let x = Tensor::zeros(device, DType::Bf16, &shape)?;
    let short = VarlenMeta::from_key_mask(&KeyMask::from_lengths(6, &[3, 4])?)?;
    let packed = pack(device, &x, &short)?;
    let dropped_inside = Tensor::zeros(device, DType::Bf16, &[1000])?;
    let mut memory = DeviceMemory::alloc(device, 64)?;
    let cu = CuSeqlens::new(&[0, 3, 7])?;
    let layer = variant.layer();
    let (context, stream) = (application.context.cu_ctx(), application.stream.cu_stream());

    let graph = application.capture(LOCAL, || {
        let results = [
            ("synchronize", device.synchronize()),
            ("time", device.time(|| Ok(())).map(drop)),
            ("to_vec", x.to_vec::<varlen_fa::bf16>().map(drop)),
            ("Tensor::zeros", Tensor::zeros(device, DType::Bf16, &shape).map(drop)),
            ("Tensor::from_slice", Tensor::from_slice(device, &[varlen_fa::bf16::ONE; 6], &[6]).map(drop)),
            ("DeviceMemory::alloc", DeviceMemory::alloc(device, 64).map(drop)),
            ("DeviceMemory::write", memory.write(&[1_u8; 64])),
            ("DeviceMemory::read", memory.read(&mut [0_u8; 64])),
            ("forward", layer.forward(&x, &x, &x, AttentionMask::varlen(&short)).map(drop)),
            ("pack", pack(device, &x, &short).map(drop)),
            ("pack_qkv", pack_qkv(device, &x, &x, &x, &short).map(drop)),
            ("scatter_to_padded", scatter_to_padded(device, &packed, &short).map(drop)),
            ("varlen_attention", varlen_attention(device, [&packed; 3], &cu, &cu, VarlenOptions::default()).map(drop)),
            // SAFETY: both are live; no device is made.
            ("from_cuda", unsafe { Device::from_cuda(context.cast(), stream.cast(), Config::default()) }.map(drop)),
        ];
        for (operation, result) in results {
            ensure!(
                matches!(result, Err(Error::StreamCaptured { .. })),
                "{operation}: expected StreamCaptured, got {result:?}"
            );
        }
        // Its memory is not the graph's, and waits for the end of the capture.
        drop(dropped_inside);
        external.launch(&variant, AttentionMask::varlen(&meta)).map(drop)
    })?;
    graph.launch().map_err(driver)?;
    external.judge().context("the capture that refused")?;
    // And afterwards everything works again.
    ensure!(x.to_vec::<varlen_fa::bf16>()? == [varlen_fa::bf16::ZERO; 2 * 6 * 4 * 16]);
    layer.forward(&x, &x, &x, AttentionMask::varlen(&short))?;
    device.synchronize()?;
    Ok(())
}

/// A null stream, which is PyTorch's; and null for the context too, in a thread that has one.
fn the_default_stream(device: &Device) -> Result<()> {
    let context = CudaContext::new(0).map_err(driver)?;
    let application = Application { stream: context.default_stream(), context };
    application.context.bind_to_thread().map_err(driver)?;
    for (context, stream) in [
        (application.context.cu_ctx(), ptr::null_mut::<c_void>()),
        (ptr::null_mut(), ptr::null_mut()),
        // CU_STREAM_LEGACY
        (application.context.cu_ctx(), ptr::without_provenance_mut(1)),
    ] {
        // SAFETY: the context is live, and outlives the device.
        let device_over = unsafe { Device::from_cuda(context.cast(), stream, Config::default()) }?;
        let variant = Variant { device: device_over, ..packed_variant(device)? };
        let (call, meta) = masked_call(&variant, 9)?;
        let mut external = ExternalCall::new(&application, &variant.device, call, PLAIN)?;
        external.launch(&variant, AttentionMask::varlen(&meta))?;
        external.judge()?;
    }
    // A null context beside a stream that has one.
    let other = Application::new()?;
    let stream = other.stream.cu_stream();
    let device = thread::scope(|scope| {
        let stream = stream as usize;
        // SAFETY: the stream outlives the device. No context is current in the new thread.
        let open = move || unsafe { Device::from_cuda(ptr::null_mut(), stream as *mut c_void, Config::default()) };
        scope.spawn(open).join()
    });
    let device = device.map_err(|_| anyhow!("a thread panicked"))??;
    ensure!(Tensor::zeros(&device, DType::F16, &[3])?.to_vec::<varlen_fa::f16>()? == [varlen_fa::f16::ZERO; 3]);
    ensure!(matches!(device.config().device, DeviceChoice::Cuda(0)));
    Ok(())
}

fn devices_over_one_context(device: &Device) -> Result<()> {
    let application = Application::new()?;
    let other = Application::new()?;
    let variant = application.variant(&packed_variant(device)?)?;
    let beside = other.variant(&variant)?;
    // The library's own device is over the same context, with a stream of its own.
    for foreign in [&beside.device, device] {
        let x = Tensor::zeros(foreign, DType::Bf16, &[2, 6, 4, 16])?;
        let refused = variant.layer().forward(&x, &x, &x, AttentionMask::none()).err();
        let expected = Error::DeviceMismatch {
            argument: "q",
            expected: variant.device.name().to_owned(),
            got: foreign.name().to_owned(),
        };
        ensure!(refused.as_ref() == Some(&expected), "expected {expected:?}, got {refused:?}");
        ensure!(foreign.name() != variant.device.name(), "two devices have one name: {}", foreign.name());
    }
    // What two streams do to the same memory is in order if the application waits in between.
    let (call, meta) = masked_call(&variant, 10)?;
    let mut external = ExternalCall::new(&application, &variant.device, call.clone(), PLAIN)?;
    external.launch(&variant, AttentionMask::varlen(&meta))?;
    let first = external.read()?;
    let mut again = ExternalCall::new(&other, &beside.device, call, PLAIN)?;
    again.launch(&beside, AttentionMask::varlen(&meta))?;
    ensure!(again.read()? == first, "another stream gave other bits");
    again.judge()
}

/// A context of the test's own, made current in this thread.
#[derive(Debug)]
struct OwnContext(CUcontext);

impl OwnContext {
    fn new() -> Result<Self> {
        let _beside = beside_no_capture();
        let device = result::device::get(0).map_err(driver)?;
        // SAFETY: the device comes from the driver; null asks for a plain context.
        Ok(Self(unsafe { result::ctx::create_v4(ptr::null_mut(), 0, device) }.map_err(driver)?))
    }
}

impl Drop for OwnContext {
    fn drop(&mut self) {
        let _beside = beside_no_capture();
        // SAFETY: made in `new`, and destroyed here alone, after everything over it.
        if let Err(error) = unsafe { sys::cuCtxDestroy_v2(self.0) }.result() {
            eprintln!("the test's context is not destroyed: {error:?}");
        }
    }
}

/// Contexts one after another, which may lie at the same address: each has its own kernels.
fn contexts_that_come_and_go(device: &Device) -> Result<()> {
    let call = |device: &Device| -> Result<Vec<varlen_fa::f16>> {
        let ones = Tensor::from_slice(device, &[varlen_fa::f16::ONE; 2 * 6 * 4 * 16], &[2, 6, 4, 16])?;
        let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(6, &[3, 4])?)?;
        let layer = varlen_fa::MaskedAttention::new(device);
        Ok(layer.forward(&ones, &ones, &ones, AttentionMask::varlen(&meta))?.out.to_vec()?)
    };
    let expected = call(device)?;
    for _ in 0..3 {
        let context = OwnContext::new()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(driver)?;
        {
            // SAFETY: both outlive the device.
            let device = unsafe { Device::from_cuda(context.0.cast(), stream.cast(), Config::default()) }?;
            ensure!(call(&device)? == expected, "another context gave another result");
        }
        // SAFETY: made above; the device over it is gone.
        unsafe { result::stream::destroy(stream) }.map_err(driver)?;
    }
    Ok(())
}

fn the_callers_context_stays_current(_: &Device) -> Result<()> {
    let application = Application::new()?;
    let current = || result::ctx::get_current().map_err(driver);
    let own = OwnContext::new()?;
    ensure!(current()? == Some(own.0), "the new context is not current");
    {
        let device = application.device()?;
        ensure!(current()? == Some(own.0), "after from_cuda");
        let zeros = Tensor::zeros(&device, DType::F16, &[3])?;
        ensure!(current()? == Some(own.0), "after a launch");
        drop(zeros);
        ensure!(current()? == Some(own.0), "after a tensor was dropped");
    }
    ensure!(current()? == Some(own.0), "after the device was dropped");
    Ok(())
}

/// The only memory of which two views can be had at once, one of them to write.
fn outputs_over_inputs(device: &Device) -> Result<()> {
    let application = Application::new()?;
    let device = &application.variant(&packed_variant(device)?)?.device.clone();
    let shape = [1, 4, 2, 16];
    let (len, layout) = (4 * 2 * 16, Layout::contiguous(&shape)?);
    let contents = vec![narrow(1.0, DType::F16) as u16; 4 * len];
    let raw = Raw::of(&application, &contents)?;
    let layer = varlen_fa::MaskedAttention::new(device);
    let inputs = [0, 1, 2].map(|input| raw.on(device, 2 * len * input));
    let [q, k, v] = inputs;
    let (q, k, v) = (q?, k?, v?);
    let (q, k, v) = (q.view(DType::F16, layout), k.view(DType::F16, layout), v.view(DType::F16, layout));
    for (start, overlapped) in
        [(0, Some("q")), (len - 8, Some("q")), (len, Some("k")), (2 * len + 8, Some("v")), (3 * len - 8, Some("v"))]
    {
        let mut out = raw.on(device, 2 * start)?;
        let out = out.view_mut(DType::F16, layout);
        let refused = layer.forward_into(q, k, v, AttentionMask::none(), out).err();
        let found = matches!(&refused, Some(Error::Overlap { argument: "out", other }) if Some(*other) == overlapped);
        ensure!(found, "an output at element {start}: expected an overlap with {overlapped:?}, got {refused:?}");
        ensure!(raw.read()? == contents, "a refused call wrote");
    }
    // The bias, and an output right behind the last input, which shares nothing with it.
    let mut out = raw.on(device, 2 * 3 * len)?;
    let bias = raw.on(device, 2 * 3 * len)?;
    let bias_view = bias.view(DType::F16, Layout::contiguous(&[4])?);
    let mask = AttentionMask::bias(bias_view);
    let refused = layer.forward_into(q, k, v, mask, out.view_mut(DType::F16, layout)).err();
    ensure!(matches!(refused, Some(Error::Overlap { argument: "out", other: "bias" })), "{refused:?}");
    layer.forward_into(q, k, v, AttentionMask::none(), out.view_mut(DType::F16, layout))?;
    ensure!(raw.read()? == contents, "means of ones");
    Ok(())
}

/// An element beside a multiple of its size is refused; so is an output whose rows lie beside words, by an address.
fn elements_and_rows_beside_their_places(device: &Device) -> Result<()> {
    let application = Application::new()?;
    let device = &application.variant(&packed_variant(device)?)?.device.clone();
    let (shape, len) = ([1, 4, 2, 16], 4 * 2 * 16);
    let layout = Layout::contiguous(&shape)?;
    let raw = Raw::of(&application, &vec![narrow(1.0, DType::F16) as u16; 3 * len])?;
    let (plain, odd) = (raw.on(device, 0)?, raw.on(device, 1)?);
    let layer = varlen_fa::MaskedAttention::new(device);
    let plain = plain.view(DType::F16, layout);
    let misaligned = |argument, expected, got| Error::Misaligned { argument, expected, got };

    let mut out = raw.on(device, 4 * len)?;
    let odd = odd.view(DType::F16, layout);
    let refused = layer.forward_into(odd, plain, plain, AttentionMask::none(), out.view_mut(DType::F16, layout)).err();
    ensure!(refused == Some(misaligned("q", 2, raw.address + 1)), "{refused:?}");
    let bias = raw.on(device, 2)?;
    let mask = AttentionMask::bias(bias.view(DType::F32, Layout::contiguous(&[4])?));
    let refused = layer.forward_into(plain, plain, plain, mask, out.view_mut(DType::F16, layout)).err();
    ensure!(refused == Some(misaligned("bias", 4, raw.address + 2)), "{refused:?}");

    let start = 4 * len - 6;
    let mut out = raw.on(device, start)?;
    let refused =
        layer.forward_into(plain, plain, plain, AttentionMask::none(), out.view_mut(DType::F16, layout)).err();
    ensure!(refused == Some(misaligned("out", 16, raw.address + start as u64)), "{refused:?}");
    // An offset that makes up for it.
    let made_up = Layout::strided(&shape, &[4 * 32, 32, 16, 1], 3)?;
    layer.forward_into(plain, plain, plain, AttentionMask::none(), out.view_mut(DType::F16, made_up))?;
    device.synchronize()?;
    Ok(())
}

fn managed_and_page_locked_memory(_: &Device) -> Result<()> {
    let application = Application::new()?;
    let device = application.device()?;
    let _beside = beside_no_capture();
    application.context.bind_to_thread().map_err(driver)?;
    let bytes: Vec<u8> = (0..100_u8).collect();
    // SAFETY: nothing is assumed of the contents.
    let managed = unsafe { result::malloc_managed(100, CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL) }.map_err(driver)?;
    // SAFETY: as above. CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP
    let locked = unsafe { result::malloc_host(100, 3) }.map_err(driver)?;
    for address in [managed, locked as u64] {
        // SAFETY: allocated above, used by this device alone, and freed below.
        let mut memory = unsafe { DeviceMemory::from_cuda(&device, address, 100) }?;
        memory.write(&bytes)?;
        let mut read = [0_u8; 100];
        memory.read(&mut read)?;
        ensure!(read[..] == bytes[..], "memory at {address:#x} does not keep what is written");
    }
    device.synchronize()?;
    // SAFETY: allocated above; nothing uses it any more.
    unsafe { result::free_sync(managed) }.map_err(driver)?;
    // SAFETY: as above.
    unsafe { result::free_host(locked) }.map_err(driver)?;
    Ok(())
}

fn bad_handles(_: &Device) -> Result<()> {
    let application = Application::new()?;
    let (context, stream) = (application.context.cu_ctx() as usize, application.stream.cu_stream() as usize);
    let other = OwnContext::new()?;
    let refused_of = |context: usize, stream: usize| -> Option<Error> {
        // SAFETY: null, live, or values that are refused before the driver is asked about them.
        unsafe { Device::from_cuda(context as *mut c_void, stream as *mut c_void, Config::default()) }.err()
    };
    for (context, stream, argument) in [
        (16, stream, "context"),
        (context + 1, stream, "context"),
        (context, 16, "stream"),
        (context, stream + 4, "stream"),
        // CU_STREAM_PER_THREAD
        (context, 2, "stream"),
        // A stream of another context.
        (other.0 as usize, stream, "stream"),
    ] {
        let refused = refused_of(context, stream);
        ensure!(
            matches!(&refused, Some(Error::Handle { argument: got, .. }) if *got == argument),
            "{context:#x}, {stream:#x}: expected a refused `{argument}`, got {refused:?}"
        );
    }
    // Nothing to take a context from.
    let refused = thread::scope(|scope| scope.spawn(|| refused_of(0, 0)).join());
    let refused = refused.map_err(|_| anyhow!("a thread panicked"))?;
    ensure!(matches!(&refused, Some(Error::Handle { argument: "context", .. })), "{refused:?}");
    Ok(())
}

fn bad_memory(_: &Device) -> Result<()> {
    const SIZE: usize = 4 << 20;
    let application = Application::new()?;
    let device = application.device()?;
    let raw = Raw::alloc(&application, SIZE)?;
    let freed = Raw::alloc(&application, SIZE)?.address;
    let host = vec![0_u8; SIZE];
    let refused_of = |device: &Device, address: u64, bytes: u64| -> Option<Error> {
        // SAFETY: the memory is not used.
        unsafe { DeviceMemory::from_cuda(device, address, bytes) }.err()
    };
    for (what, address, bytes, argument) in [
        ("null", 0, 1, "address"),
        ("past the last address", raw.address, u64::MAX, "bytes"),
        ("host memory", host.as_ptr() as u64, SIZE as u64, "address"),
        ("freed memory", freed, SIZE as u64, "address"),
        ("far past its end", raw.address, 1 << 40, "bytes"),
        ("far past its end from its middle", raw.address + 1024, 1 << 40, "bytes"),
    ] {
        let refused = refused_of(&device, address, bytes);
        ensure!(
            matches!(&refused, Some(Error::Handle { argument: got, .. }) if *got == argument),
            "{what}: expected a refused `{argument}`, got {refused:?}"
        );
    }
    ensure!(refused_of(&device, raw.address, SIZE as u64).is_none(), "all of it");
    ensure!(refused_of(&device, raw.address + 1, SIZE as u64 - 1).is_none(), "from the second byte on");
    ensure!(refused_of(&device, 0, 0).is_none(), "no memory at all");
    let cpu = Device::with_config(Config::default().with_device(DeviceChoice::Cpu))?;
    let refused = refused_of(&cpu, raw.address, SIZE as u64);
    ensure!(matches!(refused, Some(Error::DeviceMismatch { argument: "memory", .. })), "{refused:?}");
    Ok(())
}
