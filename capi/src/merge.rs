//! Attention over all keys from attention over parts of them.

use varlen::merge_attention_into;

use crate::arguments::Name;
use crate::failure::guard;
use crate::handles;
use crate::outputs::Outputs;
use crate::segments::List;
use crate::tensors::{Described, Input, expect_apart};
use crate::types::{varlen_fa_device, varlen_fa_status, varlen_fa_tensor};

/// Attention over all keys from attention over two parts of them, which share no key. With
/// m = max(lse1, lse2) and w = exp(lse - m) of each part it is
/// out = (w1 out1 + w2 out2) / (w1 + w2) and lse = m + ln(w1 + w2).
///
/// `out1`, `out2`: what attention over each part gave, [B, S, H, D], or [total, H, D] of packed rows.
/// `lse1`, `lse2`: their log-sum-exps, [B, H, S] or [H, total] f32. A part that saw no key, -inf,
/// does not count.
/// `out`: of the shape and element type of the parts; +0.0 where neither saw a key.
/// `lse`: of the shape of the parts' log-sum-exps, -inf where neither saw a key; may be NULL.
///
/// Outputs share no memory with one another or with an input.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_merge_attention(
    device: *const varlen_fa_device,
    out1: *const varlen_fa_tensor,
    lse1: *const varlen_fa_tensor,
    out2: *const varlen_fa_tensor,
    lse2: *const varlen_fa_tensor,
    out: *const varlen_fa_tensor,
    lse: *const varlen_fa_tensor,
) -> varlen_fa_status {
    guard(|| {
        let device = handles::get(Name::of("device"), device)?;
        // SAFETY: the caller obeys the header's rules for pointers; as in the lines below.
        let out1 = unsafe { Described::new("out1", out1) }?;
        // SAFETY: as above.
        let lse1 = unsafe { Described::new("lse1", lse1) }?;
        // SAFETY: as above.
        let out2 = unsafe { Described::new("out2", out2) }?;
        // SAFETY: as above.
        let lse2 = unsafe { Described::new("lse2", lse2) }?;
        // SAFETY: as above.
        let out = unsafe { Described::new("out", out) }?;
        // SAFETY: as above.
        let lse = unsafe { Described::optional("lse", lse) }?;
        let out = List::One(out);
        let described: Vec<_> = out.as_slice().iter().chain(&lse).collect();
        expect_apart(&described, &[&out1, &lse1, &out2, &lse2])?;
        let [out1, lse1] = [Input::new(&device, &out1)?, Input::new(&device, &lse1)?];
        let [out2, lse2] = [Input::new(&device, &out2)?, Input::new(&device, &lse2)?];
        let mut outputs = Outputs::new(&device, &out, lse.as_ref())?;
        let [out1, lse1, out2, lse2] = [out1.view(), lse1.view(), out2.view(), lse2.view()];
        merge_attention_into(&device, out1, lse1, out2, lse2, outputs.of_attention()?)?;
        outputs.finish()
    })
}
