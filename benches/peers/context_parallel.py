"""Compares sequence parallelism with diffusers' context parallelism, on two or more GPUs of one
host, or on the CPU, which only shows that it works.

    cargo build --release -p varlen-fa-capi
    pip install torch diffusers numpy
    python benches/peers/context_parallel.py [--ranks N] [--case NAME]... [--json FILE]

diffusers runs as it does in its models: a process for each rank, `dispatch_attention_fn` under a
`ContextParallelConfig`, Ulysses and ring, by each backend that comes with PyTorch. It divides the
text among the ranks as it does the image. A rank's key mask is that of its tokens, which Ulysses
gathers in each call; `whole mask` is given that of all tokens, so that nothing is gathered. What it
refuses is printed with its words.

Ours has the text on every rank: in threads of one process, whose GPUs copy from one another, and in
the processes of diffusers, by NCCL. Each row of a table is calls behind one another by the host's
clock, in turns with the others; the slowest rank counts, and the median of the rounds. Ratios are
over ours between threads. Outputs are compared with SDPA's over the whole sequence; rows of masked
queries are left out.
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import sys
import threading
import time
import traceback

import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F

from our_calls import open_device, varlen_fa
from report import Report, facts

HEADS, HEAD_DIM = 24, 128
TOLERANCE = 3e-2
SEED = 7
# A rank that does not come within so many seconds is lost.
LIMIT = 90

ULYSSES_AND_RING = {"Ulysses": {"ulysses_degree": 0}, "ring": {"ring_degree": 0}}
BACKENDS = ["native", "_native_cudnn", "_native_flash"]


@dataclasses.dataclass(frozen=True)
class Case:
    """`[text, image]` tokens, of which all of the image and `valid` of each row's text count."""

    name: str
    text: int
    image: int
    valid: tuple = (0,)
    heads: int = HEADS
    head_dim: int = HEAD_DIM
    calls: int = 8

    @property
    def batch(self):
        return len(self.valid)

    @property
    def seq(self):
        return self.text + self.image

    @property
    def is_masked(self):
        return any(valid < self.text for valid in self.valid)

    def keep(self, device="cpu"):
        places = torch.arange(self.seq, device=device)[None]
        valid = torch.tensor(self.valid, device=device)[:, None]
        return (places < valid) | (places >= self.text)

    def qkv(self, device, dtype):
        """The whole sequence, the same on every rank."""
        made = torch.Generator(device).manual_seed(SEED)
        shape = [self.batch, self.seq, self.heads, self.head_dim]
        return [torch.randn(shape, generator=made, device=device, dtype=dtype) for _ in range(3)]

    def places(self, rank, ranks, text_is_divided, device="cpu"):
        """The tokens of a rank: its text, or all of it, and its image."""
        text = (0, self.text)
        if text_is_divided:
            text = (self.text * rank // ranks, self.text * (rank + 1) // ranks)
        image = (self.text + self.image * of // ranks for of in (rank, rank + 1))
        return torch.cat([torch.arange(*text, device=device), torch.arange(*image, device=device)])

    def local(self, here, places):
        """q, k and v of some tokens."""
        return [x[:, places].contiguous() for x in self.qkv(here.device, here.dtype)]

    def expected(self, here):
        """The whole output of SDPA."""
        mask = self.keep(here.device)[:, None, None] if self.is_masked else None
        q, k, v = (x.transpose(1, 2) for x in self.qkv(here.device, here.dtype))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


CASES = [
    Case("joint-1024", 256, 4096, (256, 120), calls=64),
    Case("video-16k", 0, 16384, calls=8),
    Case("video-32k", 0, 32768, calls=4),
]
SMOKE = [Case("smoke", 6, 40, (6, 3), heads=4, head_dim=16, calls=1)]


class Here:
    """A rank's device."""

    def __init__(self, kind, rank):
        self.is_cuda = kind == "cuda"
        self.device = torch.device("cuda", rank) if self.is_cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if self.is_cuda else torch.float32
        self.stream = None
        if self.is_cuda:
            torch.cuda.set_device(self.device)
            self.stream = torch.cuda.Stream(self.device)
            torch.cuda.set_stream(self.stream)

    def wait(self):
        if self.is_cuda:
            self.stream.synchronize()


class Ours:
    """Calls of this library on one rank."""

    def __init__(self, here, case, rank, ranks, communicator, device):
        self.keeps = communicator, device
        places = case.places(rank, ranks, False, here.device)
        self.local = case.local(here, places)
        self.out = torch.empty_like(self.local[0])
        dtype = {torch.bfloat16: varlen_fa.BF16, torch.float32: varlen_fa.F32}[here.dtype]
        memory = varlen_fa.CUDA if here.is_cuda else varlen_fa.HOST
        as_view = [varlen_fa.tensor(x.data_ptr(), x.shape, x.stride(), dtype, memory) for x in [*self.local, self.out]]
        keep = case.keep().to(torch.uint8).contiguous()
        mask = device.library.key_mask_from_integers(keep.data_ptr(), 1, case.batch, case.seq)
        lengths = [len(case.places(of, ranks, False)) - case.text for of in range(ranks)]
        meta = device.library.sharded_meta(mask, lengths, rank, prefix=case.text)
        request = device.parallel_prepare(communicator, meta, dtype, case.heads, case.heads, case.head_dim)
        self.plan = str(request.plan)
        self.call = lambda: request.forward(communicator, *as_view)
        self.places = places

    def result(self):
        return self.out


class Theirs:
    """Calls of diffusers on one rank."""

    def __init__(self, here, case, rank, ranks, config, backend, mask):
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        places = case.places(rank, ranks, True, here.device)
        local = case.local(here, places)
        given = None
        if mask == "mask":
            given = case.keep(here.device)[:, places].contiguous()
        elif mask == "whole mask":
            order = torch.cat([case.places(of, ranks, True, here.device) for of in range(ranks)])
            given = case.keep(here.device)[:, order][:, None, None].contiguous()
        self.places, self.out = places, None

        def call():
            self.out = dispatch_attention_fn(*local, attn_mask=given, backend=backend, parallel_config=config)

        self.call = call

    def result(self):
        return self.out


def masks_of(case):
    return ["mask", "whole mask"] if case.is_masked else ["no mask", "mask", "whole mask"]


def difference(case, rank_call, expected):
    """The largest one of valid rows."""
    places = rank_call.places
    keep = case.keep(places.device)[:, places]
    return (rank_call.result().float() - expected[:, places].float())[keep].abs().max().item()


def measured(call, here, repeats, meet):
    """Milliseconds a call, of several behind one another."""
    here.wait()
    meet()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    here.wait()
    return (time.perf_counter() - started) * 1e3 / repeats


def theirs_rank(rank, arguments, names, meeting, barrier, results):
    """One process: diffusers, and ours by NCCL, or through host memory where there is none."""
    try:
        run_theirs(rank, arguments, names, meeting, barrier, results)
    except Exception:
        results.put((rank, None, traceback.format_exc()))
        barrier.abort()
        raise


def run_theirs(rank, arguments, names, meeting, barrier, results):
    import torch.distributed
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    ranks, kind = arguments.ranks, arguments.device
    here = Here(kind, rank)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting)})
    backend = "nccl" if here.is_cuda else "gloo"
    group = {"device_id": here.device} if here.is_cuda else {}
    torch.distributed.init_process_group(backend, rank=rank, world_size=ranks, **group)
    library, device = open_device(arguments.library, here.stream)
    connect = f"127.0.0.1:{meeting + 1}", rank, ranks, LIMIT * 1000
    communicator = library.nccl(device, *connect) if here.is_cuda else library.connect(*connect)
    configs = {}
    for way, degree in ULYSSES_AND_RING.items():
        config = ContextParallelConfig(**{name: ranks for name in degree})
        mesh = torch.distributed.device_mesh.init_device_mesh(
            kind, mesh_shape=config.mesh_shape, mesh_dim_names=config.mesh_dim_names
        )
        config.setup(rank, ranks, here.device, mesh)
        configs[way] = ParallelConfig(context_parallel_config=config, _rank=rank, _world_size=ranks)
    with torch.no_grad():
        for case in cases_of(names):
            expected = case.expected(here)
            rows, differences, refused = {}, {}, {}
            ours = "ours, by NCCL" if here.is_cuda else "ours, between processes"
            makers = {ours: lambda case=case: Ours(here, case, rank, ranks, communicator, device)}
            for way, config in configs.items():
                for backend in BACKENDS:
                    for mask in masks_of(case):
                        name = f"diffusers, {way}, {backend}, {mask}"
                        arguments_of = case, rank, ranks, config, backend, mask
                        makers[name] = lambda given=arguments_of: Theirs(here, *given)
            for name, make in makers.items():
                try:
                    row = make()
                    row.call()
                    here.wait()
                # Whatever a backend says; it says the same on every rank, before anything is sent.
                except (RuntimeError, ValueError, NotImplementedError, TypeError, AssertionError) as error:
                    if name.startswith("ours"):
                        raise
                    refused[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
                    continue
                differences[name], rows[name] = difference(case, row, expected), row
            results.put((rank, (differences, refused), None))
            times = {name: [] for name in rows}
            for round_at in range(arguments.rounds + 1):
                for name, row in rows.items():
                    # The first one warms up, briefly.
                    repeats = case.calls if round_at else 1
                    ms = measured(row.call, here, repeats, lambda: torch.distributed.barrier())
                    if round_at:
                        times[name].append(ms)
                # The threads' turn.
                here.wait()
                barrier.wait(LIMIT)
                barrier.wait(LIMIT)
            results.put((rank, times, None))
            barrier.wait(LIMIT)
    torch.distributed.destroy_process_group()


class Threads:
    """Ours in threads of this process: a call or a timing of all ranks at once."""

    def __init__(self, arguments):
        self.ranks, self.kind = arguments.ranks, arguments.device
        self.here = [Here(self.kind, rank) for rank in range(self.ranks)]
        opened = []
        for here in self.here:
            self.become(here)
            opened.append(open_device(arguments.library, here.stream))
        self.library, self.devices = opened[0][0], [device for _, device in opened]
        limit = LIMIT * 1000
        made = self.library.peers(self.devices, limit) if self.kind == "cuda" else self.library.communicators(self.ranks, limit)
        self.communicators = made
        self.meet = threading.Barrier(self.ranks)
        self.rows = []

    def become(self, here):
        if here.is_cuda:
            torch.cuda.set_device(here.device)
            torch.cuda.set_stream(here.stream)

    def on_all(self, work):
        """What `work` gives for each rank, in its own thread."""
        got, errors = [None] * self.ranks, []

        def of_rank(rank):
            try:
                self.become(self.here[rank])
                got[rank] = work(rank)
            except Exception as error:
                errors.append(error)
                self.meet.abort()

        threads = [threading.Thread(target=of_rank, args=[rank]) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return got

    def prepare(self, case):
        """Gives the plan, and the largest difference from SDPA."""

        def of_rank(rank):
            expected = case.expected(self.here[rank])
            row = Ours(self.here[rank], case, rank, self.ranks, self.communicators[rank], self.devices[rank])
            row.call()
            self.here[rank].wait()
            return row, difference(case, row, expected)

        made = self.on_all(of_rank)
        self.rows = [row for row, _ in made]
        return self.rows[0].plan, max(largest for _, largest in made)

    def time(self, repeats):
        """The slowest rank's milliseconds a call."""
        return max(self.on_all(lambda rank: measured(self.rows[rank].call, self.here[rank], repeats, self.meet.wait)))


def cases_of(names):
    return [case for case in [*CASES, *SMOKE] if case.name in names]


def run(arguments):
    names = arguments.case or [case.name for case in (CASES if arguments.device == "cuda" else SMOKE)]
    ranks = arguments.ranks
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(ranks + 1), context.Queue()
    meeting = 20000 + os.getpid() % 20000
    given = arguments, names, meeting, barrier, results
    processes = [context.Process(target=theirs_rank, args=(rank, *given), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()

    def of_each():
        """What every process gives, by rank."""
        got = {}
        while len(got) < ranks:
            rank, value, error = results.get(timeout=LIMIT)
            if error is not None:
                sys.exit(f"rank {rank}:\n{error}")
            got[rank] = value
        return [got[rank] for rank in range(ranks)]

    threads = Threads(arguments)
    import diffusers

    report = Report(facts(threads.devices[0], threads.here[0].stream, diffusers=diffusers.__version__), "cases")
    ours = "ours, between threads"
    for case in cases_of(names):
        checked = of_each()
        plan, largest = threads.prepare(case)
        differences = {ours: largest}
        for name in checked[0][0]:
            differences[name] = max(of_rank[0][name] for of_rank in checked)
        times = {ours: []}
        for round_at in range(arguments.rounds + 1):
            barrier.wait(LIMIT)
            ms = threads.time(case.calls if round_at else 1)
            if round_at:
                times[ours].append(ms)
            barrier.wait(LIMIT)
        each = of_each()
        for name in each[0]:
            # The slowest rank of each round.
            times[name] = [max(of_round) for of_round in zip(*(of_rank[name] for of_rank in each))]
        barrier.wait(LIMIT)
        base = statistics.median(times[ours])
        rows = {}
        for name, of_rounds in sorted(times.items(), key=lambda item: (item[0] != ours, statistics.median(item[1]))):
            ms = statistics.median(of_rounds)
            rows[name] = {"ms": ms, "ratio": ms / base, "largest_difference": differences[name]}
        for name, why in checked[0][1].items():
            rows[name] = {"refused": why}
        title = f"{case.name}: [{case.batch}, {case.text} + {case.image}, {case.heads}, {case.head_dim}], {ranks} ranks"
        report.add(case.name, title, {"case": case.name, "ranks": ranks}, plan, rows, line, is_right)
    for process in processes:
        process.join(LIMIT)
    report.finish(arguments.json)


def line(name, row):
    if "refused" in row:
        return f"{name:44} refused: {row['refused']}"
    wrong = "" if row["largest_difference"] < TOLERANCE else ": WRONG"
    difference = f"{row['largest_difference']:.1e}{wrong}"
    return f"{name:44} {row['ms']:9.3f} ms {row['ratio']:6.2f}x   largest difference {difference}"


def is_right(name, row):
    """Only ours has to be: what others give is said."""
    return not name.startswith("ours") or row["largest_difference"] < TOLERANCE


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--case", action="append", choices=[case.name for case in [*CASES, *SMOKE]])
    parser.add_argument("--library", type=pathlib.Path, help="the C library; else where cargo put it")
    parser.add_argument("--json", type=pathlib.Path)
    run(parser.parse_args())
