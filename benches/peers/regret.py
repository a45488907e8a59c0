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

With `--packed`, the calls are `varlen_attention` on the valid rows of these masks, which are packed
already: a choice is a kernel, and FlashAttention-3 works on the same rows.

Prints the distribution of the regret and the ten worst. The file has one JSON object a line: the
machine, then each workload with its masks, its tiles (kernel_tiles.py) and its times;
`fit_cost.py` reads it.
"""

import argparse
import gc
import itertools
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
# What the choices of calls on packed rows are called: nothing is packed or scattered there.
ROWS = "rows"
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
    parser.add_argument("--packed", action="store_true", help="varlen_attention on packed rows")
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
        self.forced_rows = {f"{ROWS} by {kernel}": library.options(kernel=kernel) for kernel in kernels}
        self.names = {
            (library.paths[path], library.kernels[kernel]): f"{path} by {kernel}" for kernel in kernels for path in PATHS
        }

    def mask(self, workload):
        query = self.meta(workload.query)
        return varlen_fa.varlen(query, self.meta(workload.key) if workload.is_cross else None)

    def meta(self, side):
        runs = [(row, start, end) for row, found in enumerate(side.runs) for start, end in found]
        return self.library.meta(self.library.key_mask_from_runs(runs, side.batch, side.seq))

    def cu_seqlens(self, side):
        """Where the sequences of packed rows start: a side's rows are the sequences."""
        return self.library.cu_seqlens(list(itertools.accumulate(side.lengths, initial=0)))

    def planned_rows(self, views, sequences):
        """The kernel of a call on packed rows, and the plan's words."""
        plan = varlen_fa.Plan()
        q, k, v, out = views
        self.device.varlen_attention(q, k, v, *sequences, out, plan=plan)
        return self.names[plan.path, plan.kernel].replace("packed", ROWS), str(plan)

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
        self.is_packed = options.packed
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
            "rows": "packed" if options.packed else "padded",
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
        """The times of a workload's choices, and the plan's choice."""
        torch = self.torch
        shapes = [workload.q_shape, workload.kv_shape, workload.kv_shape]
        if self.is_packed:
            # [total, H, D]
            totals = [side.total_valid for side in (workload.query, workload.key, workload.key)]
            shapes = [(total, *shape[2:]) for total, shape in zip(totals, shapes)]
        set_bytes = 2 * sum(map(math.prod, [shapes[0], *shapes]))
        sets = max(2, min(6, int(SETS_BYTES // set_bytes) + 1))
        inputs = [[torch.randn(shape, dtype=self.dtype, device="cuda") for shape in shapes] for _ in range(sets)]
        outs = [torch.empty(shapes[0], dtype=self.dtype, device="cuda") for _ in range(sets)]
        views = [[self.view(tensor) for tensor in (*found, out)] for found, out in zip(inputs, outs)]
        record = {"plan": None, "chosen": None, "times": {}, "refused": {}, "wrong": [], "tile_keys": {}}
        methods = (self.rows_methods if self.is_packed else self.padded_methods)(record, workload, views, inputs, outs)
        masked = None if self.is_packed else ~self.rows(workload.query).cuda()
        calls = self.calls(workload, set_bytes, sets)
        graphs, reference = {}, None
        for name, call in methods.items():
            outs[0].fill_(float("nan"))
            try:
                out = call(0)
            except Exception as error:  # a choice may not fit the call: kept, not hidden
                record["refused"][name] = str(error).splitlines()[0][:200]
                continue
            if masked is not None and not name.startswith(tuple(PATHS)):
                out = out.masked_fill(masked[:, :, None, None], 0)
            if reference is None:
                reference = out.float()
                allowed = 0.03 * reference.abs().max().item() + 2e-3
                is_right = masked is None or not out[masked].count_nonzero().item()
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

    def padded_methods(self, record, workload, views, inputs, outs):
        """Every path by every kernel on padded tensors, and the peer. Each takes the index of a set."""
        device, mask = self.choices.device, self.choices.mask(workload)
        record["chosen"], record["plan"] = self.choices.planned(views[0], mask)

        def ours(name, options):
            plan = varlen_fa.Plan()

            def call(at):
                device.forward(*views[at], mask, options=options, plan=plan)
                self.note_tiles(record, name, plan)
                return outs[at]

            return call

        methods = {name: ours(name, options) for name, options in self.choices.forced.items()}
        if self.with_peers:
            sides = [None if side.is_all_valid else self.peers.ValidRows(self.rows(side)) for side in (workload.query, workload.key)]
            if not workload.is_cross:
                sides[1] = sides[0]
            peer = self.peers.pack_fa3_scatter(*sides)
            methods[PEER if any(sides) else "fa3"] = lambda at: peer(*inputs[at])
        return methods

    def rows_methods(self, record, workload, views, inputs, outs):
        """The same of packed rows: every kernel, and FlashAttention-3."""
        device, sides = self.choices.device, (workload.query, workload.key)
        sequences = [self.choices.cu_seqlens(side) for side in sides]
        record["chosen"], record["plan"] = self.choices.planned_rows(views[0], sequences)

        def ours(name, options):
            plan = varlen_fa.Plan()

            def call(at):
                q, k, v, out = views[at]
                device.varlen_attention(q, k, v, *sequences, out, options=options, plan=plan)
                self.note_tiles(record, name, plan)
                return outs[at]

            return call

        methods = {name: ours(name, options) for name, options in self.choices.forced_rows.items()}
        if self.with_peers:
            lengths = [self.torch.tensor(side.lengths, device="cuda") for side in sides]
            starts = [self.torch.nn.functional.pad(found.cumsum(0), (1, 0)).int() for found in lengths]
            longest = [max(side.lengths) for side in sides]

            def peer(at):
                out = self.peers.flash_attn_varlen_func(*inputs[at], *starts, *longest)
                return out[0] if isinstance(out, tuple) else out

            methods["fa3"] = peer
        return methods

    def note_tiles(self, record, name, plan):
        if keys := TILE_KEYS.search(str(plan)):
            record["tile_keys"][name] = int(keys.group(1))

    def calls(self, workload, size, sets):
        """Calls of a graph, by a low estimate of the fastest call's time."""
        estimate = max(workload.flops / 700e9, size / 3e9, 0.006)
        calls = min(max(math.ceil(REPLAY_MS / estimate), sets), MOST_CALLS)
        return -(-calls // sets) * sets


def share(values, part):
    """The least value that this part of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(part * len(ordered)) - 1)]


def verdict(record, key):
    """Regret, and the best choice of one workload."""
    times = {name: found[key] for name, found in record["times"].items() if name.startswith((*PATHS, ROWS))}
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
