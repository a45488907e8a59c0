//! What a call through C costs more than the same call in Rust: the smallest attention on the CPU device, in one process, by turns.

#[allow(dead_code, reason = "the tests need the rest")]
#[path = "../tests/library/mod.rs"]
mod library;
#[allow(dead_code, non_camel_case_types, reason = "the bench needs some of the header's types, by their C names")]
#[path = "../src/types.rs"]
mod types;

use std::ffi::c_void;
use std::mem::{MaybeUninit, zeroed};
use std::ptr::{null, null_mut};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use varlen::{AttentionMask, Device, DeviceChoice, KeyMask, MaskedAttention, TensorView, TensorViewMut, VarlenMeta};

use self::library::Library;
use self::types::{
    varlen_fa_attention_mask, varlen_fa_attention_options, varlen_fa_device, varlen_fa_device_kind, varlen_fa_dtype,
    varlen_fa_key_mask, varlen_fa_mask_kind, varlen_fa_memory, varlen_fa_meta, varlen_fa_plan, varlen_fa_status,
    varlen_fa_tensor,
};

type DeviceOpen = unsafe extern "C" fn(varlen_fa_device_kind, u32, *mut *mut varlen_fa_device) -> varlen_fa_status;
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

const SHAPE: [usize; 4] = [1, 2, 1, 8];
const CALLS: u32 = 2_000;
const ROUNDS: usize = 21;

fn main() -> Result<()> {
    let library = Library::built()?;
    // SAFETY: the library that was just built; loading it runs nothing but Rust's own start-up.
    let loaded = unsafe { libloading::Library::new(&library.shared_library) }?;
    // SAFETY: the types are those of the header, as are the ones below.
    let device_open = *unsafe { loaded.get::<DeviceOpen>("varlen_fa_device_open") }?;
    // SAFETY: as above.
    let mask_from_lengths = *unsafe { loaded.get::<MaskFromLengths>("varlen_fa_key_mask_from_lengths") }?;
    // SAFETY: as above.
    let meta_create = *unsafe { loaded.get::<MetaCreate>("varlen_fa_meta_create") }?;
    // SAFETY: as above.
    let forward = *unsafe { loaded.get::<Forward>("varlen_fa_forward") }?;

    let x: Vec<f32> = (0..16).map(|at| at as f32 / 16.0).collect();
    let (mut out_c, mut out_rust) = (vec![0.0_f32; 16], vec![0.0_f32; 16]);

    let (mut device_c, mut mask_c, mut meta_c) = (null_mut(), null_mut(), null_mut());
    // SAFETY: places for handles, and one length; as below.
    ok(unsafe { device_open(varlen_fa_device_kind::Cpu, 0, &raw mut device_c) })?;
    // SAFETY: as above.
    ok(unsafe { mask_from_lengths([1].as_ptr(), 1, 2, &raw mut mask_c) })?;
    // SAFETY: as above.
    ok(unsafe { meta_create(mask_c, &raw mut meta_c) })?;
    let (q_c, o_c) = (descriptor(x.as_ptr().cast_mut()), descriptor(out_c.as_mut_ptr()));
    // SAFETY: zeros are what the header starts from.
    let mut varlen_c: varlen_fa_attention_mask = unsafe { zeroed() };
    varlen_c.kind = MaybeUninit::new(varlen_fa_mask_kind::Varlen);
    varlen_c.query_meta = meta_c;
    let through_c = |plan: *mut varlen_fa_plan| {
        let (q, out) = (&raw const q_c, &raw const o_c);
        // SAFETY: descriptors of vectors that live, of which nobody else uses the output.
        ok(unsafe { forward(device_c, null(), q, q, q, &raw const varlen_c, out, plan) })
    };

    let device = Device::new(DeviceChoice::Cpu)?;
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(2, &[1])?)?;
    let layer = MaskedAttention::new(&device);
    let mut through_rust = || -> Result<()> {
        let x = TensorView::from_host(&x, &SHAPE)?;
        layer.forward_into(x, x, x, AttentionMask::varlen(&meta), TensorViewMut::from_host(&mut out_rust, &SHAPE)?)?;
        Ok(())
    };

    let mut plan = Box::new(MaybeUninit::<varlen_fa_plan>::uninit());
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        times[0].push(nanoseconds(&mut through_rust)?);
        times[1].push(nanoseconds(&mut || through_c(null_mut()))?);
        times[2].push(nanoseconds(&mut || through_c(plan.as_mut_ptr()))?);
    }
    ensure!(out_c[..8] == x[..8] && out_c == out_rust, "C gave {out_c:?}, Rust {out_rust:?}");
    println!("attention of [B, S, H, D] = {SHAPE:?} f32 on the cpu device; median of {ROUNDS} rounds of {CALLS} calls");
    for (name, times) in ["Rust", "C", "C with a plan"].into_iter().zip(&mut times) {
        times.sort_unstable_by(f64::total_cmp);
        let median = times.get(ROUNDS / 2).context("no rounds")?;
        println!("{name:<14} {median:>8.0} ns a call   (least {:.0})", times[0]);
    }
    Ok(())
}

fn ok(status: varlen_fa_status) -> Result<()> {
    ensure!(status == varlen_fa_status::Ok, "got {status:?}");
    Ok(())
}

fn descriptor(data: *mut f32) -> varlen_fa_tensor {
    let strides = [16, 8, 8, 1];
    varlen_fa_tensor {
        data: data.cast::<c_void>(),
        bytes: 64,
        dtype: MaybeUninit::new(varlen_fa_dtype::F32),
        memory: MaybeUninit::new(varlen_fa_memory::Host),
        rank: 4,
        reserved_word: 0,
        shape: SHAPE.map(|size| size as u64),
        strides,
        reserved: [0; 2],
    }
}

fn nanoseconds(call: &mut impl FnMut() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    for _ in 0..CALLS {
        call()?;
    }
    Ok(started.elapsed().as_nanos() as f64 / f64::from(CALLS))
}
