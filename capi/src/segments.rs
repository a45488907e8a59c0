//! Tensors of attention in segments along S.

use varlen::{Device, Error, Segments, SegmentsMut};

use crate::arguments::{Name, expect_zeros, read, slice};
use crate::failure::Result;
use crate::tensors::{Described, Input, Output};
use crate::types::{varlen_fa_segments, varlen_fa_tensor};

/// What messages call a tensor and its segments.
#[derive(Debug)]
pub(crate) struct Names {
    whole: &'static str,
    segments: [&'static str; Segments::MAX],
}

macro_rules! names {
    ($($constant:ident $name:literal)*) => {
        $(pub(crate) static $constant: Names = Names {
            whole: $name,
            segments: [
                concat!("segments[0].", $name),
                concat!("segments[1].", $name),
                concat!("segments[2].", $name),
                concat!("segments[3].", $name),
                concat!("segments[4].", $name),
                concat!("segments[5].", $name),
                concat!("segments[6].", $name),
                concat!("segments[7].", $name),
            ],
        };)*
    };
}
names!(Q "q" K "k" V "v" OUT "out");

/// One value for each segment, in place if there is one segment alone.
#[derive(Debug)]
pub(crate) enum List<T> {
    One(T),
    Several(Vec<T>),
}

impl<T> List<T> {
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Several(several) => several,
        }
    }

    pub fn as_mut_slice(&mut self) -> &mut [T] {
        match self {
            Self::One(one) => std::slice::from_mut(one),
            Self::Several(several) => several,
        }
    }

    /// One value for each.
    pub fn try_map<U>(&self, mut map: impl FnMut(&T) -> Result<U>) -> Result<List<U>> {
        Ok(match self {
            Self::One(one) => List::One(map(one)?),
            Self::Several(several) => List::Several(several.iter().map(map).collect::<Result<_>>()?),
        })
    }
}

/// One tensor.
///
/// # Safety
/// As [`Described::new`].
pub(crate) unsafe fn whole<'a>(names: &Names, tensor: *const varlen_fa_tensor) -> Result<List<Described<'a>>> {
    // SAFETY: by this function's contract.
    unsafe { Described::new(names.whole, tensor) }.map(List::One)
}

/// A tensor in segments.
///
/// # Safety
/// `segments` is null, misaligned, or points to what C initialised, whose tensors obey
/// [`Described::new`].
pub(crate) unsafe fn parts<'a>(names: &Names, segments: *const varlen_fa_segments) -> Result<List<Described<'a>>> {
    let name = Name::of(names.whole);
    // SAFETY: by this function's contract.
    let segments = unsafe { read(name, segments) }?;
    expect_zeros(name.field("reserved"), &segments.reserved)?;
    let limit = Segments::MAX;
    if segments.count == 0 || segments.count > limit as u64 {
        let got = usize::try_from(segments.count).unwrap_or(usize::MAX);
        return Err(Error::SegmentCount { argument: names.whole, limit, got }.into());
    }
    // SAFETY: by this function's contract; as in the lines below.
    let tensors = unsafe { slice(name.field("tensors"), segments.tensors, segments.count) }?;
    if let [one] = tensors {
        // SAFETY: as above.
        return unsafe { whole(names, one) };
    }
    let mut described = Vec::with_capacity(tensors.len());
    for (tensor, segment_name) in tensors.iter().zip(names.segments) {
        // SAFETY: as above.
        described.push(unsafe { Described::new(segment_name, tensor) }?);
    }
    Ok(List::Several(described))
}

/// Inputs in memory that the device reads.
pub(crate) fn inputs<'a>(device: &Device, described: &List<Described<'a>>) -> Result<List<Input<'a>>> {
    described.try_map(|segment| Input::new(device, segment))
}

/// The same, to read.
pub(crate) fn views<'i>(inputs: &'i List<Input<'_>>) -> Segments<'i> {
    inputs.as_slice().iter().map(Input::view).collect()
}

/// The segments of an output, to write.
pub(crate) fn views_mut<'o>(outputs: &'o mut List<Output<'_>>) -> Result<SegmentsMut<'o>> {
    outputs.as_mut_slice().iter_mut().map(Output::view_mut).collect()
}
