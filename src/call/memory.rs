//! Memory as backends see it: bytes of the host, or a buffer of a device; and tensors in it.

use std::any::Any;
use std::fmt::{self, Debug};
use std::ops::Range;
use std::sync::Arc;

use crate::cache::DeviceId;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::BackendKind;
use crate::layout::Layout;
use crate::process::OfProcess;

/// Memory of a device other than the host.
pub(crate) trait DeviceBuffer: Any + Debug + Send + Sync {
    /// Device that owns the memory.
    fn device(&self) -> DeviceId;
    /// The device's name, for messages.
    fn device_name(&self) -> &str;
    /// Size in bytes.
    fn size(&self) -> u64;
    /// The address space that [`touched`](Self::touched) counts in; never 0, which is the host's.
    fn space(&self) -> u64;
    /// What a launch that uses these bytes of the buffer keeps from others, in the address space.
    fn touched(&self, bytes: Range<u64>) -> Range<u64>;
    /// The device address of the first byte, on CUDA.
    fn cuda_address(&self) -> Option<u64> {
        None
    }
    /// For the owning backend to find its own type.
    fn as_any(&self) -> &dyn Any;
}

/// Memory that a tensor owns.
pub(crate) enum Storage {
    /// Host memory, in words that are aligned for every element type.
    Host(Vec<u64>),
    Device(OfProcess<dyn DeviceBuffer>),
}

/// Memory to read.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    Host(&'a [u8]),
    Device(&'a dyn DeviceBuffer),
}

/// Memory to write. Device memory is written by the device, so a shared reference is enough; that no input shares it is
/// checked in `problem`.
pub(crate) enum Sink<'a> {
    Host(&'a mut [u8]),
    Device(&'a dyn DeviceBuffer),
}

impl Storage {
    /// Memory of a device.
    pub(crate) fn device(buffer: impl DeviceBuffer) -> Self {
        Self::Device(OfProcess::new(Arc::new(buffer)))
    }

    /// The memory, to read.
    pub(crate) fn source(&self) -> Source<'_> {
        match self {
            Self::Host(words) => Source::Host(bytemuck::cast_slice(words)),
            Self::Device(buffer) => Source::Device(&***buffer),
        }
    }

    /// The memory, to write.
    pub(crate) fn sink(&mut self) -> Sink<'_> {
        match self {
            Self::Host(words) => Sink::Host(bytemuck::cast_slice_mut(words)),
            Self::Device(buffer) => Sink::Device(&***buffer),
        }
    }
}

impl<'a> Source<'a> {
    /// The buffer as the type of the device that owns it, given that device's id and name.
    pub(crate) fn owned_by<B: DeviceBuffer>(self, id: DeviceId, name: &str) -> Result<&'a B> {
        match self {
            Self::Device(buffer) => owned_by(buffer, id, name),
            Self::Host(_) => Err(foreign_memory(name, BackendKind::Cpu.name())),
        }
    }
}

impl<'a> Sink<'a> {
    /// The same memory, for a shorter time.
    pub(crate) fn reborrow(&mut self) -> Sink<'_> {
        match self {
            Self::Host(bytes) => Sink::Host(bytes),
            Self::Device(buffer) => Sink::Device(*buffer),
        }
    }

    /// The memory, to read what was written.
    pub(crate) fn source(&self) -> Source<'_> {
        match self {
            Self::Host(bytes) => Source::Host(bytes),
            Self::Device(buffer) => Source::Device(*buffer),
        }
    }

    /// The buffer as the type of the device that owns it, given that device's id and name.
    pub(crate) fn owned_by<B: DeviceBuffer>(&self, id: DeviceId, name: &str) -> Result<&'a B> {
        match self {
            Self::Device(buffer) => owned_by(*buffer, id, name),
            Self::Host(_) => Err(foreign_memory(name, BackendKind::Cpu.name())),
        }
    }
}

fn owned_by<'a, B: DeviceBuffer>(buffer: &'a dyn DeviceBuffer, id: DeviceId, name: &str) -> Result<&'a B> {
    let own = buffer.as_any().downcast_ref().filter(|_| buffer.device() == id);
    own.ok_or_else(|| foreign_memory(name, buffer.device_name()))
}

/// Memory of another device, where memory of this one was expected.
pub(crate) fn foreign_memory(expected: &str, got: &str) -> Error {
    Error::DeviceMismatch { argument: "memory", expected: expected.to_owned(), got: got.to_owned() }
}

// Debug says where memory is, not what it holds: that may be gigabytes.

impl Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(words) => write!(f, "host memory, {} bytes", size_of_val(&words[..])),
            Self::Device(buffer) => buffer.fmt(f),
        }
    }
}

impl Debug for Source<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(bytes) => write!(f, "host memory, {} bytes", bytes.len()),
            Self::Device(buffer) => buffer.fmt(f),
        }
    }
}

impl Debug for Sink<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(bytes) => write!(f, "host memory, {} bytes", bytes.len()),
            Self::Device(buffer) => buffer.fmt(f),
        }
    }
}

/// A tensor to read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Input<'a> {
    pub memory: Source<'a>,
    pub layout: Layout,
    pub dtype: DType,
}

/// A tensor to write.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    pub memory: Sink<'a>,
    pub layout: Layout,
    pub dtype: DType,
}
