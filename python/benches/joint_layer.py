"""The joint layer of a diffusion transformer on the CPU, ours beside PyTorch's, in turns: RMS norm of the heads of q and k,
rotary embedding, and attention of a text and an image to both, from projected q, k and v to outputs.

    pip install torch ./python
    python python/benches/joint_layer.py

Ours are two calls on text and image where they lie: prepare_qk in place, as in a model, and attention with metadata.
PyTorch's are its operations as diffusers calls them for Qwen-Image: rms_norm, rotation by complex numbers, three
concatenations, scaled_dot_product_attention under the mask, and a split. PyTorch runs without a mask too ("all tokens"),
which computes what masked keys add. Tensors are [B, S, H, D] f32; both have the same number of threads. Outputs of valid
tokens are compared. The fastest and the median of the rounds count.
"""

import argparse
import os
import platform
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import varlen_fa

EPS = 1e-6
# Of 24 heads of 128, as Qwen-Image has: text, image, valid tokens of each prompt.
WORKLOADS = [(256, 1024, [200]), (256, 1024, [37, 211]), (512, 2304, [300])]


@dataclass
class Stream:
    """What a text or an image has."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    weights: tuple[torch.Tensor, torch.Tensor]
    rotations: torch.Tensor  # complex, [S, D / 2]

    @classmethod
    def random(cls, batch: int, seq: int, heads: int, dim: int, first: int) -> "Stream":
        q, k, v = (torch.randn(batch, seq, heads, dim) for _ in range(3))
        weights = torch.rand(dim) + 0.5, torch.rand(dim) + 0.5
        frequencies = 10_000.0 ** -(torch.arange(dim // 2) / (dim // 2))
        angles = torch.arange(first, first + seq)[:, None] * frequencies
        return cls(q, k, v, weights, torch.polar(torch.ones_like(angles), angles))

    def norm_and_rotate(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = F.rms_norm(x, (x.shape[-1],), weight, EPS)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.rotations[:, None]).flatten(-2)


def by_torch(streams: list[Stream], mask: torch.Tensor | None) -> list[torch.Tensor]:
    q = torch.cat([s.norm_and_rotate(s.q, s.weights[0]) for s in streams], dim=1)
    k = torch.cat([s.norm_and_rotate(s.k, s.weights[1]) for s in streams], dim=1)
    v = torch.cat([s.v for s in streams], dim=1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    # What the projections behind it take.
    return [part.flatten(2).contiguous() for part in out.split([s.q.shape[1] for s in streams], dim=1)]


def by_ours(streams: list[Stream], tables: list, meta: varlen_fa.Meta, device: varlen_fa.Device) -> list[torch.Tensor]:
    varlen_fa.prepare_qk(
        [varlen_fa.QkSegment(s.q, s.k, norm=(*s.weights, EPS), rotary=t) for s, t in zip(streams, tables)],
        meta=meta,
        device=device,
    )
    q, k, v = ([getattr(s, name) for s in streams] for name in "qkv")
    out = [torch.empty_like(x) for x in q]
    varlen_fa.attention(q, k, v, meta=meta, out=out, device=device)
    return [part.flatten(2) for part in out]


def measure(text: int, image: int, valid: list[int], arguments: argparse.Namespace) -> None:
    batch, heads, dim = len(valid), arguments.heads, arguments.dim
    streams = [Stream.random(batch, text, heads, dim, image), Stream.random(batch, image, heads, dim, 0)]
    tables = [(s.rotations.real.contiguous(), s.rotations.imag.contiguous()) for s in streams]
    keep = torch.ones(batch, text + image, dtype=torch.bool)
    keep[:, :text] = torch.arange(text) < torch.tensor(valid)[:, None]
    meta, mask = varlen_fa.Meta(keep), keep[:, None, None]
    device = varlen_fa.Device("cpu", threads=arguments.threads)

    # q and k are changed in place: each call of ours gets those of the beginning, outside of the time.
    given = [(s.q.clone(), s.k.clone()) for s in streams]

    def restore() -> None:
        for stream, (q, k) in zip(streams, given):
            stream.q.copy_(q)
            stream.k.copy_(k)

    calls = {
        "PyTorch, mask": lambda: by_torch(streams, mask),
        "PyTorch, all tokens": lambda: by_torch(streams, None),
        "ours": lambda: by_ours(streams, tables, meta, device),
    }
    outputs, times = {}, {name: [] for name in calls}
    for turn in range(arguments.rounds + 1):
        for name, call in calls.items():
            restore()
            start = time.perf_counter()
            outputs[name] = call()
            # The first one warms up.
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    expected, got = (torch.cat(outputs[name], dim=1)[keep] for name in ("PyTorch, mask", "ours"))
    error = (got - expected).abs().max().item()
    if not error < 1e-4:
        raise SystemExit(f"ours differs from PyTorch's by {error}")

    print(f"\nB {batch}, text {text} ({valid} valid), image {image}, {heads} heads of {dim}; largest difference {error:.1e}")
    best = {name: min(of) for name, of in times.items()}
    median = {name: statistics.median(of) for name, of in times.items()}
    for name in calls:
        ratios = best[name] / best["ours"], median[name] / median["ours"]
        print(
            f"  {name:20} best {1e3 * best[name]:9.2f} ms, median {1e3 * median[name]:9.2f} ms,"
            f" over ours {ratios[0]:5.2f}x, {ratios[1]:5.2f}x",
            flush=True,
        )


def workload(text: str) -> tuple[int, int, list[int]]:
    seq, image, valid = text.split(":")
    return int(seq), int(image), [int(length) for length in valid.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=workload, action="append", help="TEXT:IMAGE:VALID[,VALID...], in tokens")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each (default: all processors)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {arguments.threads} threads; {platform.machine()}; load {os.getloadavg()[0]:.1f}")
    with torch.inference_mode():
        for text, image, valid in arguments.workload or WORKLOADS:
            measure(text, image, valid, arguments)


if __name__ == "__main__":
    main()
