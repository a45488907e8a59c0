"""The time of a denoising step of a joint transformer with different implementations of its
attention, on batches of unequal prompts that are padded to the longest of the batch.

    cargo build --release -p varlen-fa-capi
    pip install torch triton numpy            # PyTorch 2.11 or newer; and fa3-fwd, on Hopper
    python benches/peers/denoise.py [--json FILE]
    python benches/peers/denoise.py --device cpu --layers 2 --side 4 --batch 2 --heads 2 --head-dim 32 --channels 64

The model has Qwen-Image's dimensions (joint_transformer.py): 60 layers of 24 heads x 128. Weights
are random, and by default all layers share one set: its 0.7 GB leave the cache between two uses as
those of sixty sets would, without the 40 GB that sixty sets take (`--distinct-layers 60` uses
them). Everything but the attention is PyTorch's, the same for each method, run eagerly in bf16:

    sdpa                  scaled_dot_product_attention with the mask; masked rows are computed like any other
    pack + fa3 + scatter  valid rows packed by Triton, FlashAttention-3, scattered into zeros (the design of sglang PR #26318)
    ours                  this library through its C interface, directly on PyTorch's tensors

Masks, metadata and tables are made once per request, before the first step. A step is one pass
through the stack, without the second pass of guidance. Times are medians of GPU time, from
CUDA-graph replays in turns. Before that, the valid rows that a few layers give are compared with
those of the same layers with attention in f32. The difference of the methods after all layers,
which round differently, is printed too.
"""

import argparse
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from joint_transformer import Dimensions, JointTransformer, rotary_tables
from our_calls import meta_of, open_device, varlen_fa, view
from reference import naive
from report import Report, facts
from workloads import Workload, joint

# Tokens of the prompts; a batch of n takes the first n.
PROMPTS = [37, 211, 80, 12, 256, 5, 150, 64]
# Padded text lengths are multiples of this, as a server pads them.
BUCKET = 64
# Allowed relative difference, on top of twice that of the same layers with a naive attention in
# bf16.
SLACK = 1e-3


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    batches = range(1, len(PROMPTS) + 1)
    parser.add_argument("--batch", type=int, action="append", choices=batches, help="1, 2, 4 and 8 by default")
    sides = "image tokens along an edge; 32 and 64 (512², 1024²) by default"
    parser.add_argument("--side", type=int, action="append", help=sides)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--distinct-layers", type=int, default=1, help="sets of weights that the layers use in turn")
    parser.add_argument("--check-layers", type=int, default=2, help="layers that are compared with attention in f32")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--channels", type=int, default=3584, help="channels of the text tokens")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps of each method")
    on_cpu = "cpu shows that the script runs; its times mean nothing"
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=on_cpu)
    parser.add_argument("--library", type=pathlib.Path, help="the C library, if it is not in target/release")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the results")
    return parser.parse_args()


