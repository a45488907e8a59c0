"""The plan's regret on random workloads: the time of its choice over that of the best of all choices
that can be forced, and against pack → FlashAttention-3 → scatter.

    cargo build --release -p varlen-fa-capi
    pip install torch triton numpy            # PyTorch 2.11 or newer; and fa3-fwd, on Hopper
    python benches/peers/regret.py --seed 1 --count 200 --json regret.jsonl

The calls are random (random_workloads.py): six kinds of masks and none, 1,000 to 17,000 tokens,
grouped heads, head dimensions 64 to 256, one in seven a cross-attention. A choice is a path and a
kernel, and each of them is forced by turns. Times are those of CUDA-graph replays on rotating
inputs. All outputs of a workload are compared with one another. Without peers, and on wgpu and the
CPU too: `cargo bench --bench regret`.

Prints the distribution of the regret and the ten worst. The file has one JSON object a line: the
machine, then each workload with its masks, its tiles (kernel_tiles.py) and its times;
`fit_cost.py` reads it.
"""

import argparse
import gc
import json
import math
import pathlib
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "capi" / "python"))
import varlen_fa  # noqa: E402

import kernel_tiles  # noqa: E402
import random_workloads  # noqa: E402

PATHS = ["dense", "fused", "packed"]
# All sets of inputs together are several times as large as the cache.
SETS_BYTES = 400e6
# A replay takes at least this long, so that events and the graph's start do not count.
REPLAY_MS = 0.3
MOST_CALLS = 60
PEER = "pack + fa3 + scatter"
# What a plan's text says of tiles among which it chose.
TILE_KEYS = re.compile(r"in tiles of (\d+) keys")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", default="1", help="any text")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", type=int, action="append", help="number of a workload to run alone")
    parser.add_argument("--rounds", type=int, default=5, help="timed replays, or samples, of each choice")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after the workload that ends then")
    parser.add_argument("--dtype", choices=["bf16", "f16"], default="bf16")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--library", help="the C library, if it is not in target/release")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the results")
    return parser.parse_args()


class Choices:
    """The choices of a device, and its plan."""

    def __init__(self, library, device):
        self.library, self.device = library, device
        bits = device.info().kernels
        kernels = [name for name, number in library.kernels.items() if bits >> number & 1 and name != "auto"]
        self.forced = {
            f"{path} by {kernel}": library.options(path=path, kernel=kernel) for kernel in kernels for path in PATHS
        }
        self.names = {
            (library.paths[path], library.kernels[kernel]): f"{path} by {kernel}" for kernel in kernels for path in PATHS
        }

    def mask(self, workload):
        query = self.meta(workload.query)
        return varlen_fa.varlen(query, self.meta(workload.key) if workload.is_cross else None)

    def meta(self, side):
        runs = [(row, start, end) for row, found in enumerate(side.runs) for start, end in found]
        return self.library.meta(self.library.key_mask_from_runs(runs, side.batch, side.seq))

    def planned(self, views, mask):
        """The plan's choice, and its words."""
        plan = varlen_fa.Plan()
        self.device.forward(*views, mask, plan=plan)
        return self.names[plan.path, plan.kernel], str(plan)


