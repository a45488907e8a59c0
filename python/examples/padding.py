# %% [markdown]
# # What padding costs
#
# A batch holds texts of unequal length, padded to the longest. This notebook draws such batches, and
# how long attention takes as more of them is padding: by PyTorch's SDPA with a mask, by its SDPA as
# if every token counted, and by varlen_fa.
#
#     pip install ./python torch matplotlib
#     python python/examples/padding.py               # or cell by cell, in an editor that knows "# %%"
#     python python/examples/padding.py --device cuda --batch 8 --seq 4096 --heads 24 --dim 128
#
# The pictures go to the folder of `--pictures`. Without matplotlib the numbers are printed alone.

# %%
import argparse
import pathlib
import statistics
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

import varlen_fa

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="float32 on the CPU, bfloat16 on a GPU")
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--seq", type=int, default=512)
parser.add_argument("--heads", type=int, default=12)
parser.add_argument("--dim", type=int, default=64)
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--pictures", type=pathlib.Path, help="a folder for padding-masks.svg and padding-time.svg")
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
torch.manual_seed(0)
torch.set_grad_enabled(False)
FRACTIONS = [0.0, 0.15, 0.3, 0.45, 0.6, 0.75]

# %% [markdown]
# ## The batches
#
# One text is as long as the batch. The others are shorter, evenly from short to long, so that the
# wanted fraction of all tokens is padding.


# %%
def lengths_of(fraction):
    """Tokens of each text, so that about this fraction of the batch is padding."""
    batch, seq = options.batch, options.seq
    if batch == 1:
        return [max(1, round(seq * (1 - fraction)))]
    # Texts 1 to batch - 1 are short by `mean` on average, between nothing and twice that.
    mean = min(1.0, fraction * batch / (batch - 1))
    steepest = min(mean, 1 - mean)
    short = [mean + steepest * (2 * n / (batch - 2) - 1 if batch > 2 else 0) for n in range(batch - 1)]
    return [seq] + [max(1, round(seq * (1 - share))) for share in short]


batches = {fraction: lengths_of(fraction) for fraction in FRACTIONS}
keeps = {
    fraction: torch.arange(options.seq) < torch.tensor(lengths)[:, None] for fraction, lengths in batches.items()
}  # [B, S]
for fraction, lengths in batches.items():
    print(f"{1 - keeps[fraction].float().mean():4.0%} padding: lengths {lengths}")

# %% [markdown]
# ## The calls
#
# `varlen_fa` takes metadata that is made once a request, and `[B, S, H, D]`. The rows of padding are
# zeros in its output; SDPA computes something there that nobody reads.


# %%
def calls_of(fraction):
    """The three calls of a batch, by name."""
    shape = (options.batch, options.seq, options.heads, options.dim)
    q, k, v = (torch.randn(shape, device=options.device, dtype=dtype) for _ in range(3))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    keep = keeps[fraction].to(options.device)
    meta = varlen_fa.Meta.from_lengths(batches[fraction], seq=options.seq)
    calls = {
        "SDPA with the mask": lambda: scaled_dot_product_attention(*heads_first, keep[:, None, None]).transpose(1, 2),
        "SDPA, every token": lambda: scaled_dot_product_attention(*heads_first).transpose(1, 2),
        "varlen_fa": lambda: varlen_fa.attention(q, k, v, meta=meta),
    }
    ours, theirs = calls["varlen_fa"](), calls["SDPA with the mask"]()
    # Where tokens count, both say the same.
    torch.testing.assert_close(ours[keep], theirs[keep], atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=2e-2)
    assert not ours[~keep].any()
    return calls


def milliseconds(call):
    if options.device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


times = {}  # of each call, at each fraction
for fraction in FRACTIONS:
    calls = calls_of(fraction)
    samples = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            samples[name].append(milliseconds(call))
    for name, of_call in samples.items():
        times.setdefault(name, []).append(statistics.median(of_call))

padding = [1 - keeps[fraction].float().mean().item() for fraction in FRACTIONS]
print(f"\n{'padding':>20}" + "".join(f"{share:9.0%}" for share in padding))
for name, of_call in times.items():
    print(f"{name:>20}" + "".join(f"{ms:9.2f}" for ms in of_call) + "  ms")
faster = [sdpa / ours for sdpa, ours in zip(times["SDPA with the mask"], times["varlen_fa"])]
print(f"{'faster than masked':>20}" + "".join(f"{ratio:8.2f}x" for ratio in faster))

# %% [markdown]
# ## The pictures

# %%
try:
    import matplotlib
except ImportError:
    print("matplotlib is not installed: no pictures")
    sys.exit()

if options.pictures is not None:
    matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

# Small files that come out alike each time.
matplotlib.rcParams |= {"svg.hashsalt": "varlen-fa", "svg.fonttype": "none"}


def done(figure, name):
    figure.tight_layout()
    if options.pictures is None:
        plt.show()
    else:
        options.pictures.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.pictures / f"padding-{name}.svg", metadata={"Date": None})


figure, axes = plt.subplots(1, len(FRACTIONS), figsize=(9, 1.6), sharey=True)
for axis, fraction, share in zip(axes, FRACTIONS, padding):
    axis.barh(range(options.batch), options.seq, color="#e8e8e8")
    axis.barh(range(options.batch), batches[fraction], color="#0b6e4f")
    axis.set_title(f"{share:.0%} padding", fontsize=8)
    axis.set_xticks([0, options.seq])
    axis.set_yticks([])
    axis.invert_yaxis()
axes[0].set_ylabel("texts")
done(figure, "masks")

figure, axis = plt.subplots(figsize=(7, 4))
for (name, of_call), colour in zip(times.items(), ["#c05746", "#4a5899", "#0b6e4f"]):
    axis.plot([100 * share for share in padding], of_call, "o-", color=colour, label=name)
for share, ratio, ms in zip(padding, faster, times["varlen_fa"]):
    axis.annotate(f"{ratio:.2f}×", (100 * share, ms), textcoords="offset points", xytext=(0, -14), ha="center", fontsize=8)
axis.set_ylim(bottom=0)
axis.set_xlabel("padding, % of the tokens")
axis.set_ylabel("ms a call")
shape = f"[{options.batch}, {options.seq}, {options.heads}, {options.dim}]"
axis.set_title(f"{shape} {str(dtype).removeprefix('torch.')}, {options.device}; × : faster than SDPA with the mask", fontsize=9)
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
done(figure, "time")
