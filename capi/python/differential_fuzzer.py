#!/usr/bin/env python3
"""Random calls of the C library, each against NumPy in float64.

    differential_fuzzer.py [--device cpu|cuda|wgpu] [--minutes N | --calls N] [--seed N]

A call is a pure function of its seed: a shape, an element type, strides, a mask, ranges of keys, a
bias, score modifiers, a scale, options, and sometimes a path or kernel that is forced. Calls have the seeds from
--seed on, one after the other. What must not matter holds NaN: masked tokens, keys that no query
sees, the gaps between rows, and outputs before they are written. A failure prints the call, its
seed, and the line that repeats it, and the program exits with 1; with 77 if the device is absent.

The tolerance is that of the project's tests: twice the error of the same computation done naively
in the element type, and a floor (see `floor`). VARLEN_FA_LIBRARY names the library. On cuda,
tensors lie in the GPU's memory in every second call, on a stream of the driver."""

import argparse
import ctypes
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import varlen_fa as vf  # noqa: E402

NOT_AVAILABLE = 77
NAMES = {vf.F32: "f32", vf.F16: "f16", vf.BF16: "bf16"}
# Half a unit in the last place of 1.
ROUNDING = {vf.F32: 2.0**-24, vf.F16: 2.0**-11, vf.BF16: 2.0**-8}


class Wrong(Exception):
    """A result that is not the reference's."""


def round_to(dtype, values):
    """float32 values rounded to the element type, to nearest even, as float32."""
    values = np.asarray(values, np.float32)
    if dtype == vf.F16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == vf.BF16:
        return widen(dtype, narrow(dtype, values))
    return values


def narrow(dtype, values):
    """float32 values as elements: f32, f16, or the bits of bf16."""
    values = np.asarray(values, np.float32)
    if dtype == vf.F16:
        return values.astype(np.float16)
    if dtype == vf.BF16:
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return values


def widen(dtype, elements):
    if dtype == vf.BF16:
        return (elements.astype(np.uint32) << 16).view(np.float32)
    return elements.astype(np.float32)


class Host:
    """Memory of elements, for the library to read and to write."""

    kind = vf.HOST

    def __init__(self, dtype, elements):
        self.dtype, self.elements = dtype, np.ascontiguousarray(elements)

    @property
    def address(self):
        return self.elements.ctypes.data

    def read(self):
        return self.elements


class Cuda:
    """A context and a stream of the driver, and a device of the library over them."""

    def __init__(self, library):
        self.driver = ctypes.CDLL("libcuda.so.1")
        ordinal, self.context, self.stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self("cuInit", ctypes.c_uint(0))
        self("cuDeviceGet", ctypes.byref(ordinal), 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), ordinal)
        self("cuCtxSetCurrent", self.context)
        # A stream that waits for the default one, on which memory is filled and read.
        self("cuStreamCreate", ctypes.byref(self.stream), ctypes.c_uint(0))
        self.device = library.open_cuda(self.stream, self.context)

    def __call__(self, function, *arguments):
        code = getattr(self.driver, function)(*arguments)
        if code != 0:
            raise RuntimeError(f"{function} returned {code}")

    def memory(self, dtype, elements):
        return CudaMemory(self, dtype, elements)


class CudaMemory(Host):
    """The same on the GPU."""

    kind = vf.CUDA

    def __init__(self, cuda, dtype, elements):
        super().__init__(dtype, elements)
        self.cuda, self.pointer = cuda, ctypes.c_uint64()
        cuda("cuMemAlloc_v2", ctypes.byref(self.pointer), ctypes.c_size_t(max(self.elements.nbytes, 1)))
        size = ctypes.c_size_t(self.elements.nbytes)
        cuda("cuMemcpyHtoD_v2", self.pointer, ctypes.c_void_p(self.elements.ctypes.data), size)

    def __del__(self):
        self.cuda.driver.cuMemFree_v2(self.pointer)

    @property
    def address(self):
        return self.pointer.value

    def read(self):
        self.cuda.device.synchronize()
        read = np.empty_like(self.elements)
        self.cuda("cuMemcpyDtoH_v2", ctypes.c_void_p(read.ctypes.data), self.pointer, ctypes.c_size_t(read.nbytes))
        return read


