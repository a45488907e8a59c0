//! What attention calls return: the output, and the log-sum-exp if it is wanted.

use pyo3::prelude::*;
use pyo3::types::PyBool;
use varlen_fa::{DType, Device};

use crate::arrays::{Array, new_like};
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
}

/// Results of a call, to be written.
pub(crate) struct Results<'py> {
    out: Bound<'py, PyAny>,
    lse: Option<Bound<'py, PyAny>>,
    out_parts: Parts<'py>,
    lse_array: Option<Array>,
}

/// Results in memory that the device writes.
pub(crate) struct Opened<'a> {
    pub out: Vec<Output<'a>>,
    pub lse: Option<Output<'a>>,
}

impl<'py> Results<'py> {
    /// Those that the caller gave, and new ones of the kind of `like` where there are none.
    pub fn new(
        (like, array): (&Bound<'py, PyAny>, &Array),
        (out, out_shape): (Option<&Bound<'py, PyAny>>, &[usize]),
        (lse, lse_shape): (&LseArgument<'_, 'py>, &[usize]),
    ) -> PyResult<Self> {
        let out = out.map_or_else(|| new_like(like, array, out_shape, None), |out| Ok(out.clone()))?;
        let lse = match lse {
            LseArgument::None => None,
            LseArgument::New => Some(new_like(like, array, lse_shape, Some(DType::F32))?),
            LseArgument::Given(lse) => Some((*lse).clone()),
        };
        let (out_parts, lse_array) = (Parts::new("out", &out)?, Array::optional("lse", lse.as_ref())?);
        Ok(Self { out, lse, out_parts, lse_array })
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
        match self.lse {
            None => Ok(self.out),
            Some(lse) => (self.out, lse).into_pyobject(py).map(Bound::into_any),
        }
    }
}
