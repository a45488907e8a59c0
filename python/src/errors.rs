//! Exceptions: the classes of `varlen_fa._errors`, one for each cause.

use std::fmt::Display;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use varlen_fa::Error;

/// Why a call was refused or failed: a class of `varlen_fa._errors`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    Shape,
    DType,
    Layout,
    Value,
    DeviceMismatch,
    NotApplicable,
    OutOfMemory,
    DeviceLost,
    Device,
    Rank,
    /// None of the others.
    Other,
}

impl Cause {
    /// Name of the class, and where it is kept once it was looked up.
    fn class(self) -> (&'static str, &'static PyOnceLock<Py<PyType>>) {
        macro_rules! class {
            ($name:literal) => {{
                static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
                ($name, &CLASS)
            }};
        }
        match self {
            Self::Shape => class!("ShapeError"),
            Self::DType => class!("DTypeError"),
            Self::Layout => class!("LayoutError"),
            Self::Value => class!("InvalidValueError"),
            Self::DeviceMismatch => class!("DeviceMismatchError"),
            Self::NotApplicable => class!("NotApplicableError"),
            Self::OutOfMemory => class!("OutOfMemoryError"),
            Self::DeviceLost => class!("DeviceLostError"),
            Self::Device => class!("DeviceError"),
            Self::Rank => class!("RankError"),
            Self::Other => class!("VarlenFaError"),
        }
    }

    fn of(error: &Error) -> Self {
        match error {
            Error::Rank { .. }
            | Error::Shape { .. }
            | Error::Broadcast { .. }
            | Error::HeadsNotDivisible { .. }
            | Error::HeadDim { .. }
            | Error::SegmentCount { .. }
            | Error::RotaryDim { .. }
            | Error::Length { .. }
            | Error::MaskSize { .. }
            | Error::RangesSize { .. }
            | Error::TooLarge { .. } => Self::Shape,
            Error::UnsupportedDType { .. } | Error::DTypeMismatch { .. } => Self::DType,
            Error::InnerStride { .. }
            | Error::Misaligned { .. }
            | Error::BufferTooSmall { .. }
            | Error::Overlap { .. }
            | Error::SelfOverlap { .. }
            | Error::View { .. } => Self::Layout,
            Error::Eps { .. }
            | Error::MaskRow { .. }
            | Error::CuSeqlens { .. }
            | Error::SoftmaxScale { .. }
            | Error::ScoreModifier { .. }
            | Error::Environment { .. }
            | Error::UnknownKernel { .. }
            | Error::UnknownDevice { .. }
            | Error::Sharding { .. }
            | Error::Handle { .. } => Self::Value,
            Error::DeviceMismatch { .. } | Error::DeviceKind { .. } => Self::DeviceMismatch,
            Error::NotApplicable { .. } => Self::NotApplicable,
            Error::OutOfMemory { .. } => Self::OutOfMemory,
            Error::DeviceLost { .. } => Self::DeviceLost,
            Error::StreamCaptured { .. } | Error::DeviceUnavailable { .. } | Error::Backend { .. } => Self::Device,
            Error::RanksDiffer { .. } | Error::RankLost { .. } | Error::RankTimedOut { .. } => Self::Rank,
            _ => Self::Other,
        }
    }

    /// The exception, with a message that names the argument.
    pub fn exception(self, message: String) -> PyErr {
        let (name, class) = self.class();
        Python::attach(|py| match class.import(py, "varlen_fa._errors", name) {
            Ok(class) => PyErr::from_type(class.clone(), message),
            Err(error) => error,
        })
    }

    /// Of an argument: what was expected, and what came.
    pub fn argument(self, name: impl Display, expected: impl Display, got: impl Display) -> PyErr {
        self.exception(format!("`{name}`: expected {expected}, got {got}"))
    }
}

/// The exception of a library's error.
pub(crate) fn exception(error: Error) -> PyErr {
    Cause::of(&error).exception(error.to_string())
}

/// Turns the library's errors into exceptions.
pub(crate) trait OrRaise<T> {
    fn or_raise(self) -> PyResult<T>;
}

impl<T> OrRaise<T> for varlen_fa::Result<T> {
    fn or_raise(self) -> PyResult<T> {
        self.map_err(exception)
    }
}

/// The name of an object's type, for messages.
pub(crate) fn type_name(object: &Bound<'_, PyAny>) -> String {
    let name = object.get_type().fully_qualified_name();
    name.map_or_else(|_| "an object".to_owned(), |name| name.to_string())
}
