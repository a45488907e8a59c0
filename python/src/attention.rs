//! `varlen_fa.attention`: attention over padded batches; and `plan`, what it would run.

use std::sync::PoisonError;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use varlen_fa::{AttentionMask, AttentionOutputs, MaskedAttention, Segments, TensorView};

use crate::arrays::Array;
use crate::device::{self, Device};
use crate::errors::{Cause, OrRaise, type_name};
use crate::masks::{DeviceMeta, KeyMask, Meta};
use crate::memory::Input;
use crate::parts::{Parts, segments, segments_mut};
use crate::results::{LseArgument, Opened, Results};
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

    /// Calls `run` with the mask and what else the call says of scores. Locks are taken and given back
    /// without the interpreter: a thread that waits for one must not keep others from finishing.
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

/// A call's arguments, but for where its results go.
struct Call<'a, 'py> {
    device: varlen_fa::Device,
    layer: MaskedAttention,
    tokens: Tokens,
    /// q, k and v.
    qkv: [Parts<'py>; 3],
    bias: Option<Array>,
    ranges: Option<&'a Bound<'py, KeyRanges>>,
    modifiers: Option<&'a Bound<'py, ScoreModifiers>>,
}

/// What a call computes on: q, k, v, and where queries and keys are masked.
struct Arguments<'a, 'py> {
    qkv: [&'a Bound<'py, PyAny>; 3],
    mask: Option<&'a Bound<'py, PyAny>>,
    meta: Option<&'a Bound<'py, PyAny>>,
    scale: Option<f32>,
    ranges: Option<&'a Bound<'py, KeyRanges>>,
    modifiers: Option<&'a Bound<'py, ScoreModifiers>>,
    bias: Option<&'a Bound<'py, PyAny>>,
    device: Option<&'a Bound<'py, Device>>,
    path: Option<&'a str>,
    kernel: Option<&'a str>,
}

impl<'a, 'py> Call<'a, 'py> {
    fn new(arguments: Arguments<'a, 'py>) -> PyResult<Self> {
        let Arguments { qkv: [q, k, v], mask, meta, scale, ranges, modifiers, bias, device, path, kernel } = arguments;
        let tokens = Tokens::new(mask, meta)?;
        let qkv = [Parts::new("q", q)?, Parts::new("k", k)?, Parts::new("v", v)?];
        let bias = Array::optional("bias", bias)?;
        let (like, array) = qkv[0].first();
        let device = device::of_call(device, like, array)?.0;
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
        Ok(Self { device, layer, tokens, qkv, bias, ranges, modifiers })
    }

    /// Calls `run` with the layer, q, k and v, and the mask, without the interpreter.
    fn run<R: Send>(
        &self,
        py: Python<'py>,
        run: impl Send + FnOnce(&MaskedAttention, [Segments<'_>; 3], AttentionMask<'_>) -> varlen_fa::Result<R>,
    ) -> PyResult<R> {
        let [q, k, v] = &self.qkv;
        let opened = [q.inputs(&self.device)?, k.inputs(&self.device)?, v.inputs(&self.device)?];
        let bias = self.bias.as_ref().map(|bias| Input::new(&self.device, bias)).transpose()?;
        let scores = OnScores {
            ranges: self.ranges.map(|ranges| &ranges.get().0),
            modifiers: self.modifiers.map(|modifiers| &modifiers.get().0),
            bias: bias.as_ref().map(Input::view),
        };
        let qkv = opened.each_ref().map(|inputs| segments(inputs));
        let (layer, tokens) = (&self.layer, &self.tokens);
        py.detach(|| tokens.with(scores, |mask| run(layer, qkv, mask))).or_raise()
    }
}

/// Attention of q [B, Sq, H, D] to k and v [B, Sk, Hkv, D], Hkv a divisor of H; the last dimension
/// contiguous, the others with any strides. q, k, v and out may each be a list of 1 to 8 segments
/// [B, S_i, H, D] that follow one another along S, each in memory of its own; a new output is one tensor.
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
    let qkv = [q, k, v];
    let call = Call::new(Arguments { qkv, mask, meta, scale, ranges, modifiers, bias, device, path, kernel })?;
    let shape @ [batch, seq_q, heads, _] = call.qkv[0].shape()?;
    let lse = LseArgument::new(lse);
    let results = Results::new(call.qkv[0].first(), (out, &shape), (&lse, &[batch, heads, seq_q]))?;
    let inputs: Vec<&Array> = call.qkv.iter().flat_map(Parts::arrays).chain(&call.bias).collect();
    results.write(py, &call.device, &inputs, |Opened { out, lse }| {
        let mut outputs = AttentionOutputs::new(segments_mut(out));
        if let Some(lse) = lse {
            outputs = outputs.with_lse(lse.view_mut());
        }
        call.run(py, |layer, [q, k, v], mask| layer.forward_into(q, k, v, mask, outputs).map(drop))
    })
}

/// What `attention` would run with these arguments, and why. Everything is checked, and nothing is
/// computed. `lse`: whether the log-sum-exp would be wanted.
#[pyfunction]
#[pyo3(signature = (
    q, k, v, mask=None, *, meta=None, scale=None, ranges=None, modifiers=None, bias=None, lse=false, device=None,
    path=None, kernel=None
))]
#[expect(clippy::too_many_arguments, reason = "Python names them")]
pub(crate) fn plan<'py>(
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
    lse: bool,
    device: Option<&Bound<'py, Device>>,
    path: Option<&str>,
    kernel: Option<&str>,
) -> PyResult<Plan> {
    let qkv = [q, k, v];
    let mut call = Call::new(Arguments { qkv, mask, meta, scale, ranges, modifiers, bias, device, path, kernel })?;
    if lse {
        call.layer = call.layer.with_lse();
    }
    call.run(py, |layer, [q, k, v], mask| layer.plan(q, k, v, mask)).map(Plan)
}

/// What a call runs, and why. Its text says all of it in words.
#[pyclass(frozen, module = "varlen_fa", eq)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Plan(varlen_fa::Plan);

#[pymethods]
impl Plan {
    /// "zero", "dense", "fused" or "packed".
    #[getter]
    fn path(&self) -> &'static str {
        self.0.path.name()
    }

    /// Name of the kernel; None where none runs, since the output is zeros.
    #[getter]
    fn kernel(&self) -> Option<&'static str> {
        (self.0.path != varlen_fa::Path::Zero).then(|| self.0.kernel.name())
    }

    /// Why.
    #[getter]
    fn reason(&self) -> String {
        self.0.reason.to_string()
    }

    /// Whether segments are copied to one tensor first, or the output from one.
    #[getter]
    fn copies_segments(&self) -> bool {
        self.0.copies_segments
    }

    /// Seconds that it takes by the cost model of a CUDA device; None where there is none.
    #[getter]
    fn estimate(&self) -> Option<f64> {
        self.0.estimate.map(|estimate| estimate.time.as_secs_f64())
    }

    fn __str__(&self) -> String {
        self.0.with_estimate().to_string()
    }

    fn __repr__(&self) -> String {
        format!("<varlen_fa.Plan: {}>", self.0.with_estimate())
    }
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
