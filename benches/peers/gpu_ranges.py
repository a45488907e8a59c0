"""Compares causal masks with FlashAttention-3 and windows with FlashAttention-2, in one process on
one NVIDIA GPU of the Hopper generation.

    cargo build --release -p varlen-fa-capi
    pip install torch triton numpy fa3-fwd
    python benches/peers/gpu_ranges.py [--case NAME]... [--json FILE]

Times are of CUDA-graph replays on rotating inputs, with the calls in turns; ratios are the peer's
time over ours. Every output is checked against the first one of its case by its largest
difference; masked rows are left out. TFLOP/s count pairs of query and key that are seen.
"""

import argparse
import dataclasses
import pathlib
import sys

import torch

from graph_timing import capture, medians_ms
from our_calls import open_device, varlen_fa, view
from pytorch_peers import ValidRows, flash_attn_func, flash_attn_varlen_func, varlen_attn
from report import Report, facts

# All sets of inputs together are several times as large as the cache.
SETS_BYTES = 400e6
# Largest differences of outputs of about 1 in 16 bits.
TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """Self-attention of [batch, seq, heads, head_dim] tensors. A window of (left, right) keys, None
    without a limit; the first or last tokens of each row are masked."""

    name: str
    batch: int
    seq: int
    heads: int
    head_dim: int
    window: tuple
    kv_heads: int = 0
    padding: float = 0.0
    side: str = "left"

    @property
    def valid(self):
        # Evenly spread about the mean, so that rows differ.
        spread = torch.linspace(0.5, 1.5, self.batch) if self.batch > 1 else torch.ones(1)
        masked = (spread * self.padding * self.seq).round().long()
        place = torch.arange(self.seq)[None]
        return place >= masked[:, None] if self.side == "left" else place < self.seq - masked[:, None]


CAUSAL = (None, 0)
CASES = [
    Case("causal-2k", 8, 2048, 16, 128, CAUSAL),
    Case("causal-4k", 4, 4096, 16, 128, CAUSAL),
    Case("causal-16k", 1, 16384, 16, 128, CAUSAL),
    Case("causal-4k-gqa", 4, 4096, 32, 128, CAUSAL, kv_heads=8),
    Case("causal-4k-d64", 4, 4096, 32, 64, CAUSAL),
    Case("causal-4k-d256", 4, 4096, 8, 256, CAUSAL),
    Case("causal-2k-left30", 8, 2048, 16, 128, CAUSAL, padding=0.3),
    Case("causal-2k-left30-gqa", 8, 2048, 32, 128, CAUSAL, kv_heads=8, padding=0.3),
    Case("window-8k-right40", 4, 8192, 12, 64, (64, 64), padding=0.4, side="right"),
    Case("window-8k", 4, 8192, 12, 64, (64, 64)),
    Case("window-8k-d128", 2, 8192, 16, 128, (512, 0)),
]


def pairs(case):
    """Pairs of query and key that are seen, of one head."""
    left, right = (case.seq if side is None else side for side in case.window)
    total = 0
    for length in case.valid.sum(1).tolist():
        at = torch.arange(length)
        total += int(((at + right).clamp(max=length - 1) - (at - left).clamp(min=0) + 1).sum())
    return total


def peer_of(case):
    """The peer's name, and its call on padded tensors: FlashAttention-3 for causal masks, between pack
    and scatter where there is padding; PyTorch's FlashAttention-2 for windows, which published
    builds of FlashAttention-3 do not have."""
    rows = ValidRows(case.valid)
    is_causal = case.window == CAUSAL

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    def on_rows(q, k, v):
        sizes = rows.cu_seqlens, rows.cu_seqlens, rows.max_seqlen, rows.max_seqlen
        if is_causal:
            return first(flash_attn_varlen_func(q, k, v, *sizes, causal=True))
        window = tuple(-1 if side is None else side for side in case.window)
        return varlen_attn(q, k, v, *sizes, window_size=window)

    def padded(q, k, v):
        if q.shape == k.shape:
            q, k, v = rows.pack(q, k, v)
        else:
            q, (k, v) = rows.pack(q)[0], rows.pack(k, v)
        return rows.scatter(on_rows(q, k, v))

    def whole(q, k, v):
        if is_causal:
            return first(flash_attn_func(q, k, v, causal=True))
        return on_rows(*(tensor.flatten(0, 1) for tensor in (q, k, v))).view(q.shape)

    return "fa3" if is_causal else "fa2", padded if case.padding else whole


