//! Tensors of attention calls, each whole or in a list of segments along S.

use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use varlen_fa::{Segments, SegmentsMut};

use crate::arrays::Array;
use crate::errors::Cause;
use crate::memory::{Input, Output};

/// A tensor [B, S, H, D], or a list or tuple of segments [B, S_i, H, D] that stand for it.
#[derive(Debug)]
pub(crate) struct Parts<'py> {
    /// The tensor, or the first segment: results are made as it is.
    first: Bound<'py, PyAny>,
    arrays: Vec<Array>,
}

impl<'py> Parts<'py> {
    /// `name` is the argument's, for messages.
    pub fn new(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let segments: Vec<Bound<'py, PyAny>> = if let Ok(list) = object.cast::<PyList>() {
            list.iter().collect()
        } else if let Ok(tuple) = object.cast::<PyTuple>() {
            tuple.iter().collect()
        } else {
            return Ok(Self { first: object.clone(), arrays: vec![Array::new(name, object)?] });
        };
        let limit = Segments::MAX;
        let Some(first) = segments.first().filter(|_| segments.len() <= limit) else {
            let expected = format!("a tensor, or a list of 1 to {limit} segments");
            return Err(Cause::Shape.argument(name, expected, format!("{} segments", segments.len())));
        };
        // The library's names; a list of one is the tensor itself.
        let array = |(at, segment)| match segments.len() {
            1 => Array::new(name, segment),
            _ => Array::new(format!("segments[{at}].{name}"), segment),
        };
        let arrays = segments.iter().enumerate().map(array).collect::<PyResult<_>>()?;
        Ok(Self { first: first.clone(), arrays })
    }

    pub fn arrays(&self) -> &[Array] {
        &self.arrays
    }

    /// The tensor or the first segment.
    pub fn first(&self) -> (&Bound<'py, PyAny>, &Array) {
        (&self.first, &self.arrays[0])
    }

    /// [B, S, H, D] of all segments together, as far as it can be told before the call is checked.
    pub fn shape(&self) -> PyResult<[usize; 4]> {
        let mut joint = [0; 4];
        for (at, array) in self.arrays.iter().enumerate() {
            let &[batch, seq, heads, dim] = array.shape() else {
                let got = format!("{:?}", array.shape());
                return Err(Cause::Shape.argument(array.name(), "4 dimensions, [B, S, H, D]", got));
            };
            joint = if at == 0 {
                [batch, seq, heads, dim]
            } else {
                [joint[0], joint[1].saturating_add(seq), joint[2], joint[3]]
            };
        }
        Ok(joint)
    }

    /// In memory that the device reads.
    pub fn inputs(&self, device: &varlen_fa::Device) -> PyResult<Vec<Input<'_>>> {
        self.arrays.iter().map(|array| Input::new(device, array)).collect()
    }

    /// In memory that the device writes.
    pub fn outputs(&self, device: &varlen_fa::Device) -> PyResult<Vec<Output<'_>>> {
        self.arrays.iter().map(|array| Output::new(device, array)).collect()
    }
}

pub(crate) fn segments<'a>(inputs: &'a [Input<'_>]) -> Segments<'a> {
    inputs.iter().map(Input::view).collect::<Segments<'a>>()
}

pub(crate) fn segments_mut<'a>(outputs: &'a mut [Output<'_>]) -> SegmentsMut<'a> {
    outputs.iter_mut().map(Output::view_mut).collect::<SegmentsMut<'a>>()
}
