//! What attention and merges write: rows, and their log-sum-exp where it is asked for.

use varlen::{AttentionOutputs, Device, Error, TensorViewMut};

use crate::failure::Result;
use crate::segments::{self, List};
use crate::tensors::{Described, Output, finish};

/// The outputs of one call.
pub(crate) struct Outputs<'a> {
    out: List<Output<'a>>,
    lse: Option<Output<'a>>,
}

impl<'a> Outputs<'a> {
    /// Of rows in segments, and of the log-sum-exp of all of them.
    pub fn new(device: &Device, out: &List<Described<'a>>, lse: Option<&Described<'a>>) -> Result<Self> {
        let lse = lse.map(|lse| Output::new(device, lse)).transpose()?;
        Ok(Self { out: out.try_map(|out| Output::new(device, out))?, lse })
    }

    /// The rows of a whole tensor and the log-sum-exp, to write.
    pub fn views(&mut self) -> Result<(TensorViewMut<'_>, Option<TensorViewMut<'_>>)> {
        let out = match &mut self.out {
            List::One(out) => out.view_mut()?,
            List::Several(several) => {
                return Err(Error::SegmentCount { argument: "out", limit: 1, got: several.len() }.into());
            }
        };
        Ok((out, self.lse.as_mut().map(Output::view_mut).transpose()?))
    }

    /// The rows and the log-sum-exp as the library's pair.
    pub fn of_attention(&mut self) -> Result<AttentionOutputs<'_>> {
        let outputs = AttentionOutputs::new(segments::views_mut(&mut self.out)?);
        Ok(match &mut self.lse {
            Some(lse) => outputs.with_lse(lse.view_mut()?),
            None => outputs,
        })
    }

    /// Fetches what the device wrote.
    pub fn finish(self) -> Result<()> {
        match (self.out, self.lse) {
            (List::One(out), Some(lse)) => finish([out, lse]),
            (List::One(out), None) => finish([out]),
            (List::Several(mut outputs), lse) => {
                outputs.extend(lse);
                finish(outputs)
            }
        }
    }
}
