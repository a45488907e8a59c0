//! `varlen_fa.prepare_qk`: QK-norm and rotary embedding of the segments of a joint layer.

use pyo3::prelude::*;
use varlen_fa::{QkNorm, Rotary, RotaryPairing, TokenMask};

use crate::arrays::Array;
use crate::device::{self, Device};
use crate::errors::{Cause, OrRaise};
use crate::masks::{KeyMask, Meta};
use crate::memory::{Input, Output, expect_apart};

/// q [B, S, H, D] and k [B, S, Hkv, D] of one text or image, and what happens to them.
///
/// `q_out` and `k_out`: where the results go; None replaces q and k. `norm`: (q_weight, k_weight, eps),
/// weights of [D]. `rotary`: (cos, sin), tables of [S, R/2] or [B, S, R/2]. `pairing`: "interleaved",
/// elements 2i and 2i + 1, or "halves", elements i and i + R/2.
#[pyclass(frozen, module = "varlen_fa")]
#[derive(Debug)]
pub(crate) struct QkSegment {
    rows: [Py<PyAny>; 2],
    outputs: Option<[Py<PyAny>; 2]>,
    norm: Option<([Py<PyAny>; 2], f32)>,
    rotary: Option<([Py<PyAny>; 2], RotaryPairing)>,
}

#[pymethods]
impl QkSegment {
    #[new]
    #[pyo3(signature = (q, k, *, q_out=None, k_out=None, norm=None, rotary=None, pairing="interleaved"))]
    fn new(
        q: Py<PyAny>,
        k: Py<PyAny>,
        q_out: Option<Py<PyAny>>,
        k_out: Option<Py<PyAny>>,
        norm: Option<(Py<PyAny>, Py<PyAny>, f32)>,
        rotary: Option<(Py<PyAny>, Py<PyAny>)>,
        pairing: &str,
    ) -> PyResult<Self> {
        let outputs = match (q_out, k_out) {
            (Some(q), Some(k)) => Some([q, k]),
            (None, None) => None,
            _ => return Err(Cause::Value.argument("k_out", "both q_out and k_out, or neither", "one of them")),
        };
        let pairing = match pairing {
            "interleaved" => RotaryPairing::Interleaved,
            "halves" => RotaryPairing::Halves,
            _ => return Err(Cause::Value.argument("pairing", "\"interleaved\" or \"halves\"", format!("{pairing:?}"))),
        };
        Ok(Self {
            rows: [q, k],
            outputs,
            norm: norm.map(|(q, k, eps)| ([q, k], eps)),
            rotary: rotary.map(|(cos, sin)| ([cos, sin], pairing)),
        })
    }
}

/// The tensors of a segment.
struct Arrays {
    /// None in place.
    inputs: Option<[Array; 2]>,
    outputs: [Array; 2],
    norm: Option<([Array; 2], f32)>,
    rotary: Option<([Array; 2], RotaryPairing)>,
}

impl Arrays {
    fn new(py: Python<'_>, at: usize, segment: &QkSegment) -> PyResult<Self> {
        let array = |name: &str, object: &Py<PyAny>| Array::new(format!("segments[{at}].{name}"), object.bind(py));
        let pair =
            |names: [&str; 2], [a, b]: &[Py<PyAny>; 2]| Ok::<_, PyErr>([array(names[0], a)?, array(names[1], b)?]);
        let rows = pair(["q", "k"], &segment.rows)?;
        let (inputs, outputs) = match &segment.outputs {
            None => (None, rows),
            Some(outputs) => (Some(rows), pair(["q_out", "k_out"], outputs)?),
        };
        let norm = match &segment.norm {
            Some((weights, eps)) => Some((pair(["q_weight", "k_weight"], weights)?, *eps)),
            None => None,
        };
        let rotary = match &segment.rotary {
            Some((tables, pairing)) => Some((pair(["cos", "sin"], tables)?, *pairing)),
            None => None,
        };
        Ok(Self { inputs, outputs, norm, rotary })
    }

    fn read(&self) -> impl Iterator<Item = &Array> {
        let weights = self.norm.iter().flat_map(|(weights, _)| weights);
        let tables = self.rotary.iter().flat_map(|(tables, _)| tables);
        self.inputs.iter().flatten().chain(weights).chain(tables)
    }
}

