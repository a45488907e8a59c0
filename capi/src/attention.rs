//! The layer.

use std::ptr;
use std::sync::Arc;

use varlen::{Device, Kernel, KeyRanges, MaskedAttention, Path, Plan, ScoreModifiers};

use crate::arguments::{Name, Place, choose, expect_zeros, read_optional, text};
use crate::attention_mask::Mask;
use crate::failure::{Failure, Result, guard};
use crate::handles;
use crate::key_ranges;
use crate::names::value_of;
use crate::outputs::Outputs;
use crate::score_modifiers;
use crate::segments::{self, List, views};
use crate::tensors::{Described, expect_apart};
use crate::types::{
    varlen_fa_attention_mask, varlen_fa_attention_options, varlen_fa_device, varlen_fa_kernel, varlen_fa_path,
    varlen_fa_plan, varlen_fa_reason, varlen_fa_segments, varlen_fa_status, varlen_fa_tensor,
};

/// Scaled dot-product attention over padded tensors, into external memory.
///
/// `device`: computes.
/// `options`: may be NULL.
/// `q`: [B, Sq, H, D]; D is from 1 to 512.
/// `k`, `v`: [B, Sk, Hkv, D]; Hkv divides H, and query head h reads key/value head h / (H / Hkv).
/// `mask`: NULL for no mask.
/// `out`: [B, Sq, H, D] of q's element type, in memory that no input shares. Every element is
/// written, and nothing else.
/// `plan`: receives the path and the kernel that were used, and why; may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_forward(
    device: *const varlen_fa_device,
    options: *const varlen_fa_attention_options,
    q: *const varlen_fa_tensor,
    k: *const varlen_fa_tensor,
    v: *const varlen_fa_tensor,
    mask: *const varlen_fa_attention_mask,
    out: *const varlen_fa_tensor,
    plan: *mut varlen_fa_plan,
) -> varlen_fa_status {
    // SAFETY: the caller obeys the header's rules for pointers.
    guard(|| unsafe { forward_whole(device, options, [q, k, v], mask, [out, ptr::null()], plan) })
}

/// varlen_fa_forward, and the log-sum-exp of every row.
///
/// `lse`: [B, H, Sq] f32, receives ln(sum of exp(score)) of each row: -inf for a query that sees no
/// key or is masked, NaN where the row of `out` is. Its last dimension is contiguous. NULL for none.
///
/// Outputs share no memory with one another or with an input.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_forward_with_lse(
    device: *const varlen_fa_device,
    options: *const varlen_fa_attention_options,
    q: *const varlen_fa_tensor,
    k: *const varlen_fa_tensor,
    v: *const varlen_fa_tensor,
    mask: *const varlen_fa_attention_mask,
    out: *const varlen_fa_tensor,
    lse: *const varlen_fa_tensor,
    plan: *mut varlen_fa_plan,
) -> varlen_fa_status {
    // SAFETY: the caller obeys the header's rules for pointers.
    guard(|| unsafe { forward_whole(device, options, [q, k, v], mask, [out, lse], plan) })
}

/// varlen_fa_forward_with_lse on tensors in segments along S, which then need not be concatenated.
///
/// `q`, `k`, `v`, `out`: each cut as it likes. Lengths add up to Sq and to Sk; B, H or Hkv, D and the
/// element type are the same in all segments. The mask is over all segments, one after another, and so
/// is `lse`: one tensor, or NULL.
///
/// The result is that of the call on whole tensors, bit for bit. Messages name a segment as in
/// `segments[1].k`. CPU devices read and write segments where they lie, other devices copy them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_forward_segments(
    device: *const varlen_fa_device,
    options: *const varlen_fa_attention_options,
    q: *const varlen_fa_segments,
    k: *const varlen_fa_segments,
    v: *const varlen_fa_segments,
    mask: *const varlen_fa_attention_mask,
    out: *const varlen_fa_segments,
    lse: *const varlen_fa_tensor,
    plan: *mut varlen_fa_plan,
) -> varlen_fa_status {
    guard(|| {
        // SAFETY: the caller obeys the header's rules for pointers; as in the lines below.
        let q = || unsafe { segments::parts(&segments::Q, q) };
        // SAFETY: as above.
        let k = || unsafe { segments::parts(&segments::K, k) };
        // SAFETY: as above.
        let v = || unsafe { segments::parts(&segments::V, v) };
        // SAFETY: as above.
        let out = || unsafe { segments::parts(&segments::OUT, out) };
        // SAFETY: as above.
        unsafe { forward(device, options, || Ok(([q()?, k()?, v()?], out()?)), mask, lse, plan) }
    })
}

/// # Safety
/// The header's rules for pointers.
unsafe fn forward_whole(
    device: *const varlen_fa_device,
    options: *const varlen_fa_attention_options,
    [q, k, v]: [*const varlen_fa_tensor; 3],
    mask: *const varlen_fa_attention_mask,
    [out, lse]: [*const varlen_fa_tensor; 2],
    plan: *mut varlen_fa_plan,
) -> Result<()> {
    // SAFETY: by this function's contract; as in the lines below.
    let q = || unsafe { segments::whole(&segments::Q, q) };
    // SAFETY: as above.
    let k = || unsafe { segments::whole(&segments::K, k) };
    // SAFETY: as above.
    let v = || unsafe { segments::whole(&segments::V, v) };
    // SAFETY: as above.
    let out = || unsafe { segments::whole(&segments::OUT, out) };
    // SAFETY: as above.
    unsafe { forward(device, options, || Ok(([q()?, k()?, v()?], out()?)), mask, lse, plan) }
}

