//! The layer.

use std::sync::Arc;

use varlen::{AttentionMask, Kernel, MaskedAttention, Path, Plan, Reason};

use crate::arguments::{Name, Place, choose, expect_zeros, read_optional, text};
use crate::device::{forced_kernel, kernel_of};
use crate::failure::{Failure, Result, border};
use crate::handles;
use crate::tensors::{Described, Input, Output, expect_apart, finish};
use crate::types::{
    varlen_fa_attention_mask, varlen_fa_attention_options, varlen_fa_device, varlen_fa_mask_kind, varlen_fa_path,
    varlen_fa_plan, varlen_fa_reason, varlen_fa_status, varlen_fa_tensor,
};

/// Scaled dot-product attention over padded tensors, into the caller's memory.
///
/// `device`: computes.
/// `options`: may be NULL.
/// `q`: [B, Sq, H, D], D a multiple of 8 from 8 to 256.
/// `k`, `v`: [B, Sk, Hkv, D]; Hkv divides H, and query head h reads key/value head h / (H / Hkv).
/// `mask`: may be NULL, which is no mask.
/// `out`: [B, Sq, H, D] of q's element type, in memory that no input shares. Every element is written, and nothing else.
/// `plan`: receives the path and kernel that were taken and why; may be NULL.
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
    border(|| {
        let device = handles::get(Name::of("device"), device)?;
        // SAFETY: the caller keeps the header's rules for pointers; as in the lines below.
        let place = unsafe { Place::optional(Name::of("plan"), plan) }?;
        // SAFETY: as above.
        let options = unsafe { Options::read(options) }?;
        // SAFETY: as above.
        let q = unsafe { Described::new("q", q) }?;
        // SAFETY: as above.
        let k = unsafe { Described::new("k", k) }?;
        // SAFETY: as above.
        let v = unsafe { Described::new("v", v) }?;
        // SAFETY: as above.
        let mask = unsafe { read_optional(Name::of("mask"), mask) }?;
        let kind = expect_kind(mask.as_ref())?;
        let (bias, query_meta, key_meta, key_mask);
        let bias_input;
        let (query_device_meta, key_device_meta);
        let (query_lock, key_lock);
        // SAFETY: as above.
        let out = unsafe { Described::new("out", out) }?;
        expect_apart(&[&out], &[&q, &k, &v])?;
        let attention_mask = match (kind, mask) {
            (varlen_fa_mask_kind::None, _) | (_, None) => AttentionMask::None,
            (varlen_fa_mask_kind::Key, Some(mask)) => {
                key_mask = handles::get(Name::of("mask.key_mask"), mask.key_mask)?;
                AttentionMask::Key(&key_mask)
            }
            (varlen_fa_mask_kind::Bias, Some(mask)) => {
                // SAFETY: as above.
                bias = unsafe { Described::new("bias", mask.bias) }?;
                expect_apart(&[&out], &[&bias])?;
                bias_input = Input::of_any_strides(&device, &bias)?;
                AttentionMask::Bias(bias_input.view())
            }
            (varlen_fa_mask_kind::Varlen, Some(mask)) => {
                query_meta = handles::get(Name::of("mask.query_meta"), mask.query_meta)?;
                AttentionMask::varlen(&query_meta)
            }
            (varlen_fa_mask_kind::VarlenCross, Some(mask)) => {
                query_meta = handles::get(Name::of("mask.query_meta"), mask.query_meta)?;
                key_meta = handles::get(Name::of("mask.key_meta"), mask.key_meta)?;
                AttentionMask::varlen_cross(&query_meta, &key_meta)
            }
            (varlen_fa_mask_kind::DeviceVarlen, Some(mask)) => {
                query_device_meta = handles::get(Name::of("mask.query_device_meta"), mask.query_device_meta)?;
                query_lock = query_device_meta.read();
                AttentionMask::varlen(&*query_lock)
            }
            (varlen_fa_mask_kind::DeviceVarlenCross, Some(mask)) => {
                query_device_meta = handles::get(Name::of("mask.query_device_meta"), mask.query_device_meta)?;
                key_device_meta = handles::get(Name::of("mask.key_device_meta"), mask.key_device_meta)?;
                let same = Arc::ptr_eq(&query_device_meta, &key_device_meta);
                query_lock = query_device_meta.read();
                // One that is read twice is locked once: a thread that waits to rebuild it would come between.
                let key = match same {
                    true => &query_lock,
                    false => {
                        key_lock = key_device_meta.read();
                        &key_lock
                    }
                };
                AttentionMask::varlen_cross(&*query_lock, &**key)
            }
        };
        let mut layer = MaskedAttention::new(&device);
        if let Some(scale) = options.softmax_scale {
            layer = layer.with_softmax_scale(scale);
        }
        if let Some(path) = options.path {
            layer = layer.with_path(path);
        }
        if let Some(kernel) = options.kernel {
            layer = layer.with_kernel(kernel);
        }
        let [q, k, v] = [Input::new(&device, &q)?, Input::new(&device, &k)?, Input::new(&device, &v)?];
        let mut out = Output::new(&device, &out)?;
        let taken = layer.forward_into(q.view(), k.view(), v.view(), attention_mask, out.view_mut()?)?;
        finish([out])?;
        if let Some(place) = place {
            place.put(plan_of(&taken));
        }
        Ok(())
    })
}

