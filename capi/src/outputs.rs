//! What attention and merges write: rows, and their log-sum-exp where it is asked for.

use varlen::{AttentionOutputs, Device, TensorViewMut};

use crate::failure::Result;
use crate::tensors::{Described, Output, finish};

/// The outputs of one call.
pub(crate) struct Outputs<'a> {
    out: Output<'a>,
    lse: Option<Output<'a>>,
}

impl<'a> Outputs<'a> {
    pub fn new(device: &Device, out: &Described<'a>, lse: Option<&Described<'a>>) -> Result<Self> {
        let lse = lse.map(|lse| Output::new(device, lse)).transpose()?;
        Ok(Self { out: Output::new(device, out)?, lse })
    }

    /// The rows and the log-sum-exp, to write.
    pub fn views(&mut self) -> Result<(TensorViewMut<'_>, Option<TensorViewMut<'_>>)> {
        Ok((self.out.view_mut()?, self.lse.as_mut().map(Output::view_mut).transpose()?))
    }

    /// The same as the library's pair.
    pub fn of_attention(&mut self) -> Result<AttentionOutputs<'_>> {
        let (out, lse) = self.views()?;
        let outputs = AttentionOutputs::new(out);
        Ok(match lse {
            Some(lse) => outputs.with_lse(lse),
            None => outputs,
        })
    }

    /// Fetches what the device wrote.
    pub fn finish(self) -> Result<()> {
        match self.lse {
            Some(lse) => finish([self.out, lse]),
            None => finish([self.out]),
        }
    }
}
