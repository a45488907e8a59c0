//! `varlen_fa.attention`: attention over padded batches.

use std::sync::PoisonError;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyTuple};
use varlen_fa::{AttentionMask, AttentionOutputs, DType, MaskedAttention, TensorView};

use crate::arrays::{Array, new_like};
use crate::device::{self, Device};
use crate::errors::{Cause, OrRaise, type_name};
use crate::masks::{DeviceMeta, KeyMask, Meta};
use crate::memory::{Input, Output, expect_apart};
use crate::scores::{KeyRanges, ScoreModifiers};

/// Which tokens count: of queries and of keys, where there is metadata.
enum Tokens {
    All,
    Key(KeyMask),
    Varlen(Py<Meta>, Py<Meta>),
    DeviceVarlen(Py<DeviceMeta>, Py<DeviceMeta>),
}

impl Tokens {
    fn new(mask: Option<&Bound<'_, PyAny>>, meta: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        match (mask, meta) {
            (None, None) => Ok(Self::All),
            (Some(mask), None) => KeyMask::of_object(mask).map(Self::Key),
            (None, Some(meta)) => match meta.cast::<PyTuple>() {
                Ok(pair) if pair.len() == 2 => Self::cross(&pair.get_item(0)?, &pair.get_item(1)?),
                _ => Self::cross(meta, meta),
            },
            (Some(_), Some(_)) => {
                let expected = "None beside `meta`, which says which tokens count";
                Err(Cause::Value.argument("mask", expected, "a mask"))
            }
        }
    }

    fn cross(query: &Bound<'_, PyAny>, key: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let (Ok(query), Ok(key)) = (query.cast::<Meta>(), key.cast::<Meta>()) {
            return Ok(Self::Varlen(query.clone().unbind(), key.clone().unbind()));
        }
        if let (Ok(query), Ok(key)) = (query.cast::<DeviceMeta>(), key.cast::<DeviceMeta>()) {
            return Ok(Self::DeviceVarlen(query.clone().unbind(), key.clone().unbind()));
        }
        let (expected, got) =
            ("Meta, DeviceMeta, or a tuple of two of one of them", (type_name(query), type_name(key)));
        Err(PyTypeError::new_err(format!("`meta`: expected {expected}, got {} and {}", got.0, got.1)))
    }

    /// Calls `run` with the mask and what else the call says of scores. Locks are taken and given back without the interpreter: a thread
    /// that waits for one must not keep others from finishing.
    fn with<R>(&self, scores: OnScores<'_>, run: impl FnOnce(AttentionMask<'_>) -> R) -> R {
        match self {
            Self::All => run(scores.on(AttentionMask::none())),
            Self::Key(mask) => run(scores.on(AttentionMask::key(&mask.0))),
            Self::Varlen(query, key) => run(scores.on(AttentionMask::varlen_cross(&query.get().0, &key.get().0))),
            Self::DeviceVarlen(query, key) => {
                let query_meta = query.get().meta.read().unwrap_or_else(PoisonError::into_inner);
                // A second lock of the same metadata could wait for a writer who waits for the first.
                if query.is(key) {
                    return run(scores.on(AttentionMask::varlen(&*query_meta)));
                }
                let key_meta = key.get().meta.read().unwrap_or_else(PoisonError::into_inner);
                run(scores.on(AttentionMask::varlen_cross(&*query_meta, &*key_meta)))
            }
        }
    }
}

/// Which keys each query sees, and what happens to its scores.
#[derive(Clone, Copy)]
struct OnScores<'a> {
    ranges: Option<&'a varlen_fa::KeyRanges>,
    modifiers: Option<&'a varlen_fa::ScoreModifiers>,
    bias: Option<TensorView<'a>>,
}

impl<'a> OnScores<'a> {
    fn on<'m>(self, mut mask: AttentionMask<'m>) -> AttentionMask<'m>
    where
        'a: 'm,
    {
        if let Some(ranges) = self.ranges {
            mask = mask.with_ranges(ranges);
        }
        if let Some(modifiers) = self.modifiers {
            mask = mask.with_modifiers(modifiers);
        }
        if let Some(bias) = self.bias {
            mask = mask.with_bias(bias);
        }
        mask
    }
}

/// Where the log-sum-exp goes: nowhere, to a new tensor, or to one of the caller's.
pub(crate) enum LseArgument<'a, 'py> {
    None,
    New,
    Given(&'a Bound<'py, PyAny>),
}

impl<'a, 'py> LseArgument<'a, 'py> {
    pub fn new(lse: Option<&'a Bound<'py, PyAny>>) -> Self {
        match lse {
            None => Self::None,
            Some(lse) => match lse.cast::<PyBool>() {
                Ok(wanted) if wanted.is_true() => Self::New,
                Ok(_) => Self::None,
                Err(_) => Self::Given(lse),
            },
        }
    }
}

/// Results of a call: the output, and the log-sum-exp if it is wanted.
pub(crate) struct Results<'py> {
    out: Bound<'py, PyAny>,
    lse: Option<Bound<'py, PyAny>>,
    pub out_array: Array,
    pub lse_array: Option<Array>,
}

