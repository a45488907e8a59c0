//! The overhead of a call through C over the same call in Rust: the smallest attention on the CPU
//! device, in one process, in turns.

mod c_library;

use std::mem::MaybeUninit;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use varlen::{AttentionMask, Device, DeviceChoice, KeyMask, MaskedAttention, TensorView, TensorViewMut, VarlenMeta};

use self::c_library::types::{varlen_fa_dtype, varlen_fa_memory, varlen_fa_plan};
use self::c_library::{CLibrary, tensor};

const SHAPE: [usize; 4] = [1, 2, 1, 8];
const ELEMENTS: usize = 16;
const VALID: usize = 1;
const CALLS: u32 = 2_000;
const ROUNDS: usize = 21;

fn main() -> Result<()> {
    let x: Vec<f32> = (0..ELEMENTS).map(|at| at as f32 / ELEMENTS as f32).collect();
    let (mut out_c, mut out_rust) = (vec![0.0_f32; ELEMENTS], vec![0.0_f32; ELEMENTS]);
    let mut plan = Box::new(Plan::uninit());
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    {
        let mut through_rust = call_through_rust(&x, &mut out_rust)?;
        let through_c = call_through_c(&x, &mut out_c)?;
        for _ in 0..ROUNDS {
            times[0].push(nanoseconds(&mut through_rust)?);
            times[1].push(nanoseconds(&mut || through_c(None))?);
            times[2].push(nanoseconds(&mut || through_c(Some(&mut plan)))?);
        }
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

fn call_through_rust<'a>(x: &'a [f32], out: &'a mut [f32]) -> Result<impl FnMut() -> Result<()> + 'a> {
    let meta = VarlenMeta::from_key_mask(&KeyMask::from_lengths(SHAPE[1], &[VALID])?)?;
    let layer = MaskedAttention::new(&Device::new(DeviceChoice::Cpu)?);
    Ok(move || {
        let x = TensorView::from_host(x, &SHAPE)?;
        layer.forward_into(x, x, x, AttentionMask::varlen(&meta), TensorViewMut::from_host(out, &SHAPE)?)?;
        Ok(())
    })
}

type Plan = MaybeUninit<varlen_fa_plan>;

fn call_through_c<'a>(x: &'a [f32], out: &'a mut [f32]) -> Result<impl Fn(Option<&mut Plan>) -> Result<()> + 'a> {
    let library = CLibrary::load()?;
    let (device, mask) = (library.open_cpu()?, library.varlen_mask(VALID, SHAPE[1])?);
    let describe =
        |data: *mut f32| tensor(data.cast(), varlen_fa_dtype::F32, size_of::<f32>(), varlen_fa_memory::Host, SHAPE);
    let (x, out) = (describe(x.as_ptr().cast_mut()), describe(out.as_mut_ptr()));
    Ok(move |plan: Option<&mut Plan>| {
        // SAFETY: the closure borrows both slices, the output exclusively.
        unsafe { library.forward(device, &x, &mask, &out, plan) }
    })
}

fn nanoseconds(call: &mut impl FnMut() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    for _ in 0..CALLS {
        call()?;
    }
    Ok(started.elapsed().as_nanos() as f64 / f64::from(CALLS))
}
