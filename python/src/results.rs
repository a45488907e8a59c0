//! What attention calls return: the output, and the log-sum-exp if it is wanted.

use pyo3::prelude::*;
use pyo3::types::PyBool;
use varlen_fa::{DType, Device, TensorViewMut};

use crate::arrays::{Array, delivered, new_like};
use crate::errors::Cause;
use crate::memory::{Output, expect_apart};
use crate::parts::Parts;

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

    pub fn is_wanted(&self) -> bool {
        !matches!(self, Self::None)
    }
}

/// A result, of the caller or made here.
struct MaybeNew<'py> {
    object: Bound<'py, PyAny>,
    is_new: bool,
}

impl<'py> MaybeNew<'py> {
    fn delivered(self, like: &Array) -> PyResult<Bound<'py, PyAny>> {
        if self.is_new { delivered(like, self.object) } else { Ok(self.object) }
    }
}

/// Results of a call, to be written.
pub(crate) struct Results<'a, 'py> {
    /// What new ones are made like.
    like: &'a Array,
    out: MaybeNew<'py>,
    lse: Option<MaybeNew<'py>>,
    out_parts: Parts<'py>,
    lse_array: Option<Array>,
}

/// Results in memory that the device writes.
pub(crate) struct Opened<'a> {
    pub out: Vec<Output<'a>>,
    pub lse: Option<Output<'a>>,
}

impl Opened<'_> {
    /// The output where segments make no sense.
    pub fn one(&mut self) -> PyResult<TensorViewMut<'_>> {
        self.one_and_lse().map(|(out, _)| out)
    }

    /// The output where segments make no sense, and the log-sum-exp.
    pub fn one_and_lse(&mut self) -> PyResult<(TensorViewMut<'_>, Option<TensorViewMut<'_>>)> {
        let segments = self.out.len();
        match &mut self.out[..] {
            [out] => Ok((out.view_mut(), self.lse.as_mut().map(Output::view_mut))),
            _ => Err(Cause::Shape.argument("out", "one tensor", format!("{segments} segments"))),
        }
    }
}

impl<'a, 'py> Results<'a, 'py> {
    /// An output alone, as [`new`](Self::new) has it.
    pub fn of_rows(
        like: (&Bound<'py, PyAny>, &'a Array),
        out: (Option<&Bound<'py, PyAny>>, &[usize]),
    ) -> PyResult<Self> {
        Self::new(like, out, (&LseArgument::None, &[]))
    }

    /// Those that the caller gave, and new ones of the kind of `like` where there are none.
    pub fn new(
        (like, array): (&Bound<'py, PyAny>, &'a Array),
        (out, out_shape): (Option<&Bound<'py, PyAny>>, &[usize]),
        (lse, lse_shape): (&LseArgument<'_, 'py>, &[usize]),
    ) -> PyResult<Self> {
        let given = |object: &Bound<'py, PyAny>| MaybeNew { object: object.clone(), is_new: false };
        let new =
            |shape, dtype| Ok::<_, PyErr>(MaybeNew { object: new_like(like, array, shape, dtype)?, is_new: true });
        let out = out.map_or_else(|| new(out_shape, None), |out| Ok(given(out)))?;
        let lse = match lse {
            LseArgument::None => None,
            LseArgument::New => Some(new(lse_shape, Some(DType::F32))?),
            LseArgument::Given(lse) => Some(given(lse)),
        };
        let out_parts = Parts::new("out", &out.object)?;
        let lse_array = Array::optional("lse", lse.as_ref().map(|lse| &lse.object))?;
        Ok(Self { like: array, out, lse, out_parts, lse_array })
    }

    /// Lets `call` write them on the device, unless they share memory with `inputs`. Returns `out`, or
    /// `(out, lse)`.
    pub fn write(
        self,
        py: Python<'py>,
        device: &Device,
        inputs: &[&Array],
        call: impl FnOnce(&mut Opened<'_>) -> PyResult<()>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let outputs: Vec<&Array> = self.out_parts.arrays().iter().chain(&self.lse_array).collect();
        // What is wrong with an input is not said of a result that was made like it.
        inputs.iter().try_for_each(|input| input.dtype().map(drop))?;
        expect_apart(&outputs, inputs)?;
        let lse = self.lse_array.as_ref().map(|lse| Output::new(device, lse)).transpose()?;
        let mut opened = Opened { out: self.out_parts.outputs(device)?, lse };
        call(&mut opened)?;
        opened.out.into_iter().chain(opened.lse).try_for_each(Output::finish)?;
        let out = self.out.delivered(self.like)?;
        match self.lse {
            None => Ok(out),
            Some(lse) => (out, lse.delivered(self.like)?).into_pyobject(py).map(Bound::into_any),
        }
    }
}
