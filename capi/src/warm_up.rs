//! Cold starts: a device made ready before its first call, and what it compiled kept for the next
//! start.

use std::mem::MaybeUninit;

use crate::arguments::{Name, Place, choose, size, slice};
use crate::attention::{Options, put_plan};
use crate::attention_mask::Mask;
use crate::failure::{Failure, guard};
use crate::handles;
use crate::pipeline_cache;
use crate::types::{
    varlen_fa_attention_mask, varlen_fa_attention_options, varlen_fa_device, varlen_fa_dtype, varlen_fa_plan,
    varlen_fa_status,
};

/// Makes the device ready for calls of varlen_fa_forward of this kind, so that the first of them
/// takes no longer than the others: compiles their shaders and uploads the metadata. It runs one
/// call on zeros and waits for it. Without it, the first call on a wgpu device may take seconds.
///
/// On wgpu devices a shader depends on the element type, D and the kind of the mask, not on B, S
/// and the number of heads: a small batch will do, as long as the plan is the same.
///
/// `device`: is made ready. Any thread may do so, also beside calls on the device.
/// `options`: may be NULL.
/// `dtype`: the element type of q, k, v and the output.
/// `q_shape`: B, Sq, H and D.
/// `kv_shape`: B, Sk, Hkv and D.
/// `mask`: NULL for no mask.
/// `plan`: receives the plan that such calls have; may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_warm_up(
    device: *const varlen_fa_device,
    options: *const varlen_fa_attention_options,
    dtype: MaybeUninit<varlen_fa_dtype>,
    q_shape: *const u64,
    kv_shape: *const u64,
    mask: *const varlen_fa_attention_mask,
    plan: *mut varlen_fa_plan,
) -> varlen_fa_status {
    guard(|| {
        let device = handles::get(Name::of("device"), device)?;
        // SAFETY: the caller obeys the header's rules for pointers; as in the lines below.
        let place = unsafe { Place::optional(Name::of("plan"), plan) }?;
        // SAFETY: as above.
        let options = unsafe { Options::read(options) }?;
        let dtype = choose(Name::of("dtype"), dtype)?.meaning;
        // SAFETY: as above.
        let q_shape = unsafe { shape("q_shape", q_shape) }?;
        // SAFETY: as above.
        let kv_shape = unsafe { shape("kv_shape", kv_shape) }?;
        // SAFETY: as above.
        let mask = unsafe { Mask::read(&device, mask, &[]) }?;
        let layer = options.layer(&device)?;
        let taken = mask.with(|mask| layer.warm_up(dtype, &q_shape, &kv_shape, mask))?;
        put_plan(place, &taken);
        Ok(())
    })
}

/// # Safety
/// As [`slice`], with 4 elements.
unsafe fn shape(argument: &'static str, at: *const u64) -> Result<[usize; 4], Failure> {
    let name = Name::of(argument);
    // SAFETY: by this function's contract.
    let sizes = unsafe { slice(name, at, 4) }?;
    let mut shape = [0; 4];
    for (to, &from) in shape.iter_mut().zip(sizes) {
        *to = size(name, from)?;
    }
    Ok(shape)
}

/// Gives a wgpu device a pipeline cache, with which it compiles shaders from now on. What
/// varlen_fa_pipeline_cache_copy gives at the end of a program makes its next start fast, where the
/// driver keeps no cache of its own. Data of another adapter or driver counts as none.
///
/// `device`: a wgpu device; NOT_APPLICABLE if it is none or its adapter has no pipeline caches.
/// `data`: `bytes` bytes that varlen_fa_pipeline_cache_copy gave, unchanged: drivers trust them.
/// `bytes`: 0 for an empty cache.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_pipeline_cache_load(
    device: *const varlen_fa_device,
    data: *const u8,
    bytes: u64,
) -> varlen_fa_status {
    guard(|| {
        let device = handles::get(Name::of("device"), device)?;
        // SAFETY: the caller obeys the header's rules for pointers.
        let data = unsafe { slice(Name::of("data"), data, bytes) }?;
        // SAFETY: by the header, what another cache gave.
        unsafe { pipeline_cache::load(&device, data) }
    })
}

/// Copies what a device's pipeline cache holds, to be kept in a file.
///
/// `device`: a wgpu device whose cache varlen_fa_pipeline_cache_load made; NOT_APPLICABLE if it has
/// none.
/// `data`: receives the bytes; NULL to ask for their number alone.
/// `capacity`: the size of the memory at `data`; LENGTH if it is too small, with `bytes` set.
/// `bytes`: receives the number of bytes. It grows when shaders are compiled.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_pipeline_cache_copy(
    device: *const varlen_fa_device,
    data: *mut u8,
    capacity: u64,
    bytes: *mut u64,
) -> varlen_fa_status {
    guard(|| {
        let device = handles::get(Name::of("device"), device)?;
        // SAFETY: the caller obeys the header's rules for pointers; as in the lines below.
        let place = unsafe { Place::new(Name::of("bytes"), bytes) }?;
        // SAFETY: as above.
        let memory = unsafe { Place::optional(Name::of("data"), data) }?;
        let held = pipeline_cache::data(&device)?;
        let count = held.len() as u64;
        place.put(count);
        let Some(memory) = memory else { return Ok(()) };
        if count > capacity {
            let expected = format!("room for {count} bytes");
            return Err(Failure::argument(varlen_fa_status::Length, "capacity", expected, capacity));
        }
        // SAFETY: by the header, `capacity` bytes, which are enough.
        unsafe { memory.put_all(&held) };
        Ok(())
    })
}