/// The call on q, k, v and the output, which `tensors` reads after the options.
///
/// # Safety
/// The header's rules for pointers.
unsafe fn forward<'a>(
    device: *const varlen_fa_device,
    options: *const varlen_fa_attention_options,
    tensors: impl FnOnce() -> Result<([List<Described<'a>>; 3], List<Described<'a>>)>,
    mask: *const varlen_fa_attention_mask,
    lse: *const varlen_fa_tensor,
    plan: *mut varlen_fa_plan,
) -> Result<()> {
    let device = handles::get(Name::of("device"), device)?;
    // SAFETY: by this function's contract; as in the lines below.
    let place = unsafe { Place::optional(Name::of("plan"), plan) }?;
    // SAFETY: as above.
    let options = unsafe { Options::read(options) }?;
    let (inputs, out) = tensors()?;
    // SAFETY: as above.
    let lse = unsafe { Described::optional("lse", lse) }?;
    let described: Vec<_> = out.as_slice().iter().chain(&lse).collect();
    expect_apart(&described, &inputs.iter().flat_map(List::as_slice).collect::<Vec<_>>())?;
    // SAFETY: as above.
    let mask = unsafe { Mask::read(&device, mask, &described) }?;
    let [q, k, v] = inputs;
    let [q, k, v] = [segments::inputs(&device, &q)?, segments::inputs(&device, &k)?, segments::inputs(&device, &v)?];
    let mut outputs = Outputs::new(&device, &out, lse.as_ref())?;
    let layer = options.layer(&device)?;
    let written = outputs.of_attention()?;
    let taken = mask.with(|mask| layer.forward_into(views(&q), views(&k), views(&v), mask, written))?;
    outputs.finish()?;
    put_plan(place, &taken);
    Ok(())
}

/// Checked options.
#[derive(Debug, Default)]
pub(crate) struct Options {
    pub softmax_scale: Option<f32>,
    pub path: Option<Path>,
    pub kernel: Option<Kernel>,
    pub ranges: Option<Arc<KeyRanges>>,
    pub modifiers: Option<Arc<ScoreModifiers>>,
}

impl Options {
    /// # Safety
    /// `options` is null, misaligned, or points to options that C initialised.
    pub unsafe fn read(options: *const varlen_fa_attention_options) -> Result<Self> {
        // SAFETY: by this function's contract.
        let Some(options) = unsafe { read_optional(Name::of("options"), options) }? else {
            return Ok(Self::default());
        };
        let name = Name::of("options");
        expect_zeros(name.field("reserved"), &options.reserved)?;
        let softmax_scale = match options.has_softmax_scale {
            0 => None,
            1 => Some(options.softmax_scale),
            got => {
                let name = name.field("has_softmax_scale");
                return Err(Failure::argument(varlen_fa_status::BadValue, name, "0 or 1", got));
            }
        };
        let path = choose(name.field("path"), options.path)?.meaning;
        let kernel = choose(name.field("kernel"), options.kernel)?.meaning;
        let ranges = key_ranges::optional(name.field("ranges"), options.ranges)?;
        let modifiers = score_modifiers::optional(name.field("modifiers"), options.modifiers)?;
        Ok(Self { softmax_scale, path, kernel, ranges, modifiers })
    }

    /// The layer that computes padded tensors, whose mask has ranges and modifiers.
    pub fn layer(&self, device: &Device) -> Result<MaskedAttention> {
        if self.ranges.is_some() {
            let expected = "NULL: the mask has ranges";
            return Err(Failure::argument(varlen_fa_status::BadValue, "options.ranges", expected, "a handle"));
        }
        if self.modifiers.is_some() {
            let expected = "NULL: the mask has modifiers";
            return Err(Failure::argument(varlen_fa_status::BadValue, "options.modifiers", expected, "a handle"));
        }
        let mut layer = MaskedAttention::new(device);
        if let Some(scale) = self.softmax_scale {
            layer = layer.with_softmax_scale(scale);
        }
        if let Some(path) = self.path {
            layer = layer.with_path(path);
        }
        if let Some(kernel) = self.kernel {
            layer = layer.with_kernel(kernel);
        }
        Ok(layer)
    }
}

/// Writes a plan, if the caller wants it.
pub(crate) fn put_plan(place: Option<Place<varlen_fa_plan>>, plan: &Plan) {
    let Some(place) = place else { return };
    place.put(varlen_fa_plan {
        path: value_of(Some(plan.path)).unwrap_or(varlen_fa_path::Unlisted),
        kernel: value_of(Some(plan.kernel)).unwrap_or(varlen_fa_kernel::Unlisted),
        reason: value_of(plan.reason).unwrap_or(varlen_fa_reason::Unlisted),
        reserved_word: 0,
        text: text(&plan.with_estimate().to_string()),
        reserved: [0; 2],
    });
}
