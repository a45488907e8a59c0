"""`python -m varlen_fa doctor`: what works on this machine, and what does not."""

import argparse
import ctypes
import platform
import sys

import varlen_fa


class _Floats:
    """f32 numbers as NumPy's array interface describes them, without NumPy."""

    def __init__(self, shape, numbers):
        self._numbers = (ctypes.c_float * len(numbers))(*numbers)
        address = ctypes.addressof(self._numbers)
        self.__array_interface__ = {"data": (address, True), "shape": shape, "typestr": "<f4", "version": 3}


def self_check(device):
    """Attention of a query to two keys, of which the second is masked, gives the first one's values.
    Returns whether it did, and what it gave."""
    values = [float(value) for value in range(1, 9)]
    q = _Floats((1, 1, 1, 8), values)
    kv = _Floats((1, 2, 1, 8), values + [1e9] * 8)
    out = varlen_fa.attention(q, kv, kv, varlen_fa.KeyMask.from_lengths([1], 2), device=device)
    got = out.tolist()
    return got == values, got


def doctor(out=sys.stdout):
    """Prints versions, devices, kernels and the result of a check of each device. Returns 0 if the
    CPU device works."""

    def line(text):
        print(text, file=out)

    line(f"varlen-fa {varlen_fa.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("numpy", "torch"):
        try:
            module = __import__(package)
        except ImportError:
            line(f"{package}: not installed")
        else:
            line(f"{package} {module.__version__}")
    line(f"kernels of this build: {', '.join(varlen_fa.KERNELS)}")
    cpu_works = False
    for name, is_available, description in varlen_fa.list_devices():
        line(description)
        if not is_available:
            continue
        try:
            device = varlen_fa.Device(name)
            right, got = self_check(device)
        except varlen_fa.VarlenFaError as error:
            line(f"  self-check failed: {error}")
            continue
        line(f"  kernels: {', '.join(device.kernels)}; element types: {', '.join(device.dtypes)}")
        line("  self-check: right" if right else f"  self-check: WRONG, {got}")
        cpu_works |= right and device.kind == "cpu"
    return 0 if cpu_works else 1


def main():
    parser = argparse.ArgumentParser(prog="python -m varlen_fa", description=__doc__)
    parser.add_argument("command", choices=["doctor"])
    parser.parse_args()
    return doctor()


if __name__ == "__main__":
    sys.exit(main())
