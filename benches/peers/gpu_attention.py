"""Compares this library, PyTorch's SDPA with a mask, and FlashAttention 2 and 3 on packed rows, in
one process on one NVIDIA GPU.

    cargo build --release -p varlen-fa-capi
    pip install torch triton numpy            # PyTorch 2.11 or newer; and fa3-fwd, on Hopper
    python benches/peers/gpu_attention.py [--dtype f16] [--workload NAME]... [--json FILE]
    python benches/peers/chart.py FILE CHART.svg

Every time is GPU time from CUDA-graph replays on rotating inputs, with the calls in turns. Before
that, every output is checked against a reference in f32. TFLOP/s count only valid pairs of query
and key; TB/s count bytes read and written.
"""

import argparse
import pathlib
import sys

import torch
import triton.testing  # noqa: F401  fails early, with a clear message, where Triton is missing

import pytorch_peers
from graph_timing import capture, medians_ms
from our_calls import OurCalls
from reference import Reference
from report import Report, facts
from workloads import WORKLOADS

# All sets of inputs together are several times as large as the cache.
SETS_BYTES = 400e6


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bf16", "f16"], default="bf16")
    parser.add_argument("--workload", action="append", choices=[workload.name for workload in WORKLOADS])
    parser.add_argument("--rounds", type=int, default=20, help="timed replays of each graph")
    parser.add_argument("--library", type=pathlib.Path, help="the C library, if it is not in target/release")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the results")
    return parser.parse_args()


def copy_tb_s(stream, mebibytes):
    """TB/s read and written by a device-to-device copy."""
    source = torch.empty(mebibytes << 20, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    graph = capture(stream, lambda _: target.copy_(source), [None] * 4)
    median, _, _ = medians_ms({"copy": graph}, 4, 10)["copy"]
    return 2 * source.numel() / median / 1e9


def matmul_tflops(stream, dtype):
    a, b = (torch.randn(8192, 8192, dtype=dtype, device="cuda") for _ in range(2))
    graph = capture(stream, lambda _: a @ b, [None] * 4)
    median, _, _ = medians_ms({"matmul": graph}, 4, 10)["matmul"]
    return 2 * 8192**3 / median / 1e9


def run(workload, dtype, stream, calls, rounds):
    """All figures of one workload."""
    rows = pytorch_peers.PackedRows(workload)
    sets = max(2, min(6, int(SETS_BYTES // (3 * workload.batch * workload.seq * workload.row_bytes)) + 1))
    padded = [[torch.randn(workload.shape, dtype=dtype, device="cuda") for _ in range(3)] for _ in range(sets)]
    packed = [rows.pack(*inputs) for inputs in padded]
    ours = calls.of(workload, padded, packed)

    # Name: (call that takes the index of a set, operations or bytes, unit, kind of output)
    def spread(inputs, call):
        return lambda at: call(*inputs[at])

    tflops, copied = (workload.flops, "TFLOP/s"), workload.row_bytes * workload.total_valid
    pack_bytes = (6 * copied, "TB/s")
    scatter_bytes = (copied + workload.row_bytes * workload.batch * workload.seq, "TB/s")
    methods = {}
    for name, call in ours.padded.items():
        methods[name] = (call, *tflops, "padded, zeros")
    for name, (call, zeros) in pytorch_peers.padded_peers(workload, rows).items():
        methods[name] = (spread(padded, call), *tflops, "padded, zeros" if zeros else "padded")
    for name, call in ours.packed.items():
        methods[name] = (call, *tflops, "packed")
    for name, call in pytorch_peers.packed_peers(rows).items():
        methods[name] = (spread(packed, call), *tflops, "packed")
    methods["ours: pack_qkv"] = (ours.pack, *pack_bytes, "copy")
    methods["triton pack"] = (spread(padded, rows.pack), *pack_bytes, "copy")
    methods["ours: scatter"] = (ours.scatter, *scatter_bytes, "copy")
    methods["triton scatter"] = (lambda at: rows.scatter(packed[at][0]), *scatter_bytes, "copy")

    reference = Reference(workload, rows, *padded[0])
    graphs, results = {}, {}
    for name, (call, amount, unit, kind) in methods.items():
        ours.poison()
        try:
            found = reference.check(call(0), kind) if kind != "copy" else ours.check_copy(name)
            graphs[name] = capture(stream, call, range(sets))
        except Exception as error:  # a peer may not support this shape: reported, not hidden
            torch.cuda.synchronize()
            print(f"  {name}: not run: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            continue
        results[name] = {"check": found, "unit": unit, "amount": amount}
    for name, (median, least, greatest) in medians_ms(graphs, sets, rounds).items():
        result = results[name]
        result.update(median_ms=median, min_ms=least, max_ms=greatest, rate=result.pop("amount") / median / 1e9)
    return results, ours.plan


def method_line(name, result, best):
    """What is printed of a method; `best` is the time of our fastest call that does the whole job,
    None for such a call."""
    against = f"{result['median_ms'] / best:5.2f}x of ours" if best else ""
    return (
        f"{name:28} {result['median_ms']:8.4f} ms  (from {result['min_ms']:.4f})  "
        f"{result['rate']:7.2f} {result['unit']:8} {result['check']:24} {against}"
    )


def main():
    options = arguments()
    if not torch.cuda.is_available():
        sys.exit("gpu_attention.py: skipped: PyTorch finds no NVIDIA GPU here")
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[options.dtype]
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls = OurCalls(options.library, stream)
        about = facts(
            calls.device,
            stream,
            dtype=options.dtype,
            copy_1gib_tb_s=copy_tb_s(stream, 1024),
            copy_100mib_tb_s=copy_tb_s(stream, 100),
            matmul_8192_tflops=matmul_tflops(stream, dtype),
            missing=pytorch_peers.missing(),
        )
        report = Report(about, "workloads")
        for workload in WORKLOADS:
            if options.workload and workload.name not in options.workload:
                continue
            results, plan = run(workload, dtype, stream, calls, options.rounds)
            best = min(result["median_ms"] for name, result in results.items() if name in calls.layer_names)
            shape = "x".join(map(str, workload.shape))
            report.add(
                workload.name,
                f"{workload.name}  [B, S, H, D] {shape}, {workload.valid_share:.1%} valid",
                {"name": workload.name, "shape": workload.shape, "valid_share": workload.valid_share},
                plan,
                results,
                lambda name, result: method_line(name, result, None if name in calls.layer_names else best),
                lambda _, result: not result["check"].startswith("WRONG"),
            )
            torch.cuda.empty_cache()
    report.finish(options.json)


if __name__ == "__main__":
    main()
