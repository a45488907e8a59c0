//! What a call costs the host on a CUDA device: the driver's own launch of one kernel, the layer in Rust, and the same through C
//! over raw pointers, by turns in one process. Calls are so small that the GPU never holds up the host.
//!
//! `cargo bench -p varlen-fa-capi --bench launch_cost`; VARLEN_FA_LIBRARY names a built C library where cargo is not at hand.

#[allow(dead_code, reason = "the tests need the rest")]
#[path = "../tests/library/mod.rs"]
mod library;
#[allow(dead_code, non_camel_case_types, reason = "the bench needs some of the header's types, by their C names")]
#[path = "../src/types.rs"]
mod types;

use std::env;
use std::ffi::c_void;
use std::mem::{MaybeUninit, zeroed};
use std::path::PathBuf;
use std::ptr::{null, null_mut};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::{CudaContext, CudaStream, DevicePtrMut, DriverError, result, sys};
use varlen::{
    AttentionMask, Config, DType, Device, DeviceMemory, Kernel, KeyMask, Layout, MaskedAttention, Path, VarlenMeta,
};

use self::library::Library;
use self::types::{
    varlen_fa_attention_mask, varlen_fa_attention_options, varlen_fa_device, varlen_fa_dtype, varlen_fa_key_mask,
    varlen_fa_mask_kind, varlen_fa_memory, varlen_fa_meta, varlen_fa_plan, varlen_fa_status, varlen_fa_tensor,
};

type DeviceOpenCuda = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut *mut varlen_fa_device) -> varlen_fa_status;
type DeviceFree = unsafe extern "C" fn(*mut varlen_fa_device) -> varlen_fa_status;
type MaskFromLengths = unsafe extern "C" fn(*const u64, u64, u64, *mut *mut varlen_fa_key_mask) -> varlen_fa_status;
type MetaCreate = unsafe extern "C" fn(*const varlen_fa_key_mask, *mut *mut varlen_fa_meta) -> varlen_fa_status;
type Forward = unsafe extern "C" fn(
    *const varlen_fa_device,
    *const varlen_fa_attention_options,
    *const varlen_fa_tensor,
    *const varlen_fa_tensor,
    *const varlen_fa_tensor,
    *const varlen_fa_attention_mask,
    *const varlen_fa_tensor,
    *mut varlen_fa_plan,
) -> varlen_fa_status;

/// One tile of one head.
const SHAPE: [usize; 4] = [1, 64, 1, 64];
const VALID: usize = 40;
const ELEMENTS: usize = 64 * 64;
/// Fewer than a stream queues before it makes the host wait.
const CALLS: u32 = 200;
const ROUNDS: usize = 41;

static KERNELS: &[u8] = include_bytes!("../../kernels/prebuilt/attention_sm80.fatbin");