def request(batch, side, dims):
    """The padded batch of a request, as a workload of the other benches."""
    prompts = PROMPTS[:batch]
    text = -(-max(prompts) // BUCKET) * BUCKET
    name = f"{side * side} image tokens, batch {batch}"
    return Workload(name, dims.heads, dims.head_dim, joint(text, prompts, side * side))


def row_by_row(workload, dtype):
    """A plain attention over the valid rows, computed in an element type."""
    kept = [row.nonzero().flatten() for row in workload.valid]

    def attend(q, k, v):
        out = torch.zeros_like(q)
        for row, tokens in enumerate(kept):
            tokens = tokens.to(q.device)
            taken = (tensor[row, tokens].transpose(0, 1).to(dtype) for tensor in (q, k, v))
            out[row, tokens] = naive(*taken, workload.head_dim**-0.5).transpose(0, 1).to(out.dtype)
        return out

    return attend


def our_attention(library, device, workload):
    """The attention of a request, and its plan, which the first call fills in."""
    meta = meta_of(library, workload)
    meta.upload(device)
    mask, plan = varlen_fa.varlen(meta), varlen_fa.Plan()

    def attend(q, k, v):
        out = torch.empty_like(q)
        device.forward(view(q), view(k), view(v), view(out), mask, plan=plan)
        return out

    return attend, plan


def methods_of(workload, ours, device):
    """The attention of each method by its name, and the plan of ours."""
    mask = workload.valid.to(device)[:, None, None, :]

    def sdpa(q, k, v):
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    methods = {"sdpa": sdpa}
    if device == "cuda":
        import pytorch_peers

        if "fa3" not in pytorch_peers.missing():
            rows = pytorch_peers.PackedRows(workload)
            methods["pack + fa3 + scatter"] = lambda q, k, v: rows.scatter(rows.fa3(*rows.pack(q, k, v)))
    methods["ours"], plan = our_attention(*ours, workload)
    return methods, plan


def missing_peers(device):
    """Methods that cannot run here, and why."""
    if device == "cpu":
        return {"pack + fa3 + scatter": "it needs an NVIDIA GPU"}
    import pytorch_peers

    return {"pack + fa3 + scatter": why for name, why in pytorch_peers.missing().items() if name == "fa3"}


def valid_rows(workload, outputs):
    """The rows of a step's outputs that are compared, in f32: the whole image, and the valid tokens
    of the text."""
    image, text = outputs
    kept = workload.valid[:, : text.shape[1]].to(text.device)
    return [image.float(), text[kept].float()]


def apart(got, reference):
    """The greater relative difference of the two streams. NaN counts as infinite."""
    found = [(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item() for a, b in zip(got, reference)]
    return max(found, key=lambda error: float("inf") if error != error else error)


def seconds(calls, stream, rounds):
    """The median seconds of each call, and its last output."""
    results = {}
    if stream is not None:
        from graph_timing import capture, medians_ms

        def keeping(name, call):
            def run(_):
                results[name] = call()

            return run

        graphs = {name: capture(stream, keeping(name, call), [None]) for name, call in calls.items()}
        return {name: median / 1e3 for name, (median, _, _) in medians_ms(graphs, 1, rounds).items()}, results
    times = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            results[name] = call()
            # The first round warms up.
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}, results


def run(workload, side, model, ours, stream, options):
    """All results of one request."""
    text_tokens = workload.seq - side * side
    generator = torch.Generator(model.like["device"]).manual_seed(1)

    def draw(tokens, channels):
        return torch.randn(workload.batch, tokens, channels, generator=generator, **model.like)

    text, image = draw(text_tokens, model.dims.text_channels), draw(side * side, model.dims.image_channels)
    timestep = torch.full((workload.batch,), 500.0, device=model.like["device"])
    rotary = rotary_tables(text_tokens, side, model.dims, model.like)

    def step(attend, layers=None):
        return model.step(text, image, timestep, rotary, attend, layers)

    def first_layers(attend):
        return valid_rows(workload, step(attend, min(options.check_layers, model.layers)))

    reference = first_layers(row_by_row(workload, torch.float32))
    allowed = 2 * apart(first_layers(row_by_row(workload, torch.bfloat16)), reference) + SLACK
    methods, plan = methods_of(workload, ours, options.device)
    errors = {name: apart(first_layers(attend), reference) for name, attend in methods.items()}
    del reference
    calls = {name: (lambda attend=attend: step(attend)) for name, attend in methods.items()}
    times, outputs = seconds(calls, stream, options.rounds)
    last = {name: valid_rows(workload, output) for name, output in outputs.items()}
    results = {}
    for name in methods:
        results[name] = {
            "seconds": times[name],
            "saved_of_sdpa": 1 - times[name] / times["sdpa"],
            "error": errors[name],
            "allowed": allowed,
            "apart_from_sdpa_at_the_end": apart(last[name], last["sdpa"]),
        }
    return results, str(plan)


def is_right(_, result):
    return result["error"] <= result["allowed"]


def method_line(name, result, layers):
    return (
        f"{name:22} {result['seconds']:8.4f} s a step  {result['saved_of_sdpa']:+7.1%} saved  "
        f"{'ok' if is_right(name, result) else 'WRONG'} ({result['error']:.1e} of {result['allowed']:.1e})  "
        f"{result['apart_from_sdpa_at_the_end']:.1e} from sdpa after {layers} layers"
    )


def main():
    options = arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("denoise.py: skipped: PyTorch finds no NVIDIA GPU here (--device cpu tries the script itself)")
    dims = Dimensions(heads=options.heads, head_dim=options.head_dim, text_channels=options.channels)
    torch.backends.cuda.matmul.allow_tf32 = False
    stream = torch.cuda.Stream() if options.device == "cuda" else None
    with torch.inference_mode(), torch.cuda.stream(stream):
        ours = open_device(options.library, stream)
        model = JointTransformer(dims, options.layers, options.distinct_layers, options.device, torch.bfloat16)
        about = facts(
            ours[1],
            stream,
            layers=options.layers,
            distinct_layers=options.distinct_layers,
            check_layers=options.check_layers,
            heads=dims.heads,
            head_dim=dims.head_dim,
            missing=missing_peers(options.device),
        )
        report = Report(about, "requests")
        for side in options.side or [32, 64]:
            for batch in options.batch or [1, 2, 4, 8]:
                workload = request(batch, side, dims)
                results, plan = run(workload, side, model, ours, stream, options)
                image, text = side * side, workload.seq - side * side
                entry = {"image_tokens": image, "batch": batch, "text_tokens": text}
                entry.update(prompts=PROMPTS[:batch], valid_share=workload.valid_share)
                report.add(
                    workload.name,
                    f"{side * 16}² image ({image} tokens), batch {batch}, text {PROMPTS[:batch]} of {text}: "
                    f"{workload.valid_share:.1%} valid",
                    entry,
                    plan,
                    results,
                    lambda name, result: method_line(name, result, options.layers),
                    is_right,
                )
                if stream is not None:
                    torch.cuda.empty_cache()
    report.finish(options.json)


if __name__ == "__main__":
    main()