def compare_lse(got, sums, q, k, scale, bias):
    """The log-sum-exp against its exact value; `bias` is the largest that was added."""
    got, empty = got.astype(np.float64), np.isneginf(sums)
    if not np.isneginf(got[empty]).all():
        raise Wrong("lse: expected -inf for rows without keys")
    # A sum in f32 of rounded scores: relative to its own size and to the scores'.
    score = abs(scale) * np.linalg.norm(q, axis=-1).max(initial=0) * np.linalg.norm(k, axis=-1).max(initial=0) + bias
    compare("lse", got[~empty], sums[~empty], sums[~empty], 1e-5 + 8 * 2.0**-23 * float(score))


class Strided:
    """A tensor of any strides: gaps behind rows, dimensions in any order but for the last."""

    def __init__(self, rng, memory, dtype, shape, values=None, keep=None):
        rank = len(shape)
        order = list(rng.permutation(rank - 1)) + [rank - 1] if rng.random() < 0.4 else list(range(rank))
        gap = int(rng.integers(0, 4)) * 8 if rng.random() < 0.4 else 0
        offset = int(rng.integers(0, 3)) * 8 if rng.random() < 0.3 else 0
        strides, step = [0] * rank, 1
        for place, dim in enumerate(reversed(order)):
            strides[dim] = step
            step *= max(shape[dim], 1)
            step += gap if place == 0 else 0
        self.dtype, self.shape, self.strides, self.offset = dtype, shape, strides, offset
        count = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides)) if 0 not in shape else offset
        filled = np.full(count + 5, np.nan, np.float32)
        if values is not None and 0 not in shape:
            values = np.array(values, np.float32)
            if keep is not None:
                values[~keep] = np.nan
            self.view(filled)[...] = values
        self.before = narrow(dtype, filled)
        self.memory = memory(dtype, self.before)

    def view(self, elements):
        size = elements.dtype.itemsize
        strides = [stride * size for stride in self.strides]
        return np.lib.stride_tricks.as_strided(elements[self.offset :], self.shape, strides)

    def tensor(self):
        size = vf.ELEMENT_BYTES[self.dtype]
        count = len(self.before) - self.offset
        return vf.tensor(
            self.memory.address + self.offset * size, self.shape, self.strides, self.dtype, self.memory.kind, count * size
        )

    def read(self):
        """The values that were written; checks that nothing beside them was."""
        elements = np.array(self.memory.read())
        values = widen(self.dtype, np.array(self.view(elements)))
        if 0 not in self.shape:
            self.view(elements)[...] = self.view(self.before)
        if elements.tobytes() != self.before.tobytes():
            raise Wrong("wrote beside the output's elements")
        return values


class Modifiers:
    """A soft cap, 0 for none, and [H] slopes and sinks, or None of either."""

    def __init__(self, softcap=0.0, slopes=None, sinks=None):
        self.softcap, self.slopes, self.sinks = softcap, slopes, sinks

    def capped(self, scores):
        return scores if self.softcap == 0 else self.softcap * np.tanh(scores / self.softcap)

    def alibi(self, queries, keys):
        """What is added to the scores, [H, queries, keys]."""
        if self.slopes is None:
            return 0.0
        level = np.arange(queries)[:, None] + keys - queries
        return -np.asarray(self.slopes, np.float64)[:, None, None] * np.abs(level - np.arange(keys)[None])

    def sink(self, heads):
        """[H, 1, 1]"""
        values = np.full(heads, -np.inf) if self.sinks is None else np.asarray(self.sinks, np.float64)
        return values[:, None, None]

    def handle(self, library):
        return library.score_modifiers(self.softcap, self.slopes, self.sinks)

    @property
    def largest(self):
        """What is at most added to a score: rows have a few hundred keys."""
        slope = 0.0 if self.slopes is None else float(np.abs(self.slopes).max(initial=0))
        sink = 0.0 if self.sinks is None else float(np.abs(np.asarray(self.sinks)[np.isfinite(self.sinks)]).max(initial=0))
        return 400 * slope + sink

    def __str__(self):
        return f"softcap {self.softcap}, slopes {self.slopes}, sinks {self.sinks}"