impl<'py> Results<'py> {
    /// Those that the caller gave, and new ones of the kind of `like` where there are none.
    pub fn new(
        (like, array): (&Bound<'py, PyAny>, &Array),
        out: Option<&Bound<'py, PyAny>>,
        lse: &LseArgument<'_, 'py>,
        lse_shape: Option<&[usize]>,
    ) -> PyResult<Self> {
        let out = out.map_or_else(|| new_like(like, array, array.shape(), None), |out| Ok(out.clone()))?;
        let lse = match (lse, lse_shape) {
            (LseArgument::Given(lse), _) => Some((*lse).clone()),
            (LseArgument::New, Some(shape)) => Some(new_like(like, array, shape, Some(DType::F32))?),
            _ => None,
        };
        let (out_array, lse_array) = (Array::new("out", &out)?, Array::optional("lse", lse.as_ref())?);
        Ok(Self { out, lse, out_array, lse_array })
    }

    pub fn arrays(&self) -> Vec<&Array> {
        std::iter::once(&self.out_array).chain(&self.lse_array).collect()
    }

    /// `out`, or `(out, lse)`.
    pub fn returned(self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match self.lse {
            None => Ok(self.out),
            Some(lse) => (self.out, lse).into_pyobject(py).map(Bound::into_any),
        }
    }
}

/// Attention of q [B, Sq, H, D] to k and v [B, Sk, Hkv, D], Hkv a divisor of H; the last dimension
/// contiguous, the others with any strides.
#[pyfunction]
#[pyo3(signature = (
    q, k, v, mask=None, *, meta=None, scale=None, ranges=None, modifiers=None, bias=None, lse=None, out=None,
    device=None, path=None, kernel=None
))]
#[expect(clippy::too_many_arguments, reason = "Python names them")]
pub(crate) fn attention<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    mask: Option<&Bound<'py, PyAny>>,
    meta: Option<&Bound<'py, PyAny>>,
    scale: Option<f32>,
    ranges: Option<&Bound<'py, KeyRanges>>,
    modifiers: Option<&Bound<'py, ScoreModifiers>>,
    bias: Option<&Bound<'py, PyAny>>,
    lse: Option<&Bound<'py, PyAny>>,
    out: Option<&Bound<'py, PyAny>>,
    device: Option<&Bound<'py, Device>>,
    path: Option<&str>,
    kernel: Option<&str>,
) -> PyResult<Bound<'py, PyAny>> {
    let tokens = Tokens::new(mask, meta)?;
    let [q_array, k_array, v_array] = [Array::new("q", q)?, Array::new("k", k)?, Array::new("v", v)?];
    let bias_array = Array::optional("bias", bias)?;
    let device = device::of_call(device, q, &q_array)?.0;
    let mut layer = MaskedAttention::new(&device);
    if let Some(scale) = scale {
        layer = layer.with_softmax_scale(scale);
    }
    if let Some(path) = path {
        layer = layer.with_path(path_named(path)?);
    }
    if let Some(kernel) = kernel {
        layer = layer.with_kernel(kernel.parse().or_raise()?);
    }
    let &[batch, seq_q, heads, _] = q_array.shape() else {
        return Err(Cause::Shape.argument("q", "4 dimensions, [B, S, H, D]", format!("{:?}", q_array.shape())));
    };
    let results = Results::new((q, &q_array), out, &LseArgument::new(lse), Some(&[batch, heads, seq_q]))?;
    let mut inputs = vec![&q_array, &k_array, &v_array];
    inputs.extend(&bias_array);
    expect_apart(&results.arrays(), &inputs)?;
    let [q_input, k_input, v_input] =
        [Input::new(&device, &q_array)?, Input::new(&device, &k_array)?, Input::new(&device, &v_array)?];
    let bias_input = bias_array.as_ref().map(|bias| Input::new(&device, bias)).transpose()?;
    let mut out_output = Output::new(&device, &results.out_array)?;
    let mut lse_output = results.lse_array.as_ref().map(|lse| Output::new(&device, lse)).transpose()?;
    {
        let (q, k, v) = (q_input.view(), k_input.view(), v_input.view());
        let mut outputs = AttentionOutputs::new(out_output.view_mut());
        if let Some(lse) = &mut lse_output {
            outputs = outputs.with_lse(lse.view_mut());
        }
        let scores = OnScores {
            ranges: ranges.map(|ranges| &ranges.get().0),
            modifiers: modifiers.map(|modifiers| &modifiers.get().0),
            bias: bias_input.as_ref().map(Input::view),
        };
        let run = |mask: AttentionMask<'_>| layer.forward_into(q, k, v, mask, outputs);
        py.detach(|| tokens.with(scores, run)).or_raise()?;
    }
    out_output.finish()?;
    lse_output.map_or(Ok(()), Output::finish)?;
    results.returned(py)
}

fn path_named(name: &str) -> PyResult<varlen_fa::Path> {
    use varlen_fa::Path;
    match name {
        "dense" => Ok(Path::Dense),
        "fused" => Ok(Path::Fused),
        "packed" => Ok(Path::Packed),
        _ => Err(Cause::Value.argument("path", "\"dense\", \"fused\" or \"packed\"", format!("{name:?}"))),
    }
}
