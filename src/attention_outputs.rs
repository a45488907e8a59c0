//! Where an attention call writes: [`AttentionOutputs`].

use crate::call::problem::ViewInfo;
use crate::call::segments::Segmented;
use crate::tensor::{SegmentsMut, Tensor, TensorViewMut};

/// Memory of the caller that an attention call writes: the output, and the log-sum-exp of every row if it is wanted. An output
/// alone, a [`TensorViewMut`], a `&mut Tensor` or [`SegmentsMut`], converts to it.
///
/// ```
/// use varlen_fa::{AttentionMask, AttentionOutputs, DType, Device, DeviceChoice, MaskedAttention, Tensor};
///
/// let device = Device::new(DeviceChoice::Cpu)?;
/// let x = Tensor::from_slice(&device, &[0.5_f32; 2 * 5 * 4 * 8], &[2, 5, 4, 8])?;
/// let mut out = Tensor::zeros(&device, DType::F32, &[2, 5, 4, 8])?;
/// let mut lse = Tensor::zeros(&device, DType::F32, &[2, 4, 5])?;
/// let outputs = AttentionOutputs::new(&mut out).with_lse(&mut lse);
/// MaskedAttention::new(&device).forward_into(&x, &x, &x, AttentionMask::none(), outputs)?;
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug)]
pub struct AttentionOutputs<'a> {
    pub(crate) out: SegmentsMut<'a>,
    pub(crate) lse: Option<TensorViewMut<'a>>,
}

impl<'a> AttentionOutputs<'a> {
    /// The output alone, `[B, Sq, H, D]` of the element type of `q`, in one segment or several, whatever the segments of `q`.
    pub fn new(out: impl Into<SegmentsMut<'a>>) -> Self {
        Self { out: out.into(), lse: None }
    }

    /// With the log-sum-exp, `[B, H, Sq]` f32 over all segments: the natural logarithm of the sum of `exp(score)` of each row, −∞ for a query that
    /// sees no key or is masked, NaN where the row of the output is. The last dimension is contiguous.
    #[must_use]
    pub fn with_lse(mut self, lse: impl Into<TensorViewMut<'a>>) -> Self {
        self.lse = Some(lse.into());
        self
    }

    pub(crate) fn infos(&self) -> (Segmented<ViewInfo<'_>>, Option<ViewInfo<'_>>) {
        (self.out.infos(), self.lse.as_ref().map(TensorViewMut::info))
    }
}

impl<'a> From<SegmentsMut<'a>> for AttentionOutputs<'a> {
    fn from(out: SegmentsMut<'a>) -> Self {
        Self::new(out)
    }
}

impl<'a, T: Into<TensorViewMut<'a>>, const N: usize> From<[T; N]> for AttentionOutputs<'a> {
    fn from(out: [T; N]) -> Self {
        Self::new(out)
    }
}

impl<'a> From<TensorViewMut<'a>> for AttentionOutputs<'a> {
    fn from(out: TensorViewMut<'a>) -> Self {
        Self::new(out)
    }
}

impl<'a> From<&'a mut Tensor> for AttentionOutputs<'a> {
    fn from(out: &'a mut Tensor) -> Self {
        Self::new(out)
    }
}