def attend(q, k, v, keep, sees, bias, scale, modifiers, dtype=None):
    """Attention in float64 or, with an element type, as a naive program computes it in that: sums in
    float32, and scores, weights and outputs rounded. Shapes [H, Sq, D], [Hkv, Sk, D], keep [Sk],
    sees [Sq, Sk] or None, bias [H, Sq, Sk] or None. Returns the output and the logarithms of the sums."""
    wide = np.float64 if dtype is None else np.float32
    step = (lambda x: x) if dtype is None else (lambda x: round_to(dtype, x))
    group = q.shape[0] // k.shape[0]
    kept = np.flatnonzero(keep)
    k, v = np.repeat(k[:, kept], group, 0).astype(wide), np.repeat(v[:, kept], group, 0).astype(wide)
    scores = step(wide(scale) * (q.astype(wide) @ k.transpose(0, 2, 1)))
    scores = step(modifiers.capped(scores).astype(wide))
    if modifiers.slopes is not None:
        scores = step((scores + modifiers.alibi(q.shape[1], len(keep))[:, :, kept]).astype(wide))
    if bias is not None:
        scores = step(scores + bias[:, :, kept].astype(wide))
    if sees is not None:
        scores = np.where(sees[None][:, :, kept], scores, wide(-np.inf))
    sink = step(modifiers.sink(q.shape[0]).astype(wide))
    if len(kept) == 0:
        return np.zeros(q.shape, wide), np.broadcast_to(sink[..., 0], q.shape[:2]).astype(np.float64)
    largest = np.maximum(scores.max(-1, keepdims=True), sink)
    finite = np.isfinite(largest)
    weights = np.where(finite, np.exp(scores - np.where(finite, largest, 0)), 0)
    sums = weights.sum(-1, keepdims=True) + np.where(finite, np.exp(sink - np.where(finite, largest, 0)), 0)
    with np.errstate(divide="ignore"):
        lse = (np.where(finite, largest, 0) + np.log(sums))[..., 0]
    return step(step(weights / np.where(sums > 0, sums, 1)) @ v), lse


def floor(dtype, exact, q, k, v, scale, bias, modifiers):
    """What twice the naive run's error leaves out: two roundings of the output (or 1e-5 in f32) of
    the largest reference; and the rounding of a score in f32, which grows with the score, moves its
    key's weight by that share, and comes in another order than the naive run's."""
    rounding = 1e-5 if dtype == vf.F32 else 2 * ROUNDING[dtype]
    norm = lambda x: float(np.sqrt((x.astype(np.float64) ** 2).sum(-1).max(initial=0)))  # noqa: E731
    finite = np.abs(bias[np.isfinite(bias)]).max(initial=0) if bias is not None else 0
    score = abs(scale) * norm(q) * norm(k) + float(finite) + modifiers.largest
    largest = np.abs(exact).max(initial=0)
    return rounding * float(largest) + 4 * 2.0**-23 * score * float(np.abs(v).max(initial=0))


def compare(what, got, exact, naive, allowed):
    error = np.abs(got.astype(np.float64) - exact)
    bound = 2 * float(np.abs(naive.astype(np.float64) - exact).max(initial=0)) + allowed
    bad = ~(error <= bound)
    if bad.any():
        at = np.unravel_index(int(np.argmax(np.where(np.isnan(error), np.inf, error))), error.shape)
        at = tuple(map(int, at))
        raise Wrong(
            f"{what}{list(at)}: expected {exact[at]:.9g} within {bound:.3g}, got {got[at]:.9g}; "
            f"{int(bad.sum())} of {bad.size} elements differ"
        )


def zeros(what, values):
    if np.ascontiguousarray(values).tobytes().strip(b"\0"):
        raise Wrong(f"{what}: expected +0.0")