class Gpu:
    """Times by CUDA-graph replays, on PyTorch's stream and memory."""

    def __init__(self, options):
        import torch

        if not torch.cuda.is_available():
            sys.exit("regret.py: skipped: PyTorch finds no NVIDIA GPU here")
        import graph_timing
        import our_calls
        import pytorch_peers

        self.torch, self.graphs, self.view, self.peers = torch, graph_timing, our_calls.view, pytorch_peers
        self.dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[options.dtype]
        self.with_peers = not options.no_peers and pytorch_peers.flash_attn_varlen_func is not None
        self.rounds = options.rounds
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        torch.manual_seed(0)
        library, device = our_calls.open_device(options.library, self.stream)
        self.choices = Choices(library, device)
        self.size = random_workloads.GPU
        self.facts = {
            "device": torch.cuda.get_device_name(),
            "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
            "dtype": options.dtype,
            "torch": torch.__version__,
            "missing": {} if options.no_peers else pytorch_peers.missing(),
        }
        # Entering a capture collects garbage; what lives now stays.
        gc.collect()
        gc.freeze()

    def rows(self, side):
        keep = self.torch.frombuffer(side.keep(), dtype=self.torch.uint8).bool()
        return keep.view(side.batch, side.seq)

    def run(self, workload):
        torch, device = self.torch, self.choices.device
        shapes = [workload.q_shape, workload.kv_shape, workload.kv_shape]
        set_bytes = 2 * (2 * math.prod(workload.q_shape) + 2 * math.prod(workload.kv_shape))
        sets = max(2, min(6, int(SETS_BYTES // set_bytes) + 1))
        inputs = [[torch.randn(shape, dtype=self.dtype, device="cuda") for shape in shapes] for _ in range(sets)]
        outs = [torch.empty(workload.q_shape, dtype=self.dtype, device="cuda") for _ in range(sets)]
        views = [[self.view(tensor) for tensor in (*found, out)] for found, out in zip(inputs, outs)]
        mask = self.choices.mask(workload)
        record = {"plan": None, "chosen": None, "times": {}, "refused": {}, "wrong": []}
        record["chosen"], record["plan"] = self.choices.planned(views[0], mask)
        record["tile_keys"] = {}

        def ours(name, options):
            plan = varlen_fa.Plan()

            def call(at):
                device.forward(*views[at], mask, options=options, plan=plan)
                if keys := TILE_KEYS.search(str(plan)):
                    record["tile_keys"][name] = int(keys.group(1))
                return outs[at]

            return call

        methods = {name: ours(name, options) for name, options in self.choices.forced.items()}
        query_rows = self.rows(workload.query)
        if self.with_peers:
            sides = [None if side.is_all_valid else self.peers.ValidRows(self.rows(side)) for side in (workload.query, workload.key)]
            if not workload.is_cross:
                sides[1] = sides[0]
            peer = self.peers.pack_fa3_scatter(*sides)
            methods[PEER if any(sides) else "fa3"] = lambda at: peer(*inputs[at])
        calls = self.calls(workload, sets)
        graphs, reference = {}, None
        masked = ~query_rows.cuda()
        for name, call in methods.items():
            outs[0].fill_(float("nan"))
            try:
                out = call(0).masked_fill(masked[:, :, None, None], 0) if not name.startswith(tuple(PATHS)) else call(0)
            except Exception as error:  # a choice may not fit the call: kept, not hidden
                record["refused"][name] = str(error).splitlines()[0][:200]
                continue
            if reference is None:
                reference = out.float()
                allowed = 0.03 * reference.abs().max().item() + 2e-3
                is_right = not out[masked].count_nonzero().item()
            else:
                # Not `error > allowed`: NaN is wrong.
                is_right = (out.float() - reference).abs().max().item() <= allowed
            if not is_right:
                record["wrong"].append(name)
            graphs[name] = self.graphs.capture(self.stream, call, [at % sets for at in range(calls)])
        for name, (median, least, most) in self.graphs.medians_ms(graphs, calls, self.rounds).items():
            record["times"][name] = {"median_ms": median, "min_ms": least, "max_ms": most}
        record["calls"] = calls
        return record

    def calls(self, workload, sets):
        """Calls of a graph, by a low estimate of the fastest call's time."""
        size = 2 * (2 * math.prod(workload.q_shape) + 2 * math.prod(workload.kv_shape))
        estimate = max(workload.flops / 700e9, size / 3e9, 0.006)
        calls = min(max(math.ceil(REPLAY_MS / estimate), sets), MOST_CALLS)
        return -(-calls // sets) * sets


def share(values, part):
    """The least value that this part of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(part * len(ordered)) - 1)]


def verdict(record, key):
    """Regret, and the best choice of one workload."""
    times = {name: found[key] for name, found in record["times"].items() if name.startswith(tuple(PATHS))}
    best = min(times, key=times.get)
    return times[record["chosen"]] / times[best], best


def print_summary(records, key):
    regrets = [record["regret"] for record in records]
    print(f"\nregret of {len(records)} workloads: ", end="")
    print(", ".join(f"{name} {share(regrets, part):.3f}" for name, part in [("median", 0.5), ("90 %", 0.9), ("95 %", 0.95), ("worst", 1)]))
    print(f"over 1.03: {sum(found > 1.03 for found in regrets)}, over 1.10: {sum(found > 1.10 for found in regrets)}")
    best = {}
    for record in records:
        best.setdefault(record["best"], []).append(record["chosen"] == record["best"])
    for name, found in sorted(best.items()):
        print(f"  {name:18} is the best of {len(found):3}, chosen in {sum(found):3} of those")
    for peer in [PEER, "fa3"]:
        pairs = [(record["times"][peer][key] / record["times"][record["chosen"]][key], record) for record in records if peer in record["times"]]
        if pairs:
            ratios = [ratio for ratio, _ in pairs]
            slower = [record["number"] for ratio, record in pairs if ratio < 0.99]
            print(f"{peer}, its time over ours, {len(pairs)} workloads: worst {min(ratios):.3f}, 10 % {share(ratios, 0.1):.3f}, "
                  f"median {share(ratios, 0.5):.3f}; below 0.99: {len(slower)} {slower}")  # fmt: skip
    print("the ten worst:")
    for record in sorted(records, key=lambda record: -record["regret"])[:10]:
        times = ", ".join(f"{name} {found[key]:.4f}" for name, found in sorted(record["times"].items(), key=lambda item: item[1][key]))
        print(f"  {record['regret']:.3f}  {record['title']}\n         {record['plan']}; best: {record['best']}; ms: {times}")


def main():
    options = arguments()
    start = time.monotonic()
    runner, key = Gpu(options), "median_ms"
    facts = {**runner.facts, "ours": runner.choices.library.version, "seed": options.seed}
    print(json.dumps(facts))
    file = options.json.open("w") if options.json else None
    if file:
        print(json.dumps({"facts": facts}), file=file, flush=True)
    records = []
    for workload in random_workloads.workloads(options.seed, options.count, runner.size):
        if options.only and workload.number not in options.only:
            continue
        if time.monotonic() - start > options.seconds:
            print(f"stopped after {len(records)} workloads: no time is left")
            break
        record = {"number": workload.number, "kind": workload.kind, "title": workload.title}
        record.update(runner.run(workload))
        record["regret"], record["best"] = verdict(record, key)
        peer = next((record["times"][peer][key] for peer in (PEER, "fa3") if peer in record["times"]), None)
        ratio = "" if peer is None else f"{peer / record['times'][record['chosen']][key]:.2f}x of the peer  "
        print(f"{record['regret']:.3f}  {ratio}{record['chosen']:16} {workload.title}", flush=True)
        records.append(record)
        if file:
            runs = {"query_runs": workload.query.runs, "key_runs": workload.key.runs}
            entry = {**record, "features": kernel_tiles.features(workload), **runs}
            print(json.dumps(entry, separators=(",", ":")), file=file, flush=True)
    if not records:
        sys.exit("regret.py: no workload was run")
    print_summary(records, key)
    print(f"{time.monotonic() - start:.0f} s")
    wrong = [(record["number"], record["wrong"]) for record in records if record["wrong"]]
    if wrong:
        print(f"outputs that differ from the first choice's: {wrong}")
    # A peer may leave something else in rows without a key.
    if any(set(names) - {PEER, "fa3"} for _, names in wrong):
        sys.exit("wrong results")


if __name__ == "__main__":
    main()
