//! The host time of one call on a CUDA device: the driver's own launch of one kernel, the layer in
//! Rust, and the same through C over raw pointers, in turns in one process. Calls are so small that
//! the host never waits for the GPU.
//!
//! `cargo bench -p varlen-fa-capi --bench launch_cost`. `VARLEN_FA_LIBRARY` names a built C library
//! for machines without cargo.

mod c_library;

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, anyhow, ensure};
use cudarc::driver::{CudaContext, CudaStream, DevicePtrMut, DriverError, result, sys};
use varlen::{
    AttentionMask, Config, DType, Device, DeviceMemory, Kernel, KeyMask, Layout, MaskedAttention, Path, Plan,
    VarlenMeta,
};

use self::c_library::types::{
    varlen_fa_attention_mask, varlen_fa_device, varlen_fa_dtype, varlen_fa_memory, varlen_fa_tensor,
};
use self::c_library::{CLibrary, tensor};

/// One tile of one head.
const SHAPE: [usize; 4] = [1, 64, 1, 64];
const VALID: usize = 40;
const ELEMENTS: usize = 64 * 64;
const ONE: u16 = 0x3c00;
/// Fewer than fill a stream's queue, where the host would wait.
const CALLS: u32 = 200;
const ROUNDS: usize = 41;

static KERNELS: &[u8] = include_bytes!("../../kernels/prebuilt/varlen-fa-kernels-sm80/attention_sm80.fatbin");

fn main() -> Result<()> {
    // SAFETY: loads the NVIDIA driver, if there is one.
    if !unsafe { sys::is_culib_present() } || CudaContext::device_count().is_ok_and(|count| count == 0) {
        println!("skipped: there is no NVIDIA GPU, or no driver");
        return Ok(());
    }
    let context = CudaContext::new(0).map_err(driver)?;
    let stream = context.new_stream().map_err(driver)?;
    // One buffer for q, k and v, and one for the output.
    let mut input = stream.clone_htod(&vec![ONE; ELEMENTS]).map_err(driver)?;
    let mut output = stream.alloc_zeros::<u16>(ELEMENTS).map_err(driver)?;
    let (from, to) = (input.device_ptr_mut(&stream).0, output.device_ptr_mut(&stream).0);

    let direct = direct_launch(&context, &stream, from, to)?;
    // SAFETY: context, stream and buffers live to the end of this function.
    let mut rust = unsafe { ThroughRust::new(&context, &stream, from, to) }?;
    // SAFETY: as above.
    let c = unsafe { ThroughC::new(&context, &stream, from, to) }?;
    let mut rows = measure(&stream, &direct, &mut rust, &c)?;
    let planned = rust.call(&rust.layer.clone(), true)?;
    let got = stream.clone_dtoh(&output).map_err(driver)?;
    let (valid, masked) = got.split_at(VALID * SHAPE[3]);
    ensure!(valid.iter().all(|&bits| bits == ONE) && masked.iter().all(|&bits| bits == 0), "a wrong result");

    println!("{}; [B, S, H, D] = {SHAPE:?} f16, {VALID} tokens valid; planned: {planned}", rust.device.name());
    print_medians(&mut rows);
    c.library.free_device(c.device)
}

/// Times of one kind of call, in microseconds.
type Row = (&'static str, Vec<f64>);

fn measure(
    stream: &Arc<CudaStream>,
    direct: &impl Fn(&Arc<CudaStream>) -> Result<()>,
    rust: &mut ThroughRust,
    c: &ThroughC,
) -> Result<Vec<Row>> {
    let planned = rust.layer.clone();
    let dense_sm80 = planned.clone().with_kernel(Kernel::CudaSm80);
    let packed_sm80 = dense_sm80.clone().with_path(Path::Packed);
    let mut rows: Vec<Row> = [
        "direct launch of the sm80 kernel",
        "Rust, dense, sm80",
        "Rust, dense",
        "Rust, varlen as planned",
        "Rust, varlen packed, sm80",
        "C, varlen as planned",
    ]
    .map(|name| (name, vec![]))
    .into();
    // The first round warms up.
    for round in 0..=ROUNDS {
        let times = [
            microseconds(stream, || direct(stream))?,
            microseconds(stream, || rust.call(&dense_sm80, false).map(drop))?,
            microseconds(stream, || rust.call(&planned, false).map(drop))?,
            microseconds(stream, || rust.call(&planned, true).map(drop))?,
            microseconds(stream, || rust.call(&packed_sm80, true).map(drop))?,
            microseconds(stream, || c.call())?,
        ];
        if round > 0 {
            rows.iter_mut().zip(times).for_each(|((_, row), time)| row.push(time));
        }
    }
    Ok(rows)
}

fn print_medians(rows: &mut [Row]) {
    println!("host time of one call, the median of {ROUNDS} rounds of {CALLS}");
    for (name, times) in rows {
        times.sort_unstable_by(f64::total_cmp);
        println!("{name:<34} {:>7.2} µs   (least {:.2})", times[ROUNDS / 2], times[0]);
    }
}

/// The layer in Rust, over the external context, stream and memory.
struct ThroughRust {
    device: Device,
    layer: MaskedAttention,
    meta: VarlenMeta,
    layout: Layout,
    from: DeviceMemory,
    to: DeviceMemory,
}

impl ThroughRust {
    /// # Safety
    /// Context, stream and memory outlive the result, and the memory is used on this stream only.
    unsafe fn new(context: &CudaContext, stream: &CudaStream, from: u64, to: u64) -> Result<Self> {
        let (context, stream) = (context.cu_ctx().cast(), stream.cu_stream().cast());
        // SAFETY: by this function's contract.
        let device = unsafe { Device::from_cuda(context, stream, Config::default()) }?;
        // SAFETY: by this function's contract.
        let from = unsafe { DeviceMemory::from_cuda(&device, from, 2 * ELEMENTS as u64) }?;
        // SAFETY: by this function's contract.
        let to = unsafe { DeviceMemory::from_cuda(&device, to, 2 * ELEMENTS as u64) }?;
        let layer = MaskedAttention::new(&device);
        let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(SHAPE[1], &[VALID])?)?;
        Ok(Self { device, layer, meta, layout: Layout::contiguous(&SHAPE)?, from, to })
    }

    fn call(&mut self, layer: &MaskedAttention, is_varlen: bool) -> Result<Plan> {
        let mask = if is_varlen { AttentionMask::varlen(&self.meta) } else { AttentionMask::none() };
        let x = self.from.view(DType::F16, self.layout);
        Ok(layer.forward_into(x, x, x, mask, self.to.view_mut(DType::F16, self.layout))?)
    }
}