fn main() -> Result<()> {
    // SAFETY: loads the NVIDIA driver, if there is one.
    if !unsafe { sys::is_culib_present() } || CudaContext::device_count().is_ok_and(|count| count == 0) {
        println!("skipped: there is no NVIDIA GPU, or no driver");
        return Ok(());
    }
    let context = CudaContext::new(0).map_err(driver)?;
    let stream = context.new_stream().map_err(driver)?;
    // One buffer for q, k and v, and one for the output.
    let mut input = stream.clone_htod(&vec![0x3c00_u16; ELEMENTS]).map_err(driver)?;
    let mut output = stream.alloc_zeros::<u16>(ELEMENTS).map_err(driver)?;
    let (from, to) = (input.device_ptr_mut(&stream).0, output.device_ptr_mut(&stream).0);
    let bytes = 2 * ELEMENTS as u64;

    let direct = direct_launch(&context, &stream, from, to)?;
    let (raw_context, raw_stream) = (context.cu_ctx().cast(), stream.cu_stream().cast());
    // SAFETY: both live to the end of this function, past everything made with the device.
    let device = unsafe { Device::from_cuda(raw_context, raw_stream, Config::default()) }?;
    // SAFETY: memory of this context that lives as long, and is used on this stream alone.
    let from_memory = unsafe { DeviceMemory::from_cuda(&device, from, bytes) }?;
    // SAFETY: as above.
    let mut to_memory = unsafe { DeviceMemory::from_cuda(&device, to, bytes) }?;
    let layout = Layout::contiguous(&SHAPE)?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(SHAPE[1], &[VALID])?)?;
    let layer = MaskedAttention::new(&device);
    let mut rust = |layer: &MaskedAttention, mask: AttentionMask<'_>| -> Result<()> {
        let x = from_memory.view(DType::F16, layout);
        layer.forward_into(x, x, x, mask, to_memory.view_mut(DType::F16, layout))?;
        Ok(())
    };

    let path = match env::var_os("VARLEN_FA_LIBRARY") {
        Some(path) => PathBuf::from(path),
        None => Library::built()?.shared_library,
    };
    // SAFETY: the C library; loading it runs nothing but Rust's own start-up.
    let loaded = unsafe { libloading::Library::new(&path) }.with_context(|| path.display().to_string())?;
    // SAFETY: the types are those of the header, as are the ones below.
    let device_open_cuda = *unsafe { loaded.get::<DeviceOpenCuda>("varlen_fa_device_open_cuda") }?;
    // SAFETY: as above.
    let device_free = *unsafe { loaded.get::<DeviceFree>("varlen_fa_device_free") }?;
    // SAFETY: as above.
    let mask_from_lengths = *unsafe { loaded.get::<MaskFromLengths>("varlen_fa_key_mask_from_lengths") }?;
    // SAFETY: as above.
    let meta_create = *unsafe { loaded.get::<MetaCreate>("varlen_fa_meta_create") }?;
    // SAFETY: as above.
    let forward = *unsafe { loaded.get::<Forward>("varlen_fa_forward") }?;
    let (mut device_c, mut mask_c, mut meta_c) = (null_mut(), null_mut(), null_mut());
    // SAFETY: live handles and places for handles, and one length; as below.
    ok(unsafe { device_open_cuda(raw_context, raw_stream, &raw mut device_c) })?;
    // SAFETY: as above.
    ok(unsafe { mask_from_lengths([VALID as u64].as_ptr(), 1, SHAPE[1] as u64, &raw mut mask_c) })?;
    // SAFETY: as above.
    ok(unsafe { meta_create(mask_c, &raw mut meta_c) })?;
    // SAFETY: zeros are what the header starts from.
    let mut varlen_c: varlen_fa_attention_mask = unsafe { zeroed() };
    varlen_c.kind = MaybeUninit::new(varlen_fa_mask_kind::Varlen);
    varlen_c.query_meta = meta_c;
    let (q_c, o_c) = (descriptor(from), descriptor(to));
    let through_c = || {
        let (q, out) = (&raw const q_c, &raw const o_c);
        // SAFETY: descriptors of memory that lives and that nobody else uses meanwhile.
        ok(unsafe { forward(device_c, null(), q, q, q, &raw const varlen_c, out, null_mut()) })
    };

    let dense_sm80 = layer.clone().with_kernel(Kernel::CudaSm80);
    let packed_sm80 = dense_sm80.clone().with_path(Path::Packed);
    let mut rows: Vec<(&str, Vec<f64>)> = [
        "direct launch of the sm80 kernel",
        "Rust, dense, sm80",
        "Rust, dense",
        "Rust, varlen as planned",
        "Rust, varlen packed, sm80",
        "C, varlen as planned",
    ]
    .map(|name| (name, vec![]))
    .into();
    for _ in 0..=ROUNDS {
        let times = [
            microseconds(&stream, || direct(&stream))?,
            microseconds(&stream, || rust(&dense_sm80, AttentionMask::None))?,
            microseconds(&stream, || rust(&layer, AttentionMask::None))?,
            microseconds(&stream, || rust(&layer, AttentionMask::varlen(&meta)))?,
            microseconds(&stream, || rust(&packed_sm80, AttentionMask::varlen(&meta)))?,
            microseconds(&stream, through_c)?,
        ];
        rows.iter_mut().zip(times).for_each(|((_, row), time)| row.push(time));
    }
    let planned = layer.forward_into(
        from_memory.view(DType::F16, layout),
        from_memory.view(DType::F16, layout),
        from_memory.view(DType::F16, layout),
        AttentionMask::varlen(&meta),
        to_memory.view_mut(DType::F16, layout),
    )?;
    let got = stream.clone_dtoh(&output).map_err(driver)?;
    let (valid, masked) = got.split_at(VALID * SHAPE[3]);
    ensure!(valid.iter().all(|&bits| bits == 0x3c00) && masked.iter().all(|&bits| bits == 0), "a wrong result");

    println!("{}; [B, S, H, D] = {SHAPE:?} f16, {VALID} tokens valid; planned: {planned}", device.name());
    println!("host time of one call, the median of {ROUNDS} rounds of {CALLS}");
    for (name, times) in &mut rows {
        // The first round warms up.
        times.remove(0);
        times.sort_unstable_by(f64::total_cmp);
        println!("{name:<34} {:>7.2} µs   (least {:.2})", times[ROUNDS / 2], times[0]);
    }
    // SAFETY: the handle is live, and this is its last use.
    ok(unsafe { device_free(device_c) })
}

/// The sm80 kernel on one tile, launched as the driver is called.
fn direct_launch(
    context: &Arc<CudaContext>,
    stream: &Arc<CudaStream>,
    from: u64,
    to: u64,
) -> Result<impl Fn(&Arc<CudaStream>) -> Result<()>> {
    context.bind_to_thread().map_err(driver)?;
    // SAFETY: a whole fatbin, aligned as a vector of words is; the module is never unloaded.
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
        // SAFETY: the struct that the kernel takes, with memory of one tile each.
        let launched = unsafe {
            let stream = stream.cu_stream();
            result::launch_kernel(function, (1, 1, 1), (128, 1, 1), shared_bytes as u32, stream, &mut arguments)
        };
        launched.map_err(driver)
    };
    launch(stream)?;
    Ok(launch)
}

/// A copy that starts where the driver wants it.
fn aligned(image: &[u8]) -> Vec<u128> {
    let mut words = vec![0_u128; image.len().div_ceil(size_of::<u128>())];
    for (word, bytes) in words.iter_mut().zip(image.chunks(size_of::<u128>())) {
        let mut whole = [0; size_of::<u128>()];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u128::from_ne_bytes(whole);
    }
    words
}

fn descriptor(address: u64) -> varlen_fa_tensor {
    varlen_fa_tensor {
        data: address as *mut c_void,
        bytes: 2 * ELEMENTS as u64,
        dtype: MaybeUninit::new(varlen_fa_dtype::F16),
        memory: MaybeUninit::new(varlen_fa_memory::Cuda),
        rank: 4,
        reserved_word: 0,
        shape: SHAPE.map(|size| size as u64),
        strides: [ELEMENTS as i64, 64, 64, 1],
        reserved: [0; 2],
    }
}

fn microseconds(stream: &CudaStream, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    stream.synchronize().map_err(driver)?;
    let started = Instant::now();
    for _ in 0..CALLS {
        call()?;
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS))
}

fn ok(status: varlen_fa_status) -> Result<()> {
    ensure!(status == varlen_fa_status::Ok, "got {status:?}");
    Ok(())
}

fn driver(error: DriverError) -> anyhow::Error {
    anyhow!("the CUDA driver: {error:?}")
}
