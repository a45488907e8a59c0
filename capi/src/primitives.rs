//! The primitives of the packed path.

use varlen::{VarlenOptions, pack_qkv_into, scatter_to_padded_into, varlen_attention_into};

use crate::arguments::{Name, Place};
use crate::attention::{Options, put_plan};
use crate::failure::{Failure, guard};
use crate::handles;
use crate::outputs::Outputs;
use crate::segments::List;
use crate::tensors::{Described, Input, Output, expect_apart, finish};
use crate::types::{
    varlen_fa_attention_options, varlen_fa_cu_seqlens, varlen_fa_device, varlen_fa_meta, varlen_fa_plan,
    varlen_fa_status, varlen_fa_tensor,
};

/// Copies the valid rows of padded tensors to packed tensors, bit for bit, in one launch.
///
/// `q`: [B, S, H, D]. `k`, `v`: [B, S, Hkv, D].
/// `meta`: of [B, S].
/// `packed_q`: [total_valid, H, D]. `packed_k`, `packed_v`: [total_valid, Hkv, D]. They share no
/// memory with one another or with an input.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_pack_qkv(
    device: *const varlen_fa_device,
    q: *const varlen_fa_tensor,
    k: *const varlen_fa_tensor,
    v: *const varlen_fa_tensor,
    meta: *const varlen_fa_meta,
    packed_q: *const varlen_fa_tensor,
    packed_k: *const varlen_fa_tensor,
    packed_v: *const varlen_fa_tensor,
) -> varlen_fa_status {
    guard(|| {
        let device = handles::get(Name::of("device"), device)?;
        // SAFETY: the caller obeys the header's rules for pointers; as in the lines below.
        let q = unsafe { Described::new("q", q) }?;
        // SAFETY: as above.
        let k = unsafe { Described::new("k", k) }?;
        // SAFETY: as above.
        let v = unsafe { Described::new("v", v) }?;
        let meta = handles::get(Name::of("meta"), meta)?;
        // SAFETY: as above.
        let packed_q = unsafe { Described::new("packed_q", packed_q) }?;
        // SAFETY: as above.
        let packed_k = unsafe { Described::new("packed_k", packed_k) }?;
        // SAFETY: as above.
        let packed_v = unsafe { Described::new("packed_v", packed_v) }?;
        expect_apart(&[&packed_q, &packed_k, &packed_v], &[&q, &k, &v])?;
        let [q, k, v] = [Input::new(&device, &q)?, Input::new(&device, &k)?, Input::new(&device, &v)?];
        let mut packed_q = Output::new(&device, &packed_q)?;
        let mut packed_k = Output::new(&device, &packed_k)?;
        let mut packed_v = Output::new(&device, &packed_v)?;
        let packed = [packed_q.view_mut()?, packed_k.view_mut()?, packed_v.view_mut()?];
        pack_qkv_into(&device, q.view(), k.view(), v.view(), &meta, packed)?;
        finish([packed_q, packed_k, packed_v])
    })
}

/// Attention over packed rows: sequence b of the queries attends to sequence b of the keys. Either
/// may be empty; a query without keys gives zeros.
///
/// `options`: may be NULL. `path` must be AUTO.
/// `q`: [total_q, H, D]. `k`, `v`: [total_k, Hkv, D].
/// `cu_seqlens_q`, `cu_seqlens_k`: the sequences of queries and keys, of equal number.
/// `out`: [total_q, H, D] of q's element type.
/// `lse`: [H, total_q] f32, receives ln(sum of exp(score)) of each row, -inf for a row without
/// keys; may be NULL.
/// `plan`: receives the kernel that was used; may be NULL.
///
/// Outputs share no memory with one another or with an input.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_varlen_attention(
    device: *const varlen_fa_device,
    options: *const varlen_fa_attention_options,
    q: *const varlen_fa_tensor,
    k: *const varlen_fa_tensor,
    v: *const varlen_fa_tensor,
    cu_seqlens_q: *const varlen_fa_cu_seqlens,
    cu_seqlens_k: *const varlen_fa_cu_seqlens,
    out: *const varlen_fa_tensor,
    lse: *const varlen_fa_tensor,
    plan: *mut varlen_fa_plan,
) -> varlen_fa_status {
    guard(|| {
        let device = handles::get(Name::of("device"), device)?;
        // SAFETY: the caller obeys the header's rules for pointers; as in the lines below.
        let place = unsafe { Place::optional(Name::of("plan"), plan) }?;
        // SAFETY: as above.
        let options = unsafe { Options::read(options) }?;
        // SAFETY: as above.
        let q = unsafe { Described::new("q", q) }?;
        // SAFETY: as above.
        let k = unsafe { Described::new("k", k) }?;
        // SAFETY: as above.
        let v = unsafe { Described::new("v", v) }?;
        let cu_seqlens_q = handles::get(Name::of("cu_seqlens_q"), cu_seqlens_q)?;
        let cu_seqlens_k = handles::get(Name::of("cu_seqlens_k"), cu_seqlens_k)?;
        // SAFETY: as above.
        let out = unsafe { Described::new("out", out) }?;
        // SAFETY: as above.
        let lse = unsafe { Described::optional("lse", lse) }?;
        if let Some(path) = options.path {
            let expected = "AUTO, since the rows are packed already";
            return Err(Failure::argument(varlen_fa_status::NotApplicable, "options.path", expected, path));
        }
        let out = List::One(out);
        let described: Vec<_> = out.as_slice().iter().chain(&lse).collect();
        expect_apart(&described, &[&q, &k, &v])?;
        let [q, k, v] = [Input::new(&device, &q)?, Input::new(&device, &k)?, Input::new(&device, &v)?];
        let mut outputs = Outputs::new(&device, &out, lse.as_ref())?;
        let (out, lse) = outputs.views()?;
        let mut varlen_options = VarlenOptions::default();
        varlen_options.softmax_scale = options.softmax_scale;
        varlen_options.kernel = options.kernel;
        varlen_options.ranges = options.ranges.as_deref();
        varlen_options.modifiers = options.modifiers.as_deref();
        let taken = varlen_attention_into(
            &device,
            [q.view(), k.view(), v.view()],
            cu_seqlens_q.cu_seqlens(),
            cu_seqlens_k.cu_seqlens(),
            varlen_options,
            out,
            lse,
        )?;
        outputs.finish()?;
        put_plan(place, &taken);
        Ok(())
    })
}

/// Copies packed rows to the valid rows of a padded tensor, bit for bit, and writes +0.0 to the
/// masked rows, in one launch.
///
/// `packed`: [total_valid, H, D].
/// `meta`: of [B, S].
/// `padded`: [B, S, H, D], in memory that `packed` does not share. Every element is written, and
/// nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn varlen_fa_scatter_to_padded(
    device: *const varlen_fa_device,
    packed: *const varlen_fa_tensor,
    meta: *const varlen_fa_meta,
    padded: *const varlen_fa_tensor,
) -> varlen_fa_status {
    guard(|| {
        let device = handles::get(Name::of("device"), device)?;
        // SAFETY: the caller obeys the header's rules for pointers; as in the lines below.
        let packed = unsafe { Described::new("packed", packed) }?;
        let meta = handles::get(Name::of("meta"), meta)?;
        // SAFETY: as above.
        let padded = unsafe { Described::new("padded", padded) }?;
        expect_apart(&[&padded], &[&packed])?;
        let packed = Input::new(&device, &packed)?;
        let mut padded = Output::new(&device, &padded)?;
        scatter_to_padded_into(&device, packed.view(), &meta, padded.view_mut()?)?;
        finish([padded])
    })
}
