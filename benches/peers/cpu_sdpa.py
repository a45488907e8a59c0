#!/usr/bin/env python3
"""Times PyTorch's CPU scaled_dot_product_attention and this crate's CPU device on the same
workloads, in turns.

Both run in f32 on all cores. PyTorch gets contiguous [B, H, S, D] tensors, the layout that suits it
best, and runs once without a mask and once with a boolean key mask [B, 1, 1, S]. This crate runs
`cargo bench --bench attention` on [B, S, H, D]. Rounds alternate between the two, so that other
load on the machine affects both alike.

Both take the processor's best instruction set. For those of most desktops:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 VARLEN_FA_CPU=avx2 \\
        python benches/peers/cpu_sdpa.py

Needs torch: `pip install torch`, then `python benches/peers/cpu_sdpa.py`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
WORKLOADS = [
    "prefix:len=512:valid=512,512:heads=12:dim=64",
    "prefix:len=1024:valid=1024:heads=24:dim=128",
    "prefix:len=1024:valid=256,1024,512,256:heads=12:dim=64",
]


@dataclass
class Workload:
    """A `prefix` workload of the bench: the first `valid[b]` of `seq` tokens of batch row `b` are
    valid."""

    spec: str
    seq: int
    valid: list[int]
    heads: int
    dim: int

    @classmethod
    def parse(cls, spec: str) -> "Workload":
        kind, *parts = spec.split(":")
        fields = dict(part.split("=", 1) for part in parts)
        if kind != "prefix" or set(fields) != {"len", "valid", "heads", "dim"}:
            raise argparse.ArgumentTypeError(f"expected prefix:len=N:valid=A,B,...:heads=N:dim=N, got {spec!r}")
        valid = [int(length) for length in fields["valid"].split(",")]
        return cls(spec, int(fields["len"]), valid, int(fields["heads"]), int(fields["dim"]))

    def torch_calls(self) -> dict:
        """The calls to time, by the name of their row."""
        shape = (len(self.valid), self.heads, self.seq, self.dim)
        q, k, v = (torch.randn(shape) for _ in range(3))
        mask = torch.arange(self.seq)[None, None, None, :] < torch.tensor(self.valid)[:, None, None, None]
        return {
            "torch, no mask": lambda: F.scaled_dot_product_attention(q, k, v),
            "torch, key mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        }


@dataclass
class Samples:
    """Milliseconds: the best of each round, and its median."""

    best: list[float] = field(default_factory=list)
    median: list[float] = field(default_factory=list)


def time_torch(call, reps: int) -> tuple[float, float]:
    call()
    times = []
    for _ in range(reps):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times), statistics.median(times)


def run_ours(workloads: list[Workload], reps: int, threads: int) -> dict:
    """The bench's JSON records, by workload."""
    command = ["cargo", "bench", "--quiet", "--no-default-features", "--bench", "attention", "--"]
    command += ["--device", "cpu", "--dtype", "f32", "--reps", str(reps), "--json", "-"]
    for workload in workloads:
        command += ["--workload", workload.spec]
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {record["workload"]: record for record in records}


def print_table(workload: Workload, rows: dict[str, Samples]) -> None:
    best = {name: min(samples.best) for name, samples in rows.items()}
    median = {name: statistics.median(samples.median) for name, samples in rows.items()}
    pairs = sum(length * length for length in workload.valid) / (len(workload.valid) * workload.seq**2)
    print(f"\n{workload.spec}  ({pairs:.0%} of the pairs valid)")
    print(f"{'':24}{'best ms':>10}{'median ms':>12}{'speed / no mask':>18}{'speed / key mask':>18}")
    for name in rows:
        ratios = [f"{best[peer] / best[name]:.2f}x" for peer in ("torch, no mask", "torch, key mask")]
        print(f"{name:24}{best[name]:10.2f}{median[name]:12.2f}{ratios[0]:>18}{ratios[1]:>18}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Workload.parse, action="append", help="prefix:len=N:valid=A,B,...:heads=N:dim=N")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each library (default: %(default)s)")
    parser.add_argument("--reps", type=int, default=10, help="calls of each row in a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each library (default: all cores)")
    arguments = parser.parse_args()
    workloads = arguments.workload or [Workload.parse(spec) for spec in WORKLOADS]
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    tables = {workload.spec: {} for workload in workloads}
    calls = {workload.spec: workload.torch_calls() for workload in workloads}
    for _ in range(arguments.rounds):
        ours = run_ours(workloads, arguments.reps, arguments.threads)
        for workload in workloads:
            record = ours[workload.spec]
            figures = {name: time_torch(call, arguments.reps) for name, call in calls[workload.spec].items()}
            figures["ours, dense"] = (record["dense_min_ms"], record["dense_ms"])
            figures[f"ours, varlen ({record['path']})"] = (record["varlen_min_ms"], record["varlen_ms"])
            for name, (best, median) in figures.items():
                samples = tables[workload.spec].setdefault(name, Samples())
                samples.best.append(best)
                samples.median.append(median)

    print(f"torch {torch.__version__} on {arguments.threads} threads, {torch.backends.cpu.get_cpu_capability()}; f32")
    print(f"{arguments.rounds} rounds of {arguments.reps} calls; best of all, median of the rounds' medians; ratios of the best")
    for workload in workloads:
        print_table(workload, tables[workload.spec])


if __name__ == "__main__":
    main()
