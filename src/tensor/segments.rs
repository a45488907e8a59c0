//! Borrowed tensors that come in parts along S, each in memory of its own.

use std::borrow::Cow;

use super::{Tensor, TensorView, TensorViewMut};
use crate::call::memory::{Input, Output};
use crate::call::problem::ViewInfo;
use crate::call::segments::{MAX_SEGMENTS, Segmented};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// A tensor to read, `[B, S, H, D]`, in 1 to 8 segments `[B, S_i, H, D]` that follow one another along S: the text and the image
/// of a joint layer, which then need not be concatenated. Each segment has its own memory and strides; any may be empty. A view, a
/// [`Tensor`], an array and a `Vec` of either convert to it, and one segment is the same call as the tensor itself.
///
/// ```
/// use varlen_fa::{AttentionMask, DType, Device, DeviceChoice, MaskedAttention, Tensor};
///
/// let device = Device::new(DeviceChoice::Cpu)?;
/// let [text, image] = [3, 5].map(|seq| Tensor::zeros(&device, DType::F32, &[2, seq, 4, 8]));
/// let (text, image) = (text?, image?);
/// let x = [&text, &image];
/// let attended = MaskedAttention::new(&device).forward(x, x, x, AttentionMask::none())?;
/// assert_eq!(attended.out.shape(), [2, 8, 4, 8]);
/// # Ok::<(), varlen_fa::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Segments<'a>(Segmented<TensorView<'a>>);

/// A tensor to write, in segments as those of [`Segments`]. They share no memory, but may take turns in one buffer of a device if
/// their strides are the same.
#[derive(Debug)]
pub struct SegmentsMut<'a>(Segmented<TensorViewMut<'a>>);

/// What both have: a limit, and conversions.
macro_rules! segments_of {
    ($segments:ident, $view:ident, $tensor:ty) => {
        impl<'a> $segments<'a> {
            /// Segments of one tensor, at most.
            pub const MAX: usize = MAX_SEGMENTS;
        }

        impl<'a> From<$view<'a>> for $segments<'a> {
            fn from(view: $view<'a>) -> Self {
                Self(Segmented::One(view))
            }
        }

        impl<'a> From<$tensor> for $segments<'a> {
            fn from(tensor: $tensor) -> Self {
                Self(Segmented::One(tensor.into()))
            }
        }

        impl<'a, T: Into<$view<'a>>> FromIterator<T> for $segments<'a> {
            fn from_iter<I: IntoIterator<Item = T>>(segments: I) -> Self {
                Self(segments.into_iter().map(Into::into).collect())
            }
        }

        impl<'a, T: Into<$view<'a>>, const N: usize> From<[T; N]> for $segments<'a> {
            fn from(segments: [T; N]) -> Self {
                segments.into_iter().collect()
            }
        }

        impl<'a, T: Into<$view<'a>>> From<Vec<T>> for $segments<'a> {
            fn from(segments: Vec<T>) -> Self {
                segments.into_iter().collect()
            }
        }
    };
}
segments_of!(Segments, TensorView, &'a Tensor);
segments_of!(SegmentsMut, TensorViewMut, &'a mut Tensor);

impl<'a> Segments<'a> {
    pub(crate) fn views(&self) -> &[TensorView<'a>] {
        self.0.as_slice()
    }

    pub(crate) fn infos(&self) -> Segmented<ViewInfo<'_>> {
        self.0.each_ref().map(TensorView::info)
    }

    pub(crate) fn inputs(self) -> Segmented<Input<'a>> {
        self.0.map(TensorView::input)
    }

    /// The shape and the element type of all together, as far as they can be told before they are checked.
    ///
    /// # Errors
    /// [`Error::SegmentCount`] without a segment.
    pub(crate) fn joint(&self, argument: &'static str) -> Result<(Cow<'_, [usize]>, DType)> {
        let segments = self.0.as_slice();
        let Some(first) = segments.first() else {
            return Err(Error::SegmentCount { argument, limit: MAX_SEGMENTS, got: 0 });
        };
        let mut shape = Cow::Borrowed(first.shape());
        for segment in &segments[1..] {
            if let ([_, joint, ..], [_, seq, ..]) = (&mut shape.to_mut()[..], segment.shape()) {
                *joint = joint.saturating_add(*seq);
            }
        }
        Ok((shape, first.dtype()))
    }
}

impl<'a> SegmentsMut<'a> {
    pub(crate) fn views(&self) -> &[TensorViewMut<'a>] {
        self.0.as_slice()
    }

    pub(crate) fn into_views(self) -> Vec<TensorViewMut<'a>> {
        match self.0 {
            Segmented::One(view) => vec![view],
            Segmented::Several(views) => views,
        }
    }

    pub(crate) fn infos(&self) -> Segmented<ViewInfo<'_>> {
        self.0.each_ref().map(TensorViewMut::info)
    }

    pub(crate) fn outputs(self) -> Segmented<Output<'a>> {
        self.0.map(TensorViewMut::output)
    }

    /// The view, where a call takes no segments.
    ///
    /// # Errors
    /// [`Error::SegmentCount`] if there are several.
    pub(crate) fn one(&self, argument: &'static str) -> Result<&TensorViewMut<'a>> {
        self.0.whole(argument)
    }
}
