"""Host time of an attention call on a tiny tensor by each way that Python has into the library, in
turns; the fastest of many rounds: [1, 4, 1, 8] f32 in host memory, and [1, 64, 1, 64] bf16 on a GPU
where PyTorch has one.

    cargo build --release -p varlen-fa-capi
    VARLEN_FA_THREADS=1 python python/benches/host_time.py [target/release/libvarlen_fa.so]

The rows "out given" write to a tensor that is there. The binding by ctypes takes descriptors: "made
in each call" is a program that has new tensors, "kept" one that calls with the same again.
"""

import importlib.util
import sys
import time
from pathlib import Path

import numpy as np

import varlen_fa

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, CALLS = 40, 300


def by_ctypes(library, q, k, v, out):
    spec = importlib.util.spec_from_file_location("varlen_fa_ctypes", ROOT / "capi/python/varlen_fa.py")
    binding = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(binding)
    opened = binding.Library(str(library))
    device, mask = opened.open_cpu(1), binding.varlen(opened.meta_from_lengths([3], 4))

    def view(x):
        strides = [stride // x.itemsize for stride in x.strides]
        return binding.tensor(x.ctypes.data, x.shape, strides, binding.F32, binding.HOST)

    kept = [view(x) for x in (q, k, v, out)]
    return {
        "ctypes, descriptors made in each call": lambda: device.forward(view(q), view(k), view(v), view(out), mask),
        "ctypes, descriptors kept": lambda: device.forward(*kept, mask),
    }


def by_torch_on_cuda(torch, operators):
    """The host's part alone: nobody waits for the GPU but between the rounds."""
    q, k, v = (torch.randn(1, 64, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out, meta = torch.empty_like(q), varlen_fa.Meta.from_lengths([40], 64)
    keep = torch.arange(64, device="cuda")[None] < 40
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {
        "CUDA, out given": lambda: varlen_fa.attention(q, k, v, meta=meta, out=out),
        "CUDA": lambda: varlen_fa.attention(q, k, v, meta=meta),
        "CUDA, operator, a mask": lambda: operators.attention(q, k, v, keep, zero_masked=True),
        "CUDA, SDPA": lambda: sdpa(*heads_first),
        "CUDA, SDPA, a mask": lambda: sdpa(*heads_first, keep[:, None, None]),
    }


def main():
    q, k, v = (np.random.default_rng(0).standard_normal((1, 4, 1, 8), dtype=np.float32) for _ in range(3))
    out, meta = np.empty_like(q), varlen_fa.Meta.from_lengths([3], 4)
    ways = {
        "NumPy, out given": lambda: varlen_fa.attention(q, k, v, meta=meta, out=out),
        "NumPy": lambda: varlen_fa.attention(q, k, v, meta=meta),
    }
    wait = None
    try:
        import torch

        import varlen_fa.torch as operators
    except ImportError:
        print("PyTorch is not installed: its rows are left out")
    else:
        torch.set_grad_enabled(False)
        tq, tk, tv, tout = (torch.from_numpy(x) for x in (q, k, v, out))
        keep = torch.tensor([[True, True, True, False]])
        ways |= {
            "PyTorch, out given": lambda: varlen_fa.attention(tq, tk, tv, meta=meta, out=tout),
            "PyTorch": lambda: varlen_fa.attention(tq, tk, tv, meta=meta),
            "PyTorch operator, a mask": lambda: operators.attention(tq, tk, tv, keep, zero_masked=True),
            "PyTorch's own SDPA, a mask": lambda: torch.nn.functional.scaled_dot_product_attention(
                tq.transpose(1, 2), tk.transpose(1, 2), tv.transpose(1, 2), keep[:, None, None]
            ),
        }
        if torch.cuda.is_available():
            ways |= by_torch_on_cuda(torch, operators)
            wait = torch.cuda.synchronize
    if len(sys.argv) > 1:
        ways |= by_ctypes(sys.argv[1], q, k, v, out)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, call in ways.items():
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.perf_counter() - started) / CALLS)
            if wait is not None:
                wait()
    for name, seconds in best.items():
        print(f"{name:40} {1e6 * seconds:6.2f} µs")


if __name__ == "__main__":
    main()
