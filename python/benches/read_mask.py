"""Masks in a GPU's memory that the host has read beside those that it has not: `varlen_fa.torch.attention` with
read_mask="first" and with "never", where the GPU builds the metadata in each call. In turns, time of the GPU.

    pip install torch ./python
    python python/benches/read_mask.py

Masks are booleans with padding on the left, of 0 to 60 % of a row. A time is that of eight calls; outputs of both are
compared. bf16, [B, S, H, D].
"""

import argparse
import statistics

import torch

import varlen_fa.torch

# B, S, H, D.
WORKLOADS = [(8, 512, 16, 128), (8, 2048, 16, 128), (32, 512, 12, 64), (4, 8192, 16, 128)]
OPTIONS = {"no ranges": {}, "causal": {"causal": True}, "window of 64": {"window": (64, 64)}}
READINGS = ("first", "never")
CALLS = 8


def time_of(call) -> float:
    """Milliseconds of a call, the mean of several."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="times of each; the median is printed")
    rounds = parser.parse_args().rounds
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, bf16; read, not read")
    for batch, seq, heads, dim in WORKLOADS:
        q, k, v = (torch.randn(batch, seq, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        padding = torch.linspace(0, 0.6 * seq, batch, device="cuda").int()
        mask = torch.arange(seq, device="cuda") >= padding[:, None]
        row = f"{batch}, {seq}, {heads}x{dim}"
        for name, options in OPTIONS.items():
            def call(reading, options=options):
                return varlen_fa.torch.attention(q, k, v, mask, zero_masked=True, read_mask=reading, **options)

            outs = [call(reading) for reading in READINGS]
            torch.testing.assert_close(*outs, rtol=0.02, atol=0.02)
            times = {reading: [] for reading in READINGS}
            for _ in range(rounds):
                for reading in READINGS:
                    times[reading].append(time_of(lambda reading=reading: call(reading)))
            row += f" | {name}: " + ", ".join(f"{statistics.median(times[reading]):.3f} ms" for reading in READINGS)
        print(row)


if __name__ == "__main__":
    main()