/// Options that were checked.
#[derive(Debug, Default)]
pub(crate) struct Options {
    pub softmax_scale: Option<f32>,
    pub path: Option<Path>,
    pub kernel: Option<Kernel>,
}

impl Options {
    /// # Safety
    /// `options` is null, misaligned or points to options that C initialised.
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
        let path = match choose(name.field("path"), options.path)? {
            varlen_fa_path::Auto | varlen_fa_path::Unlisted => None,
            varlen_fa_path::Dense => Some(Path::Dense),
            varlen_fa_path::Fused => Some(Path::Fused),
            varlen_fa_path::Packed => Some(Path::Packed),
            varlen_fa_path::Zero => Some(Path::Zero),
        };
        let kernel = forced_kernel(choose(name.field("kernel"), options.kernel)?)?;
        Ok(Self { softmax_scale, path, kernel })
    }
}

/// The mask's kind; pointers that do not belong to it are a mistake.
fn expect_kind(mask: Option<&varlen_fa_attention_mask>) -> Result<varlen_fa_mask_kind> {
    let Some(mask) = mask else { return Ok(varlen_fa_mask_kind::None) };
    let name = Name::of("mask");
    let kind = choose(name.field("kind"), mask.kind)?;
    expect_zeros(name.field("reserved_word"), &[u64::from(mask.reserved_word)])?;
    expect_zeros(name.field("reserved"), &mask.reserved)?;
    use varlen_fa_mask_kind::{Bias, DeviceVarlen, DeviceVarlenCross, Key, Varlen, VarlenCross};
    for (field, is_null, kinds) in [
        ("key_mask", mask.key_mask.is_null(), &[Key][..]),
        ("bias", mask.bias.is_null(), &[Bias]),
        ("query_meta", mask.query_meta.is_null(), &[Varlen, VarlenCross]),
        ("key_meta", mask.key_meta.is_null(), &[VarlenCross]),
        ("query_device_meta", mask.query_device_meta.is_null(), &[DeviceVarlen, DeviceVarlenCross]),
        ("key_device_meta", mask.key_device_meta.is_null(), &[DeviceVarlenCross]),
    ] {
        if !is_null && !kinds.contains(&kind) {
            let expected = format!("NULL with a mask of kind {}", kind as u32);
            return Err(Failure::argument(varlen_fa_status::BadValue, name.field(field), expected, "a pointer"));
        }
    }
    Ok(kind)
}

/// A plan in the header's terms.
pub(crate) fn plan_of(plan: &Plan) -> varlen_fa_plan {
    varlen_fa_plan {
        path: match plan.path {
            Path::Dense => varlen_fa_path::Dense,
            Path::Fused => varlen_fa_path::Fused,
            Path::Packed => varlen_fa_path::Packed,
            Path::Zero => varlen_fa_path::Zero,
            _ => varlen_fa_path::Unlisted,
        },
        kernel: kernel_of(plan.kernel),
        reason: match plan.reason {
            Reason::NoMask => varlen_fa_reason::NoMask,
            Reason::KeyMask => varlen_fa_reason::KeyMask,
            Reason::KeyMaskKeepsAll => varlen_fa_reason::KeyMaskKeepsAll,
            Reason::Bias => varlen_fa_reason::Bias,
            Reason::AllValid => varlen_fa_reason::AllValid,
            Reason::NothingValid => varlen_fa_reason::NothingValid,
            Reason::Fused => varlen_fa_reason::Fused,
            Reason::DenseForced => varlen_fa_reason::DenseForced,
            Reason::PathForced => varlen_fa_reason::PathForced,
            Reason::AlreadyPacked => varlen_fa_reason::AlreadyPacked,
            Reason::Fragmented => varlen_fa_reason::Fragmented,
            Reason::MetadataOnDevice => varlen_fa_reason::MetadataOnDevice,
            _ => varlen_fa_reason::Unlisted,
        },
        reserved_word: 0,
        text: text(&plan.to_string()),
        reserved: [0; 2],
    }
}