class Call:
    """What one seed stands for, as far as both kinds of calls share it."""

    def __init__(self, seed, dtypes, widest):
        self.rng = rng = np.random.default_rng(seed)
        self.dtype = int(rng.choice(dtypes))
        self.batch = int(rng.integers(0, 4)) if rng.random() < 0.3 else int(rng.integers(1, 4))
        self.seq_q, self.seq_k = self.length(), self.length()
        self.kv_heads = int(rng.integers(1, 4))
        self.heads = self.kv_heads * int(rng.integers(1, 4))
        self.dim = 8 * int(rng.choice([1, 2, 3, 4, 5, 8, 8, 9, 12, 16, 16, 17, 24, 32]))
        if rng.random() < 0.2:
            # Those that no kernel reads as they lie, and wide ones.
            self.dim = min(int(rng.choice([1, 3, 7, 20, 59, 111, 257, 320, 511])), widest)
        default = 1 / math.sqrt(self.dim)
        self.given_scale = None if rng.random() < 0.6 else float(np.float32(rng.choice([0.0, 1.0, -0.5, default * 3, -2.0])))
        self.scale = default if self.given_scale is None else self.given_scale
        self.size = float(rng.choice([1.0, 1.0, 1.0, 0.01, 8.0]))

    def length(self):
        """Tokens: none, about one tile, or a few tiles."""
        edges = [0, 1, 7, 8, 9, 31, 33, 64, 65, 100, 129, 200]
        return int(self.rng.choice(edges) if self.rng.random() < 0.5 else self.rng.integers(1, 48))

    def normal(self, *shape):
        return round_to(self.dtype, self.rng.standard_normal(shape) * self.size)

    def keep(self, seq):
        """A [B, seq] mask of one of the kinds that occur, or of random bits."""
        rng, shape = self.rng, (self.batch, seq)
        kind = rng.integers(0, 5)
        if kind == 0:
            return np.ones(shape, bool)
        if kind == 1:
            return np.zeros(shape, bool)
        if kind == 2:
            return np.arange(seq) < rng.integers(0, seq + 1, (self.batch, 1))
        if kind == 3:
            start = rng.integers(0, seq + 1, (self.batch, 2))
            start.sort(1)
            return (np.arange(seq) < start[:, :1]) | (np.arange(seq) >= start[:, 1:])
        return rng.random(shape) < rng.random()

    def __str__(self):
        return (
            f"{NAMES[self.dtype]} B{self.batch} Sq{self.seq_q} Sk{self.seq_k} H{self.heads}/{self.kv_heads} "
            f"D{self.dim} scale {self.given_scale} values {self.size}"
        )


