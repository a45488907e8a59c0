"""Exceptions of varlen_fa: one class for each cause. Messages name the argument, what was expected
and what came."""


class VarlenFaError(Exception):
    """A call was refused or failed. Every exception of this package is one."""


class ShapeError(VarlenFaError, ValueError):
    """A shape, a number of elements or a size does not fit the other arguments or the limits."""


class DTypeError(VarlenFaError, TypeError):
    """An element type is not supported by the device, or does not fit the other arguments."""


class LayoutError(VarlenFaError, ValueError):
    """Strides, alignment or memory do not fit: a last dimension that is not contiguous, an output
    that is read-only or shares memory with an input."""


class InvalidValueError(VarlenFaError, ValueError):
    """A value means nothing: a mask's, a length, a scale, a name."""


class DeviceMismatchError(VarlenFaError, ValueError):
    """A tensor lives on another device than the one that computes."""


class NotApplicableError(VarlenFaError, NotImplementedError):
    """The device has no kernel for the call, or not the path or kernel that was asked for."""


class GradientError(VarlenFaError, NotImplementedError):
    """A tensor requires gradients. This package computes no derivatives."""


class DeviceError(VarlenFaError, RuntimeError):
    """A device is not available, or failed."""


class DeviceLostError(DeviceError):
    """The device is gone, and with it every tensor on it."""


class RankError(VarlenFaError, RuntimeError):
    """A rank of sequence parallelism is lost, did not answer in time, or was given something else."""


class OutOfMemoryError(VarlenFaError, MemoryError):
    """Memory ran out, on the host or on a device."""
