//! Which keys each query sees, and what happens to its scores: `KeyRanges`, `ScoreModifiers`.

use pyo3::prelude::*;
use varlen_fa::RangesOf;

use crate::errors::{Cause, OrRaise};
use crate::masks::{CuSeqlens, numbers, table};

/// A range of keys for each query. Make it once a request, and give it to every call.
///
/// `of` is (B, Sq, Sk) for padded tensors, or (cu_seqlens_q, cu_seqlens_k) for packed rows.
#[pyclass(frozen, module = "varlen_fa")]
#[derive(Debug, Clone)]
pub(crate) struct KeyRanges(pub varlen_fa::KeyRanges);

fn of_object(of: &Bound<'_, PyAny>) -> PyResult<RangesOf> {
    if let Ok((batch, seq_q, seq_k)) = of.extract::<(usize, usize, usize)>() {
        return Ok([batch, seq_q, seq_k].into());
    }
    let Ok((query, key)) = of.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>() else {
        let expected = "(B, Sq, Sk) or (cu_seqlens_q, cu_seqlens_k)";
        return Err(Cause::Value.argument("of", expected, of));
    };
    let (query, key) = (CuSeqlens::of_object("cu_seqlens_q", &query)?, CuSeqlens::of_object("cu_seqlens_k", &key)?);
    Ok((&query.0, &key.0).into())
}

#[pymethods]
impl KeyRanges {
    /// Query i sees the keys up to its own place; the last query is level with the last key.
    #[staticmethod]
    fn causal(of: &Bound<'_, PyAny>) -> PyResult<Self> {
        varlen_fa::KeyRanges::causal(of_object(of)?).map(Self).or_raise()
    }

    /// Query i sees `left` keys before its place and `right` after it; None is no limit.
    #[staticmethod]
    fn window(of: &Bound<'_, PyAny>, left: Option<usize>, right: Option<usize>) -> PyResult<Self> {
        varlen_fa::KeyRanges::window(of_object(of)?, left, right).map(Self).or_raise()
    }

    /// Every query sees the first `count` keys, and the others up to its own place.
    #[staticmethod]
    fn prefix(of: &Bound<'_, PyAny>, count: usize) -> PyResult<Self> {
        varlen_fa::KeyRanges::prefix(of_object(of)?, count).map(Self).or_raise()
    }

    /// Tokens with the same number see one another; [B, S] numbers, those of a document together.
    #[staticmethod]
    fn from_document_ids(ids: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (batch, seq, ids) = table("ids", ids)?;
        varlen_fa::KeyRanges::from_document_ids(batch, seq, &ids).map(Self).or_raise()
    }

    /// [first, end) of each query: [B · Sq, 2] numbers for padded tensors, [total_q, 2] for packed rows.
    #[staticmethod]
    fn from_ranges(of: &Bound<'_, PyAny>, ranges: &Bound<'_, PyAny>) -> PyResult<Self> {
        let ranges: Vec<[usize; 2]> = numbers("ranges", ranges)?;
        varlen_fa::KeyRanges::from_ranges(of_object(of)?, &ranges).map(Self).or_raise()
    }

    /// The keys that both see.
    fn intersect(&self, other: &Self) -> PyResult<Self> {
        self.0.intersect(&other.0).map(Self).or_raise()
    }

    /// [first, end) of each query of a batch row or sequence.
    fn row(&self, b: usize) -> Vec<(u32, u32)> {
        self.0.row(b).iter().map(|&[first, end]| (first, end)).collect()
    }
}

/// What happens to scores between q·k and the softmax: a soft cap, ALiBi, attention sinks. Make them
/// once a layer of a model.
#[pyclass(frozen, module = "varlen_fa")]
#[derive(Debug, Clone)]
pub(crate) struct ScoreModifiers(pub varlen_fa::ScoreModifiers);

#[pymethods]
impl ScoreModifiers {
    /// `softcap`: scores stay between -softcap and softcap; 0 is no cap. `alibi`: a slope for each query
    /// head. `sinks`: one more score without a value for each query head.
    #[new]
    #[pyo3(signature = (*, softcap=0.0, alibi=None, sinks=None))]
    fn new(softcap: f32, alibi: Option<&Bound<'_, PyAny>>, sinks: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let mut modifiers = varlen_fa::ScoreModifiers::new().with_softcap(softcap);
        if let Some(alibi) = alibi {
            modifiers = modifiers.with_alibi(numbers::<Vec<f32>>("alibi", alibi)?);
        }
        if let Some(sinks) = sinks {
            modifiers = modifiers.with_sinks(numbers::<Vec<f32>>("sinks", sinks)?);
        }
        Ok(Self(modifiers))
    }
}

/// The slopes that ALiBi was published with, one for each of `num_heads` query heads.
#[pyfunction]
pub(crate) fn alibi_slopes(num_heads: usize) -> Vec<f32> {
    varlen_fa::alibi_slopes(num_heads)
}