/// The same through C.
struct ThroughC {
    library: CLibrary,
    device: *mut varlen_fa_device,
    mask: varlen_fa_attention_mask,
    from: varlen_fa_tensor,
    to: varlen_fa_tensor,
}

impl ThroughC {
    /// # Safety
    /// As [`ThroughRust::new`].
    unsafe fn new(context: &CudaContext, stream: &CudaStream, from: u64, to: u64) -> Result<Self> {
        let library = CLibrary::load()?;
        // SAFETY: by this function's contract.
        let device = unsafe { library.open_cuda(context.cu_ctx().cast(), stream.cu_stream().cast()) }?;
        let mask = library.varlen_mask(VALID, SHAPE[1])?;
        let describe =
            |address: u64| tensor(address as *mut c_void, varlen_fa_dtype::F16, 2, varlen_fa_memory::Cuda, SHAPE);
        Ok(Self { library, device, mask, from: describe(from), to: describe(to) })
    }

    fn call(&self) -> Result<()> {
        // SAFETY: by the contract of `new`, the memory is valid, and used on this stream only.
        unsafe { self.library.forward(self.device, &self.from, &self.mask, &self.to, None) }
    }
}

/// The sm80 kernel on one tile, launched by a plain call of the driver.
fn direct_launch(
    context: &Arc<CudaContext>,
    stream: &Arc<CudaStream>,
    from: u64,
    to: u64,
) -> Result<impl Fn(&Arc<CudaStream>) -> Result<()>> {
    context.bind_to_thread().map_err(driver)?;
    // SAFETY: a whole fatbin, aligned to 16 bytes; the module is never unloaded.
    let module = unsafe { result::module::load_data(aligned(KERNELS).as_ptr().cast()) }.map_err(driver)?;
    // SAFETY: the module was just loaded.
    let function = unsafe { result::module::get_function(module, c"attention_sm80_f16_d64".into()) }.map_err(driver)?;
    // The query tile and two stages of keys and values.
    let shared_bytes = (128 + 4 * 64) * 64 * 2;
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function was just found.
    unsafe { result::function::set_function_attribute(function, attribute, shared_bytes) }.map_err(driver)?;
    // AttentionParams of kernels/common/params.cuh, in words of eight bytes.
    let mut params = [0_u64; 32];
    params[..4].copy_from_slice(&[from, from, from, to]);
    for tensor in 0..4 {
        params[11 + 3 * tensor..][..3].copy_from_slice(&[ELEMENTS as u64, 64, 64]);
    }
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    params[28] = pair(64, 64);
    params[29] = pair(1, 64);
    params[31] = pair((0.125 * std::f32::consts::LOG2_E).to_bits(), 0);
    let launch = move |stream: &Arc<CudaStream>| {
        let mut arguments = [(&raw const params).cast_mut().cast::<c_void>()];
        // SAFETY: the struct that the kernel takes, whose tensors are one tile each.
        let launched = unsafe {
            let stream = stream.cu_stream();
            result::launch_kernel(function, (1, 1, 1), (128, 1, 1), shared_bytes as u32, stream, &mut arguments)
        };
        launched.map_err(driver)
    };
    launch(stream)?;
    Ok(launch)
}

/// A copy with the alignment that the driver wants.
fn aligned(image: &[u8]) -> Vec<u128> {
    let mut words = vec![0_u128; image.len().div_ceil(size_of::<u128>())];
    for (word, bytes) in words.iter_mut().zip(image.chunks(size_of::<u128>())) {
        let mut whole = [0; size_of::<u128>()];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u128::from_ne_bytes(whole);
    }
    words
}

fn microseconds(stream: &CudaStream, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    stream.synchronize().map_err(driver)?;
    let started = Instant::now();
    for _ in 0..CALLS {
        call()?;
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS))
}

fn driver(error: DriverError) -> anyhow::Error {
    anyhow!("the CUDA driver: {error:?}")
}