class Fuzzer:
    def __init__(self, name):
        self.library = vf.Library()
        self.device = self.library.open(name)
        self.cuda = Cuda(self.library) if name == "cuda" else None
        info = self.device.info()
        self.dtypes = [dtype for dtype in NAMES if info.dtypes >> dtype & 1]
        self.kernels = [number for number in self.library.kernels.values() if number and info.kernels >> number & 1]
        # The largest head dimension of any of its kernels.
        self.widest = 256 if name == "cuda" else 512
        self.about = f"{info.name.decode()}, {', '.join(NAMES[dtype] for dtype in self.dtypes)}"

    def run(self, seed):
        """One call. Returns what was called, for a failure's message."""
        call = Call(seed, self.dtypes, self.widest)
        self.described = str(call)
        in_device_memory = self.cuda is not None and call.rng.random() < 0.5
        self.memory = self.cuda.memory if in_device_memory else Host
        self.target = self.cuda.device if in_device_memory else self.device
        kind = call.rng.integers(0, 8)
        if kind == 0:
            self.packed(call)
        elif kind == 1:
            self.moved(call)
        else:
            self.forward(call)

    def strided(self, call, shape, values=None, keep=None):
        return Strided(call.rng, self.memory, call.dtype, shape, values, keep)

    def key_mask(self, call, keep):
        """The mask by one of the ways to make it."""
        batch, seq = keep.shape
        lengths = keep.sum(1)
        ways = ["integers", "runs"] + (["lengths"] if (keep == (np.arange(seq) < lengths[:, None])).all() else [])
        way = ways[call.rng.integers(0, len(ways))]
        if way == "lengths":
            return self.library.key_mask_from_lengths([int(n) for n in lengths], seq)
        if way == "runs":
            runs = [(b, int(s), int(s) + 1) for b, s in zip(*np.nonzero(keep))]
            return self.library.key_mask_from_runs(runs, batch, seq)
        size = int(call.rng.choice([1, 2, 4, 8]))
        # Any value but 0 keeps the token.
        integers = np.where(keep, call.rng.integers(1, 127), 0).astype(f"u{size}")
        return self.library.key_mask_from_integers(integers.ctypes.data, size, batch, seq)

    def device_meta(self, call, keep):
        meta = self.target.device_meta(*keep.shape)
        values = self.memory(vf.F32, keep.astype(np.uint8))
        meta.rebuild(vf.mask_view(values.address, keep.shape, None, 1, self.memory.kind, keep.size))
        # The device may read the mask after the call.
        self.target.synchronize()
        return meta

    def ranges(self, call, of, sizes):
        """Ranges of a random rule for `of`, and which query sees which key, [Sq, Sk] for each of
        the `sizes` of batch rows or sequences."""
        rng, lib = call.rng, self.library
        rule = str(rng.choice(["causal", "window", "prefix", "own", "both"]))
        if rule == "both":
            one, other = self.ranges(call, of, sizes), self.ranges(call, of, sizes)
            return one[0].intersect(other[0]), [x & y for x, y in zip(one[1], other[1])]
        # A query's own place, level with the keys at the end; and the keys.
        places = [(np.arange(sq)[:, None] + sk - sq, np.arange(sk)[None]) for sq, sk in sizes]
        if rule == "causal":
            self.described += ", causal"
            return lib.key_ranges_causal(of), [key <= place for place, key in places]
        if rule == "window":
            choices = [None, 0, 1, 5, 31, 64, 2**40]
            left, right = (choices[rng.integers(0, len(choices))] for _ in range(2))
            self.described += f", window ({left}, {right})"
            limit = lambda side: 2**50 if side is None else side  # noqa: E731
            sees = [(place - key <= limit(left)) & (key - place <= limit(right)) for place, key in places]
            return lib.key_ranges_window(of, left, right), sees
        if rule == "prefix":
            count = int(rng.choice([0, 1, 9, 70, 2**40]))
            self.described += f", prefix {count}"
            return lib.key_ranges_prefix(of, count), [(key < count) | (key <= place) for place, key in places]
        self.described += ", own ranges"
        own = [np.sort(rng.integers(0, sk + 1, (sq, 2)), 1) for sq, sk in sizes]
        values = [(int(first), int(end)) for each in own for first, end in each]
        sees = [(key >= each[:, :1]) & (key < each[:, 1:]) for each, (_, key) in zip(own, places)]
        return lib.key_ranges_from_values(of, values), sees

    def documents(self, call):
        """[B, S] numbers of documents, of which 0 is none."""
        rng, seq = call.rng, call.seq_k
        ids = np.zeros((call.batch, seq), np.uint32)
        for row in ids:
            edges = np.sort(rng.integers(0, seq + 1, int(rng.integers(0, 6))))
            numbers = rng.permutation(len(edges) + 1)
            for number, first, end in zip(numbers, [0, *edges], [*edges, seq]):
                # Masked tokens lie between documents: one inside would make two of it.
                row[first + int(rng.integers(0, 2)) : end] = number
        return ids

    def bias(self, call):
        """A tensor that broadcasts to [B, H, Sq, Sk], what keeps its memory, and its values."""
        rng, full = call.rng, (call.batch, call.heads, call.seq_q, call.seq_k)
        rank = int(rng.integers(1, 5))
        shape = tuple(1 if rng.random() < 0.3 else size for size in full[4 - rank :])
        dtype = call.dtype if rng.random() < 0.5 else vf.F32
        values = round_to(dtype, rng.standard_normal(shape))
        values[rng.random(shape) < 0.1] = -np.inf
        held = self.memory(dtype, narrow(dtype, values))
        tensor = vf.tensor(held.address, shape, None, dtype, held.kind, values.size * vf.ELEMENT_BYTES[dtype])
        self.described += f", bias {list(shape)}"
        return tensor, held, np.broadcast_to(values, full)

    def modifiers(self, call):
        """Random modifiers, and their handle; None for none of them."""
        rng, heads = call.rng, call.heads
        if rng.random() < 0.6:
            return Modifiers(), None
        softcap = float(np.float32(rng.choice([0.0, 0.3, 5.0, 50.0])))
        numbers = lambda scale: [float(x) for x in (rng.standard_normal(heads) * scale).astype(np.float32)]  # noqa: E731
        slopes = numbers(0.2) if rng.random() < 0.5 else None
        sinks = numbers(3.0) if rng.random() < 0.5 else None
        if sinks is not None and rng.random() < 0.3:
            sinks[0] = -math.inf
        made = Modifiers(softcap, slopes, sinks)
        self.described += f", {made}"
        return made, made.handle(self.library)

    def options(self, call, paths, ranges=None, modifiers=None):
        rng = call.rng
        path = str(rng.choice(paths)) if rng.random() < 0.3 else "auto"
        kernel = int(rng.choice(self.kernels)) if rng.random() < 0.3 else "auto"
        self.described += f", path {path}, kernel {kernel}"
        return self.library.options(call.given_scale, path, kernel, ranges, modifiers)

    def attempt(self, forced, function, *arguments, **named):
        """Calls; returns whether the call was done: a forced path or kernel may not apply."""
        try:
            function(*arguments, **named)
        except vf.Error as error:
            if forced and error.status == "NOT_APPLICABLE":
                return False
            raise Wrong(f"{error.status}: {error}") from error
        return True

    def forward(self, call):
        rng, lib = call.rng, self.library
        kinds = ["none", "key", "bias", "varlen", "cross", "documents", "device", "device-cross"]
        kind = str(rng.choice(kinds))
        is_self, is_device = kind in ("varlen", "documents", "device"), kind.startswith("device")
        if is_self:
            call.seq_q = call.seq_k
        shape_q = (call.batch, call.seq_q, call.heads, call.dim)
        shape_k = (call.batch, call.seq_k, call.kv_heads, call.dim)
        q, k, v = call.normal(*shape_q), call.normal(*shape_k), call.normal(*shape_k)
        ids = self.documents(call) if kind == "documents" else None
        if ids is not None:
            key_keep = ids != 0
        else:
            key_keep = np.ones((call.batch, call.seq_k), bool) if kind in ("none", "bias") else call.keep(call.seq_k)
        query_keep = None
        if is_self:
            query_keep = key_keep
        elif kind.endswith("cross"):
            query_keep = call.keep(call.seq_q)
        self.described += f", mask {kind}, {int(key_keep.sum())} keys"
        ranges = added = held = bias = None
        sees = np.ones((call.batch, call.seq_q, call.seq_k), bool)
        if rng.random() < 0.5:
            of = (call.batch, call.seq_q, call.seq_k)
            ranges, allowed = self.ranges(call, of, [of[1:]] * call.batch)
            sees = np.array(allowed, bool).reshape(of)
        if ids is not None:
            sees = sees & (ids[:, :, None] == ids[:, None, :])
        if kind == "bias" or rng.random() < 0.2:
            added, held, bias = self.bias(call)
        modifiers, handle = self.modifiers(call)
        more = (ranges, added, handle)
        if kind == "none":
            mask = None if more == (None, None, None) else vf.none(*more)
        elif kind == "key":
            mask = vf.key(self.key_mask(call, key_keep), *more)
        elif kind == "bias":
            mask = vf.bias(added, ranges, handle)
        elif kind == "documents":
            mask = vf.varlen(lib.meta_from_document_ids(ids.tolist(), call.seq_k), None, *more)
        else:
            make = self.device_meta if is_device else lambda call, keep: lib.meta(self.key_mask(call, keep))
            metas = [make(call, keep) for keep in ([key_keep] if is_self else [query_keep, key_keep])]
            mask = vf.varlen(metas[0], metas[1] if len(metas) == 2 else None, *more)
        # What a query can see at all; and the keys that any query can.
        sees &= key_keep[:, None]
        used = (sees if query_keep is None else sees & query_keep[:, :, None]).any(1)
        tensors = [
            self.strided(call, shape_q, q, query_keep),
            self.strided(call, shape_k, k, used),
            self.strided(call, shape_k, v, used),
            self.strided(call, shape_q),
        ]
        options = self.options(call, ["dense", "fused", "packed"])
        plan = vf.Plan()
        forced = options.path != 0 or options.kernel != 0
        views = [tensor.tensor() for tensor in tensors]
        has_lse = rng.random() < 0.3
        lse = Strided(rng, self.memory, vf.F32, (call.batch, call.heads, call.seq_q)) if has_lse else None
        wanted = None if lse is None else lse.tensor()
        if not self.attempt(forced, self.target.forward, *views, mask, options, plan, wanted):
            return
        self.described += f": {plan}"
        got = tensors[3].read()
        exact, naive = np.zeros(shape_q), np.zeros(shape_q, np.float32)
        sums = np.zeros((call.batch, call.heads, call.seq_q))
        for b in range(call.batch):
            of = lambda x: x[b].transpose(1, 0, 2)  # noqa: B023, E731
            row_bias = None if bias is None else bias[b]
            for to, dtype in ((exact, None), (naive, call.dtype)):
                out, log = attend(of(q), of(k), of(v), key_keep[b], sees[b], row_bias, call.scale, modifiers, dtype)
                to[b] = out.transpose(1, 0, 2)
                if dtype is None:
                    sums[b] = log
        if query_keep is not None:
            exact[~query_keep], naive[~query_keep] = 0, 0
            zeros("rows of masked queries", got[~query_keep])
        zeros("rows without keys", got[~sees.any(2)])
        compare("out", got, exact, naive, floor(call.dtype, exact, q, k, v, call.scale, bias, modifiers))
        if lse is not None:
            if query_keep is not None:
                sums[~np.broadcast_to(query_keep[:, None], sums.shape)] = -np.inf
            most = 0 if bias is None else np.abs(bias[np.isfinite(bias)]).max(initial=0)
            compare_lse(lse.read(), sums, q, k, call.scale, most + modifiers.largest)

    def packed(self, call):
        rng = call.rng
        lengths = [[int(n) for n in rng.integers(0, limit + 1, call.batch)] for limit in (call.seq_q, call.seq_k)]
        edges = [np.concatenate([[0], np.cumsum(each)]).astype(int) for each in lengths]
        total_q, total_k = (int(each[-1]) for each in edges)
        shape_q, shape_k = (total_q, call.heads, call.dim), (total_k, call.kv_heads, call.dim)
        self.described += f", packed rows of {lengths}"
        q, k, v = call.normal(*shape_q), call.normal(*shape_k), call.normal(*shape_k)
        tensors = [self.strided(call, shape_q, q), self.strided(call, shape_k, k), self.strided(call, shape_k, v)]
        tensors.append(self.strided(call, shape_q))
        lse = Strided(rng, self.memory, vf.F32, (call.heads, total_q)) if rng.random() < 0.5 else None
        sequences = [self.library.cu_seqlens([int(edge) for edge in each]) for each in edges]
        ranges, sees = None, [None] * call.batch
        if rng.random() < 0.5:
            ranges, sees = self.ranges(call, sequences, list(zip(*lengths)))
        modifiers, handle = self.modifiers(call)
        options = self.options(call, ["auto"], ranges, handle)
        arguments = [*(tensor.tensor() for tensor in tensors[:3]), *sequences, tensors[3].tensor()]
        lse_tensor = None if lse is None else lse.tensor()
        if not self.attempt(options.kernel != 0, self.target.varlen_attention, *arguments, lse_tensor, options):
            return
        got = tensors[3].read()
        exact, naive = np.zeros(shape_q), np.zeros(shape_q, np.float32)
        sums = np.zeros((call.heads, total_q))
        for b in range(call.batch):
            rows, keys = slice(*edges[0][b : b + 2]), slice(*edges[1][b : b + 2])
            of = lambda x, rows: x[rows].transpose(1, 0, 2)  # noqa: E731
            keep = np.ones(lengths[1][b], bool)
            for to, dtype in ((exact, None), (naive, call.dtype)):
                out, log = attend(of(q, rows), of(k, keys), of(v, keys), keep, sees[b], None, call.scale, modifiers, dtype)
                to[rows] = out.transpose(1, 0, 2)
                if dtype is None:
                    sums[:, rows] = log
        compare("out", got, exact, naive, floor(call.dtype, exact, q, k, v, call.scale, None, modifiers))
        if lse is not None:
            compare_lse(lse.read(), sums, q, k, call.scale, modifiers.largest)

    def moved(self, call):
        """Rows packed and scattered, bit for bit."""
        seq = call.seq_q
        keep = call.keep(seq)
        meta = self.library.meta(self.key_mask(call, keep))
        total = int(keep.sum())
        self.described += f", {total} rows moved"
        info = meta.info()
        if (info.batch, info.seq, info.total_valid, info.max_seqlen) != (
            call.batch, seq, total, int(keep.sum(1).max(initial=0)),
        ):  # fmt: skip
            raise Wrong("metadata: wrong sizes")
        if meta.indices() != np.flatnonzero(keep).tolist():
            raise Wrong("metadata: wrong indices")
        shapes = [(call.batch, seq, heads, call.dim) for heads in (call.heads, call.kv_heads, call.kv_heads)]
        values = [call.normal(*shape) for shape in shapes]
        padded = [self.strided(call, shape, x, keep) for shape, x in zip(shapes, values)]
        packed = [self.strided(call, (total, *shape[2:])) for shape in shapes]
        inputs, outputs = [x.tensor() for x in padded], [x.tensor() for x in packed]
        self.attempt(False, self.target.pack_qkv, *inputs, meta, *outputs)
        for name, x, value in zip("qkv", packed, values):
            if x.read().tobytes() != np.ascontiguousarray(value[keep]).tobytes():
                raise Wrong(f"packed {name} differs")
        back = self.strided(call, shapes[0])
        self.attempt(False, self.target.scatter_to_padded, outputs[0], meta, back.tensor())
        if back.read().tobytes() != np.where(keep[..., None, None], values[0], np.float32(0)).tobytes():
            raise Wrong("scattered rows differ")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "wgpu"])
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--minutes", type=float, help="how long [default: 1]")
    limit.add_argument("--calls", type=int, help="how many calls")
    parser.add_argument("--seed", type=int, help="seed of the first call [default: from the clock]")
    options = parser.parse_args()
    try:
        fuzzer = Fuzzer(options.device)
    except vf.Error as error:
        if error.status != "DEVICE_UNAVAILABLE":
            raise
        print(error, file=sys.stderr)
        sys.exit(NOT_AVAILABLE)
    first = time.time_ns() % 10**12 if options.seed is None else options.seed
    start, seconds = time.monotonic(), 60 * (options.minutes or 1)
    print(f"{fuzzer.about}, seeds from {first} on", flush=True)
    done = 0
    while done < options.calls if options.calls is not None else time.monotonic() - start < seconds:
        try:
            fuzzer.run(first + done)
        except Exception as error:
            print(f"seed {first + done}: {fuzzer.described}\n{type(error).__name__}: {error}")
            print(f"again: {sys.argv[0]} --device {options.device} --seed {first + done} --calls 1")
            if not isinstance(error, Wrong):
                raise
            sys.exit(1)
        done += 1
    print(f"{done} calls in {time.monotonic() - start:.0f} s, all right")


if __name__ == "__main__":
    main()
