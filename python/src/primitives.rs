//! What attention is made of, for calls of their own: pack, attention on packed rows, scatter, merge.

use pyo3::prelude::*;
use varlen_fa::{AttentionOutputs, VarlenOptions};

use crate::arrays::{Array, delivered, new_like};
use crate::device::{self, Device};
use crate::errors::{Cause, OrRaise};
use crate::masks::{CuSeqlens, Meta};
use crate::memory::{Input, Output, expect_apart};
use crate::parts::segments_mut;
use crate::results::{LseArgument, Opened, Results};
use crate::scores::{KeyRanges, ScoreModifiers};

fn packed_shape(array: &Array, meta: &Meta) -> PyResult<[usize; 3]> {
    match *array.shape() {
        [_, _, heads, dim] => Ok([meta.0.total_valid(), heads, dim]),
        ref other => Err(Cause::Shape.argument(array.name(), "4 dimensions, [B, S, H, D]", format!("{other:?}"))),
    }
}

/// The valid rows of a padded [B, S, H, D] tensor as a packed [total_valid, H, D] one, bit for bit.
#[pyfunction]
#[pyo3(signature = (padded, meta, *, out=None, device=None))]
pub(crate) fn pack<'py>(
    py: Python<'py>,
    padded: &Bound<'py, PyAny>,
    meta: &Bound<'py, Meta>,
    out: Option<&Bound<'py, PyAny>>,
    device: Option<&Bound<'py, Device>>,
) -> PyResult<Bound<'py, PyAny>> {
    let array = Array::new("padded", padded)?;
    let meta = meta.get();
    let device = device::of_call(device, padded, &array)?.0;
    let results = Results::of_rows((padded, &array), (out, &packed_shape(&array, meta)?))?;
    results.write(py, &device, &[&array], |opened| {
        let (input, to) = (Input::new(&device, &array)?, opened.one()?);
        let from = input.view();
        py.detach(|| varlen_fa::pack_into(&device, from, &meta.0, to)).or_raise()
    })
}

/// The valid rows of padded q, k and v as packed tensors, bit for bit: [B, S, H, D] to
/// [total_valid, H, D], and the same with Hkv heads. On a GPU it is one launch.
#[pyfunction]
#[pyo3(signature = (q, k, v, meta, *, out=None, device=None))]
pub(crate) fn pack_qkv<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    meta: &Bound<'py, Meta>,
    out: Option<(Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>)>,
    device: Option<&Bound<'py, Device>>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let arrays = [Array::new("q", q)?, Array::new("k", k)?, Array::new("v", v)?];
    let meta = meta.get();
    let device = device::of_call(device, q, &arrays[0])?.0;
    let is_given = out.is_some();
    let packed = match out {
        Some((q, k, v)) => [q, k, v],
        None => {
            let new = |like, array| new_like(like, array, &packed_shape(array, meta)?, None);
            [new(q, &arrays[0])?, new(k, &arrays[1])?, new(v, &arrays[2])?]
        }
    };
    let packed_arrays =
        [Array::new("packed_q", &packed[0])?, Array::new("packed_k", &packed[1])?, Array::new("packed_v", &packed[2])?];
    expect_apart(&packed_arrays.each_ref(), &arrays.each_ref())?;
    let input = |at: usize| Input::new(&device, &arrays[at]);
    let output = |at: usize| Output::new(&device, &packed_arrays[at]);
    let inputs = [input(0)?, input(1)?, input(2)?];
    let mut outputs = [output(0)?, output(1)?, output(2)?];
    {
        let [q, k, v] = inputs.each_ref().map(Input::view);
        let outputs = outputs.each_mut().map(Output::view_mut);
        py.detach(|| varlen_fa::pack_qkv_into(&device, q, k, v, &meta.0, outputs)).or_raise()?;
    }
    for output in outputs {
        output.finish()?;
    }
    if is_given {
        return Ok(packed.into());
    }
    let [packed_q, packed_k, packed_v] = packed;
    Ok((delivered(&arrays[0], packed_q)?, delivered(&arrays[1], packed_k)?, delivered(&arrays[2], packed_v)?))
}

/// Packed [total_valid, H, D] rows in a padded [B, S, H, D] tensor, bit for bit, with +0.0 in the
/// masked rows.
#[pyfunction]
#[pyo3(signature = (packed, meta, *, out=None, device=None))]
pub(crate) fn scatter_to_padded<'py>(
    py: Python<'py>,
    packed: &Bound<'py, PyAny>,
    meta: &Bound<'py, Meta>,
    out: Option<&Bound<'py, PyAny>>,
    device: Option<&Bound<'py, Device>>,
) -> PyResult<Bound<'py, PyAny>> {
    let array = Array::new("packed", packed)?;
    let meta = meta.get();
    let device = device::of_call(device, packed, &array)?.0;
    let &[_, heads, dim] = array.shape() else {
        return Err(Cause::Shape.argument(
            "packed",
            "3 dimensions, [total_valid, H, D]",
            format!("{:?}", array.shape()),
        ));
    };
    let results = Results::of_rows((packed, &array), (out, &[meta.0.batch(), meta.0.seq(), heads, dim]))?;
    results.write(py, &device, &[&array], |opened| {
        let (input, to) = (Input::new(&device, &array)?, opened.one()?);
        let from = input.view();
        py.detach(|| varlen_fa::scatter_to_padded_into(&device, from, &meta.0, to)).or_raise()
    })
}