/// A segment in memory that the device uses.
struct Opened<'a> {
    inputs: Option<[Input<'a>; 2]>,
    outputs: [Output<'a>; 2],
    norm: Option<([Input<'a>; 2], f32)>,
    rotary: Option<([Input<'a>; 2], RotaryPairing)>,
}

impl<'a> Opened<'a> {
    fn new(device: &varlen_fa::Device, arrays: &'a Arrays) -> PyResult<Self> {
        let pair = |[a, b]: &'a [Array; 2]| Ok::<_, PyErr>([Input::new(device, a)?, Input::new(device, b)?]);
        let [q, k] = &arrays.outputs;
        Ok(Self {
            inputs: arrays.inputs.as_ref().map(pair).transpose()?,
            outputs: [Output::new(device, q)?, Output::new(device, k)?],
            norm: arrays.norm.as_ref().map(|(weights, eps)| Ok::<_, PyErr>((pair(weights)?, *eps))).transpose()?,
            rotary: arrays.rotary.as_ref().map(|(tables, of)| Ok::<_, PyErr>((pair(tables)?, *of))).transpose()?,
        })
    }

    fn call(&mut self) -> varlen_fa::QkSegment<'_> {
        let [q_out, k_out] = self.outputs.each_mut().map(Output::view_mut);
        let mut segment = match &self.inputs {
            Some([q, k]) => varlen_fa::QkSegment::copied(q.view(), k.view(), q_out, k_out),
            None => varlen_fa::QkSegment::in_place(q_out, k_out),
        };
        if let Some(([q, k], eps)) = &self.norm {
            segment = segment.with_norm(QkNorm::new(q.view(), k.view(), *eps));
        }
        if let Some(([cos, sin], pairing)) = &self.rotary {
            segment = segment.with_rotary(Rotary::new(cos.view(), sin.view(), *pairing));
        }
        segment
    }
}

/// QK-norm and rotary embedding of 1 to 8 segments in one call. Rows of tokens that `mask` or `meta`
/// drop, [B, S] over the segments one after another, are neither read nor written.
#[pyfunction]
#[pyo3(signature = (segments, *, mask=None, meta=None, device=None))]
pub(crate) fn prepare_qk(
    py: Python<'_>,
    segments: Vec<Bound<'_, QkSegment>>,
    mask: Option<&Bound<'_, PyAny>>,
    meta: Option<&Bound<'_, Meta>>,
    device: Option<&Bound<'_, Device>>,
) -> PyResult<()> {
    let limit = varlen_fa::QkSegment::MAX;
    let Some(first) = segments.first().filter(|_| segments.len() <= limit) else {
        return Err(Cause::Shape.argument("segments", format!("1 to {limit} segments"), segments.len()));
    };
    if mask.is_some() && meta.is_some() {
        return Err(Cause::Value.argument("mask", "None beside `meta`", "a mask"));
    }
    let mask = mask.map(KeyMask::of_object).transpose()?;
    let arrays = segments.iter().enumerate().map(|(at, segment)| Arrays::new(py, at, segment.get()));
    let arrays = arrays.collect::<PyResult<Vec<_>>>()?;
    let device = device::of_call(device, first.get().rows[0].bind(py), &arrays[0].outputs[0])?.0;
    let outputs: Vec<_> = arrays.iter().flat_map(|arrays| &arrays.outputs).collect();
    let inputs: Vec<_> = arrays.iter().flat_map(Arrays::read).collect();
    expect_apart(&outputs, &inputs)?;
    let mut opened = arrays.iter().map(|arrays| Opened::new(&device, arrays)).collect::<PyResult<Vec<_>>>()?;
    {
        let calls: Vec<_> = opened.iter_mut().map(Opened::call).collect();
        let tokens = match (&mask, meta) {
            (Some(mask), _) => TokenMask::from(&mask.0),
            (None, Some(meta)) => TokenMask::from(&meta.get().0),
            (None, None) => TokenMask::all(),
        };
        py.detach(|| varlen_fa::prepare_qk(&device, calls, tokens)).or_raise()?;
    }
    opened.into_iter().flat_map(|opened| opened.outputs).try_for_each(Output::finish)
}