def run(case, dtype, stream, library, device, rounds):
    heads = [case.heads, case.kv_heads or case.heads, case.kv_heads or case.heads]
    bytes_of_set = 2 * sum(heads) * case.batch * case.seq * case.head_dim
    sets = max(2, min(6, int(SETS_BYTES // bytes_of_set) + 1))
    shape = lambda count: (case.batch, case.seq, count, case.head_dim)  # noqa: E731
    inputs = [[torch.randn(shape(count), dtype=dtype, device="cuda") for count in heads] for _ in range(sets)]
    outs = [torch.empty_like(q) for q, _, _ in inputs]
    views = [[view(tensor) for tensor in (*tensors, out)] for tensors, out in zip(inputs, outs)]
    ranges = library.key_ranges_window((case.batch, case.seq, case.seq), *case.window)
    if case.padding:
        valid = case.valid.to(torch.uint8).contiguous()
        meta = library.meta(library.key_mask_from_integers(valid.data_ptr(), 1, case.batch, case.seq))
        with_ranges, without = varlen_fa.varlen(meta, ranges=ranges), varlen_fa.varlen(meta)
    else:
        with_ranges, without = varlen_fa.none(ranges=ranges), varlen_fa.none()
    plan = varlen_fa.Plan()
    device.forward(*views[0], with_ranges, plan=plan)

    def ours(mask, **options):
        def call(at):
            device.forward(*views[at], mask, options=library.options(**options) if options else None)
            return outs[at]

        return call

    peer_name, peer = peer_of(case)
    methods = {
        peer_name: lambda at: peer(*inputs[at]),
        "ours": ours(with_ranges),
        "ours, sm80": ours(with_ranges, kernel="sm80"),
        "ours, no ranges": ours(without),
    }
    if case.padding:
        methods["ours, packed"] = ours(with_ranges, path="packed")
    valid = case.valid.cuda()
    operations = 4.0 * pairs(case) * case.heads * case.head_dim
    graphs, results, expected = {}, {}, None
    for name, call in methods.items():
        outs[0].fill_(float("nan"))
        got = call(0)
        check = "not checked"
        if name != "ours, no ranges":
            expected = got.clone() if expected is None else expected
            error = (got.float() - expected.float()).abs().max().item()
            zeros = bool((got[~valid] == 0).all()) if case.padding else True
            # Not `error > TOLERANCE`: NaN is wrong.
            check = f"{'ok' if error <= TOLERANCE and zeros else 'WRONG'} ({error:.1e})"
        graphs[name] = capture(stream, call, range(sets))
        results[name] = {"check": check}
    for name, (median, least, greatest) in medians_ms(graphs, sets, rounds).items():
        results[name].update(median_ms=median, min_ms=least, max_ms=greatest, tflops=operations / median / 1e9)
    for result in results.values():
        result["ratio"] = results[peer_name]["median_ms"] / result["median_ms"]
    return results, str(plan)


def line(name, result):
    return (
        f"{name:18} {result['median_ms']:8.4f} ms  (from {result['min_ms']:.4f})  {result['tflops']:7.1f} TFLOP/s  "
        f"{result['ratio']:5.3f}x peer  {result['check']}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bf16", "f16"], default="bf16")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--rounds", type=int, default=20, help="timed replays of each graph")
    parser.add_argument("--library", type=pathlib.Path, help="the C library, if it is not in target/release")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the results")
    options = parser.parse_args()
    if not torch.cuda.is_available() or flash_attn_varlen_func is None:
        sys.exit("gpu_ranges.py: skipped: it needs an NVIDIA GPU and FlashAttention-3")
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[options.dtype]
    torch.manual_seed(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        library, device = open_device(options.library, stream)
        report = Report(facts(device, stream, dtype=options.dtype), "cases")
        for case in CASES:
            if options.case and case.name not in options.case:
                continue
            results, plan = run(case, dtype, stream, library, device, options.rounds)
            title = f"{case.name}: {case.batch}x{case.seq}x{case.heads}x{case.head_dim}, window {case.window}"
            entry = {**dataclasses.asdict(case), "pairs": pairs(case)}
            report.add(case.name, title, entry, plan, results, line, lambda _, result: "WRONG" not in result["check"])
        report.finish(options.json)


if __name__ == "__main__":
    main()