/// Attention over packed rows: q [total_q, H, D], k and v [total_k, Hkv, D]. Sequence b of the
/// queries attends to sequence b of the keys.
#[pyfunction]
#[pyo3(signature = (
    q, k, v, cu_seqlens_q, cu_seqlens_k, *, scale=None, ranges=None, modifiers=None, lse=None, out=None, device=None,
    kernel=None
))]
#[expect(clippy::too_many_arguments, reason = "Python names them")]
pub(crate) fn varlen_attention<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    cu_seqlens_q: &Bound<'py, PyAny>,
    cu_seqlens_k: &Bound<'py, PyAny>,
    scale: Option<f32>,
    ranges: Option<&Bound<'py, KeyRanges>>,
    modifiers: Option<&Bound<'py, ScoreModifiers>>,
    lse: Option<&Bound<'py, PyAny>>,
    out: Option<&Bound<'py, PyAny>>,
    device: Option<&Bound<'py, Device>>,
    kernel: Option<&str>,
) -> PyResult<Bound<'py, PyAny>> {
    let arrays = [Array::new("q", q)?, Array::new("k", k)?, Array::new("v", v)?];
    let query = CuSeqlens::of_object("cu_seqlens_q", cu_seqlens_q)?;
    let key = CuSeqlens::of_object("cu_seqlens_k", cu_seqlens_k)?;
    let device = device::of_call(device, q, &arrays[0])?.0;
    let &[total_q, heads, _] = arrays[0].shape() else {
        return Err(Cause::Shape.argument("q", "3 dimensions, [total_q, H, D]", format!("{:?}", arrays[0].shape())));
    };
    let mut options = VarlenOptions::default();
    options.softmax_scale = scale;
    options.ranges = ranges.map(|ranges| &ranges.get().0);
    options.modifiers = modifiers.map(|modifiers| &modifiers.get().0);
    options.kernel = kernel.map(str::parse).transpose().or_raise()?;
    let (like, lse) = ((q, &arrays[0]), LseArgument::new(lse));
    let results = Results::new(like, (out, arrays[0].shape()), (&lse, &[heads, total_q]))?;
    results.write(py, &device, &arrays.each_ref(), |opened| {
        let input = |at: usize| Input::new(&device, &arrays[at]);
        let inputs = [input(0)?, input(1)?, input(2)?];
        let views = inputs.each_ref().map(Input::view);
        let (out, lse) = opened.one_and_lse()?;
        let run = || varlen_fa::varlen_attention_into(&device, views, &query.0, &key.0, options, out, lse);
        py.detach(run).or_raise().map(drop)
    })
}

/// Attention over all keys from attention over two parts of them: outputs [B, S, H, D] with
/// log-sum-exps [B, H, S], or packed ones. Returns (out, lse).
#[pyfunction]
#[pyo3(signature = (out1, lse1, out2, lse2, *, out=None, lse=None, device=None))]
#[expect(clippy::too_many_arguments, reason = "Python names them")]
pub(crate) fn merge_attention<'py>(
    py: Python<'py>,
    out1: &Bound<'py, PyAny>,
    lse1: &Bound<'py, PyAny>,
    out2: &Bound<'py, PyAny>,
    lse2: &Bound<'py, PyAny>,
    out: Option<&Bound<'py, PyAny>>,
    lse: Option<&Bound<'py, PyAny>>,
    device: Option<&Bound<'py, Device>>,
) -> PyResult<Bound<'py, PyAny>> {
    let arrays =
        [Array::new("out1", out1)?, Array::new("lse1", lse1)?, Array::new("out2", out2)?, Array::new("lse2", lse2)?];
    let device = device::of_call(device, out1, &arrays[0])?.0;
    let lse_shape = match *arrays[0].shape() {
        [batch, seq, heads, _] => vec![batch, heads, seq],
        [total, heads, _] => vec![heads, total],
        ref other => {
            let expected = "[B, S, H, D], or [total, H, D] of packed rows";
            return Err(Cause::Shape.argument("out1", expected, format!("{other:?}")));
        }
    };
    let lse = lse.map_or(LseArgument::New, LseArgument::Given);
    let results = Results::new((out1, &arrays[0]), (out, arrays[0].shape()), (&lse, &lse_shape))?;
    results.write(py, &device, &arrays.each_ref(), |Opened { out, lse }| {
        let input = |at: usize| Input::new(&device, &arrays[at]);
        let inputs = [input(0)?, input(1)?, input(2)?, input(3)?];
        let [out1, lse1, out2, lse2] = inputs.each_ref().map(Input::view);
        let mut outputs = AttentionOutputs::new(segments_mut(out));
        if let Some(lse) = lse {
            outputs = outputs.with_lse(lse.view_mut());
        }
        py.detach(|| varlen_fa::merge_attention_into(&device, out1, lse1, out2, lse2, outputs)).or_raise()
    })
}
