"""Milliseconds of a step of diffusers' own Qwen-Image transformer with random weights, by its own SDPA,
by the attention backend "varlen_fa" (one line changed), and by the processor for joint layers, once
with metadata that the GPU builds in each layer and once with a mask that the host has read, in turns
on one GPU in bf16; eager, and with --compile under torch.compile, where the first of them is in the
graph and the second outside of it.

    pip install diffusers
    python python/benches/qwen_image.py [--layers N] [--size PIXELS] [--compile] [--json FILE]

The prompts of a batch have unequal lengths in 512 tokens. Medians of rounds, the wait of the host
included; outputs are compared. On the CPU a small model shows that it runs.
"""

import argparse
import json
import statistics
import time

import torch
from diffusers import QwenImageTransformer2DModel

import varlen_fa
import varlen_fa.diffusers

TEXT = 512


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", type=int, default=1024, help="of the image, in pixels")
    parser.add_argument("--batch", type=int, action="append", help="1, 2 and 4 unless given")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", help="where to write the results, as lines")
    return parser.parse_args()


def inputs(batch, side, device, dtype, width):
    lengths = torch.linspace(0.1, 1.0, batch + 1)[:batch].mul(TEXT).long() if batch > 1 else torch.tensor([TEXT // 2])
    keep = torch.arange(TEXT)[None] < lengths[:, None]
    return {
        "hidden_states": torch.randn(batch, side * side, 64, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, TEXT, width, device=device, dtype=dtype),
        "encoder_hidden_states_mask": keep.to(device),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_shapes": [[(1, side, side)]] * batch,
        "return_dict": False,
    }


def plan(given, config):
    """What attention of a layer is, with the mask that the host has read."""
    image, mask = given["hidden_states"], given["encoder_hidden_states_mask"]
    heads = (config.num_attention_heads, config.attention_head_dim)
    rows = [image.new_empty(image.shape[0], seq, *heads) for seq in (mask.shape[1], image.shape[1])]
    keep = torch.cat([mask.cpu(), torch.ones(image.shape[:2], dtype=torch.bool)], dim=1)
    return varlen_fa.plan(rows, rows, rows, meta=varlen_fa.Meta(keep))


def main():
    options = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    sizes = {} if device == "cuda" else {"num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": 48,
                                         "axes_dims_rope": (8, 12, 12)}  # fmt: skip
    side = options.size // 16
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = QwenImageTransformer2DModel(num_layers=options.layers, **sizes).eval()
    torch.set_default_dtype(torch.float32)
    varlen_fa.diffusers.register()
    own = dict(model.attn_processors)
    processor = varlen_fa.diffusers.QwenImageAttnProcessor
    joint = {"joint": processor()}
    if options.compile:
        joint["joint, outside"] = processor(in_graph=False)
    else:
        joint["joint, mask not read"] = processor(read_mask="never")

    def choose(way):
        model.set_attn_processor(joint.get(way) or dict(own))
        if way not in joint:
            model.set_attention_backend("varlen_fa" if way == "backend" else "native")

    ways = ("SDPA", "backend", *joint)
    call = torch.compile(model) if options.compile else model
    kind = "compiled" if options.compile else "eager"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, {dtype}, {options.layers} layers, {options.size} x {options.size}, {kind}")
    for batch in options.batch or (1, 2, 4):
        given = inputs(batch, side, device, dtype, model.config.joint_attention_dim)
        times, made = {way: [] for way in ways}, {}
        with torch.no_grad():
            for round_ in range(options.rounds + 2):
                for way in ways:
                    choose(way)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    started = time.perf_counter()
                    made[way] = call(**given)[0]
                    if device == "cuda":
                        torch.cuda.synchronize()
                    if round_ >= 2:
                        times[way].append(time.perf_counter() - started)
        print(f"batch {batch}  a joint layer: {plan(given, model.config)}")
        base = statistics.median(times["SDPA"])
        for way in ways:
            median = statistics.median(times[way])
            apart = (made[way] - made["SDPA"]).float().norm() / made["SDPA"].float().norm()
            more = 100 * (median / base - 1)
            print(f"batch {batch}  {way:20} {1e3 * median:9.2f} ms  {more:+6.1f} %  apart {apart:.1e}", flush=True)
            if options.json:
                with open(options.json, "a", encoding="utf-8") as file:
                    line = {
                        "gpu": name, "kind": kind, "layers": options.layers, "size": options.size, "batch": batch,
                        "way": way, "median_ms": 1e3 * median, "of_sdpa": median / base, "apart": float(apart),
                    }  # fmt: skip
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
