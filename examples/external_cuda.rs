//! Attention on an application's own CUDA stream and memory, directly and as part of a CUDA graph.
//!
//! The application here is written with cudarc, whose context, stream and memory stay its own: nothing is copied to use them,
//! and nothing waits until the result is read. Any library that gives raw driver handles does as well.

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, DevicePtrMut, DriverError, sys};
use varlen_fa::{
    AttentionMask, Config, DType, Device, DeviceChoice, DeviceMemory, KeyMask, Layout, MaskedAttention, VarlenMeta,
    bf16,
};

const BATCH: usize = 2;
const SEQ: usize = 6;
const HEADS: usize = 4;
const DIM: usize = 64;

/// Attention on an application's own CUDA stream and memory, directly and in a CUDA graph. Skipped,
/// with the reason, where there is no NVIDIA GPU.
#[derive(Debug, Parser)]
#[command(name = "external_cuda", version)]
struct Arguments {}

fn main() -> Result<()> {
    // Before the driver is looked for: help needs none.
    Arguments::parse();
    // SAFETY: loads the NVIDIA driver, if there is one.
    if !unsafe { sys::is_culib_present() } {
        println!("skipped: the NVIDIA driver is not installed");
        return Ok(());
    }
    match CudaContext::device_count() {
        Ok(count) if count > 0 => {}
        Ok(_) => {
            println!("skipped: there is no NVIDIA GPU");
            return Ok(());
        }
        Err(error) => {
            println!("skipped: the NVIDIA driver does not start: {error:?}");
            return Ok(());
        }
    }

    // The application: a context, a stream, a fused projection [B, S, 3H, D], and room for the output [B, S, H, D].
    let context = CudaContext::new(0).map_err(driver)?;
    let stream = context.new_stream().map_err(driver)?;
    let projection: Vec<u16> = (0..BATCH * SEQ * 3 * HEADS * DIM).map(|i| value(i).to_bits()).collect();
    let mut qkv = stream.clone_htod(&projection).map_err(driver)?;
    let mut out = stream.alloc_zeros::<u16>(BATCH * SEQ * HEADS * DIM).map_err(driver)?;

    // A device on that stream. Everything made with it is dropped before stream and context, since it is declared after them.
    let (raw_context, raw_stream) = (context.cu_ctx().cast(), stream.cu_stream().cast());
    // SAFETY: both handles are live, and outlive everything made with the device.
    let device = unsafe { Device::from_cuda(raw_context, raw_stream, Config::from_env_for(DeviceChoice::Cuda(0))?) }?;
    println!("device     {}", device.name());

    // The application's memory, by its addresses. All its uses are on one stream, so none needs an event.
    let (bytes, address) = (qkv.num_bytes() as u64, qkv.device_ptr_mut(&stream).0);
    // SAFETY: the memory outlives the device, and is used on its stream alone.
    let qkv_memory = unsafe { DeviceMemory::from_cuda(&device, address, bytes) }?;
    let (bytes, address) = (out.num_bytes() as u64, out.device_ptr_mut(&stream).0);
    // SAFETY: as above.
    let mut out_memory = unsafe { DeviceMemory::from_cuda(&device, address, bytes) }?;

    // Once per request. The copy on the device would be made by the first call, too.
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(SEQ, &[SEQ, 2])?)?;
    meta.upload_to(&device)?;

    // In every layer and step: views of the memory, a launch, no copy, no wait.
    let attention = MaskedAttention::new(&device);
    let (fused, padded) =
        (Layout::contiguous(&[BATCH, SEQ, 3 * HEADS, DIM])?, Layout::contiguous(&[BATCH, SEQ, HEADS, DIM])?);
    let mut attend = || {
        let part = |i: usize| qkv_memory.view(DType::Bf16, fused).slice(2, i * HEADS..(i + 1) * HEADS);
        let into = out_memory.view_mut(DType::Bf16, padded);
        attention.forward_into(part(0)?, part(1)?, part(2)?, AttentionMask::varlen(&meta), into)
    };
    println!("varlen     {}", attend()?);
    let direct = stream.clone_dtoh(&out).map_err(driver)?;
    check(&direct)?;

    // The same call in a graph, which then runs on whatever the memory holds.
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(driver)?;
    let captured = attend();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).map_err(driver)?;
    captured?;
    let graph = graph.context("the capture gave no graph")?;
    stream.memset_zeros(&mut out).map_err(driver)?;
    graph.launch().map_err(driver)?;
    ensure!(stream.clone_dtoh(&out).map_err(driver)? == direct, "the graph gave another result than the direct call");
    println!("graph      the same bits as the direct call");
    Ok(())
}

/// Some number for each element; v has the token's own number in every place, so that means are easy to tell.
fn value(i: usize) -> bf16 {
    let (token, head) = (i / (3 * HEADS * DIM), i / DIM % (3 * HEADS));
    if head >= 2 * HEADS { bf16::from_f32(token as f32) } else { bf16::from_f32(0.0) }
}

/// With scores of zero, every valid row is the mean of its batch row's valid values; masked rows are zero.
fn check(out: &[u16]) -> Result<()> {
    for (token, row) in out.chunks(HEADS * DIM).enumerate() {
        let expected = match (token / SEQ, token % SEQ) {
            (0, _) => 2.5,
            (_, 0 | 1) => 6.5,
            _ => 0.0,
        };
        let got = row.iter().find(|&&bits| (bf16::from_bits(bits).to_f32() - expected).abs() > 0.04);
        ensure!(got.is_none(), "token {token}: expected {expected}, got {:?}", got.map(|&bits| bf16::from_bits(bits)));
    }
    println!("check      rows are the means of the valid values, masked rows zero");
    Ok(())
}

fn driver(error: DriverError) -> anyhow::Error {
    anyhow!("the CUDA driver: {error:?}")
}
