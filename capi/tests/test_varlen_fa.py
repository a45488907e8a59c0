"""The C library from Python, through capi/python/varlen_fa.py: `python3 test_varlen_fa.py DEVICE`,
which is cpu, wgpu or cuda. Uses only Python's standard library. VARLEN_FA_LIBRARY names the shared
library. Exits with 77 if the device is absent.

On cuda every test of results runs twice: with tensors in host memory, and with tensors in external
CUDA memory, on an external stream."""

import array
import ctypes
import math
import multiprocessing
import random
import struct
import sys
import threading
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
import varlen_fa as vf  # noqa: E402

NOT_AVAILABLE = 77
BATCH, SEQ, HEADS, KV_HEADS, DIM = 2, 9, 4, 2, 16
LENGTHS = [5, 9]
TOTAL = sum(LENGTHS)

TOLERANCES = {vf.F32: 1e-5, vf.F16: 2e-3}

library = vf.Library()
device_name = sys.argv.pop(1) if len(sys.argv) > 1 else "cpu"
try:
    device = library.open(device_name)
except vf.Error as error:
    if error.status != "DEVICE_UNAVAILABLE":
        raise
    print(error, file=sys.stderr)
    sys.exit(NOT_AVAILABLE)
DTYPES = [dtype for dtype in TOLERANCES if device.info().dtypes >> dtype & 1]
# The most precise one.
DTYPE = DTYPES[0]


class Memory:
    """Elements in host memory, as f32 or, through `struct`, f16."""

    kind = vf.HOST

    def __init__(self, dtype, values):
        self.dtype, self.count = dtype, len(values)
        if dtype == vf.F32:
            self.data = array.array("f", values)
        else:
            self.data = array.array("H", struct.unpack(f"{len(values)}H", struct.pack(f"{len(values)}e", *values)))
        self.place()

    def place(self):
        """Puts the elements at `address`."""

    @property
    def address(self):
        return self.data.buffer_info()[0]

    def values(self):
        if self.dtype == vf.F32:
            return list(self.data)
        return list(struct.unpack(f"{self.count}e", self.data.tobytes()))

    def tensor(self, shape, strides=None, offset=0):
        element = vf.ELEMENT_BYTES[self.dtype]
        address, size = self.address + offset * element, (self.count - offset) * element
        return vf.tensor(address, shape, strides, self.dtype, self.kind, size)


class Cuda:
    """A context and a stream of the CUDA driver, and a device over them."""

    def __init__(self):
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


class CudaMemory(Memory):
    """The same in external CUDA memory."""

    kind = vf.CUDA
    cuda = None  # a Cuda, set by the first test that needs one

    def place(self):
        pointer, self.size = ctypes.c_uint64(), ctypes.c_size_t(max(len(self.data.tobytes()), 1))
        self.cuda("cuMemAlloc_v2", ctypes.byref(pointer), self.size)
        self.pointer = pointer.value
        source = self.data.buffer_info()[0]
        self.cuda("cuMemcpyHtoD_v2", pointer, ctypes.c_void_p(source), ctypes.c_size_t(len(self.data.tobytes())))

    def __del__(self):
        self.cuda.driver.cuMemFree_v2(ctypes.c_uint64(self.pointer))

    @property
    def address(self):
        return self.pointer

    def values(self):
        self.cuda.device.synchronize()
        into = ctypes.c_void_p(self.data.buffer_info()[0])
        self.cuda("cuMemcpyDtoH_v2", into, ctypes.c_uint64(self.pointer), ctypes.c_size_t(len(self.data.tobytes())))
        return super().values()


def randoms(memory, dtype, count, seed):
    generator = random.Random(seed)
    return memory(dtype, [generator.uniform(-1, 1) for _ in range(count)])


def attend(q, k, v, valid, scale, sees=lambda i, j: True, added=lambda i, j: 0.0):
    """Rows of one head, slowly: q, k, v are lists of rows, `valid` the keys that count. Query i
    sees key j of them if `sees` says so, and `added` is added to its score."""
    out = []
    for i, row in enumerate(q):
        keys = [key for key in valid if sees(i, key)]
        scores = [scale * sum(a * b for a, b in zip(row, k[key])) + added(i, key) for key in keys]
        weights = [math.exp(score) for score in scores]
        total = sum(weights) or 1.0
        out.append([sum(w * v[key][d] for w, key in zip(weights, keys)) / total for d in range(DIM)])
    return out


def rows(values, shape, strides, b, h):
    return [
        [values[b * strides[0] + s * strides[1] + h * strides[2] + d] for d in range(DIM)] for s in range(shape[1])
    ]


def nans(memory, dtype, count):
    return memory(dtype, [math.nan] * count)


def furthest(a, b):
    """The largest difference; a NaN counts as one."""
    return max((abs(x - y) if x - y == x - y else math.inf for x, y in zip(a, b)), default=0.0)


class Stage:
    """q, k and v as parts of one fused projection, and an output."""

    FUSED = HEADS + 2 * KV_HEADS

    def __init__(self, dtype=DTYPE, memory=Memory, on=device):
        self.device = on
        self.qkv = randoms(memory, dtype, BATCH * SEQ * self.FUSED * DIM, 0)
        self.out_memory = nans(memory, dtype, BATCH * SEQ * HEADS * DIM)
        self.strides = [SEQ * self.FUSED * DIM, self.FUSED * DIM, DIM, 1]
        part = lambda first, heads: self.qkv.tensor([BATCH, SEQ, heads, DIM], self.strides, first * DIM)
        self.q, self.k = part(0, HEADS), part(HEADS, KV_HEADS)
        self.v = part(HEADS + KV_HEADS, KV_HEADS)
        self.out = self.out_memory.tensor([BATCH, SEQ, HEADS, DIM])

    def run(self, mask=None, **others):
        self.device.forward(self.q, self.k, self.v, self.out, mask, **others)
        return self.out_memory.values()

    def expected(self, b, h, valid, scale=DIM**-0.5, **rules):
        values, shape, kv = self.qkv.values(), [BATCH, SEQ], h // (HEADS // KV_HEADS)
        of = lambda head: rows(values, shape, self.strides, b, head)
        return attend(of(h), of(HEADS + kv), of(HEADS + KV_HEADS + kv), valid, scale, **rules)


class Attention(unittest.TestCase):
    """Results, with tensors in host memory."""

    memory, device = Memory, device

    def stage(self, dtype=DTYPE):
        return Stage(dtype, self.memory, self.device)

    def check(self, stage, got, tolerance):
        for b, length in enumerate(LENGTHS):
            for h in range(HEADS):
                expected = stage.expected(b, h, range(length))
                for s in range(SEQ):
                    start = ((b * SEQ + s) * HEADS + h) * DIM
                    row = got[start : start + DIM]
                    if s >= length:
                        self.assertEqual(row, [0.0] * DIM)
                        self.assertTrue(all(math.copysign(1, value) > 0 for value in row))
                    else:
                        self.assertLess(furthest(row, expected[s]), tolerance)

    def test_varlen_is_what_a_loop_gives(self):
        meta = library.meta_from_lengths(LENGTHS, SEQ)
        meta.upload(self.device)
        for dtype in DTYPES:
            stage, plan, tolerance = self.stage(dtype), vf.Plan(), TOLERANCES[dtype]
            self.check(stage, stage.run(vf.varlen(meta), plan=plan), tolerance)
            self.assertRegex(str(plan), "^(fused|packed) by ")
            for path in ["dense", "packed", "fused"]:
                plan = vf.Plan()
                self.check(stage, stage.run(vf.varlen(meta), options=library.options(path=path), plan=plan), tolerance)
                self.assertEqual(plan.path, library.paths[path])

    def test_every_mask_type_says_the_same(self):
        stage = self.stage()
        expected = stage.run(vf.varlen(library.meta_from_lengths(LENGTHS, SEQ)))
        keep = [int(s < length) for length in LENGTHS for s in range(SEQ)]
        masks = [library.key_mask_from_runs([(1, 0, 9), (0, 0, 5)], BATCH, SEQ)]
        for code, size in [("b", 1), ("h", 2), ("i", 4), ("q", 8)]:
            flags = array.array(code, [-flag for flag in keep])
            masks.append(library.key_mask_from_integers(flags.buffer_info()[0], size, BATCH, SEQ))
        for mask in masks:
            meta = library.meta(mask)
            self.assertEqual(stage.run(vf.varlen(meta)), expected)
            self.assertEqual(meta.cu_seqlens_values(), [0, 5, 14])
            self.assertEqual(meta.indices(), [at for at, flag in enumerate(keep) if flag])
            self.assertEqual(meta.inv_indices(), [sum(keep[:at]) if flag else -1 for at, flag in enumerate(keep)])

    def test_masks_of_any_shape(self):
        stage = self.stage()
        expected = stage.run(vf.varlen(library.meta_from_lengths(LENGTHS, SEQ)))
        keep = [int(s < length) for length in LENGTHS for s in range(SEQ)]
        shaped = lambda code, values, shape: memoryview(array.array(code, values)).cast("B").cast(code, shape)
        masks = []
        for shape in [[BATCH, SEQ], [BATCH, 1, 1, SEQ], [BATCH, 1, SEQ]]:
            for lowest in [-math.inf, -1e4, -3e38]:
                added = [0.0 if flag else lowest for flag in keep]
                masks += [library.key_mask_from_array(shaped(code, added, shape)) for code in "fd"]
            masks += [library.key_mask_from_array(shaped(code, keep, shape), strict=True) for code in "bBhiq"]
            masks.append(library.key_mask_from_array(shaped("i", [-2 * flag for flag in keep], shape)))
        # finfo.min of a double is below every f32.
        masks.append(library.key_mask_from_array(shaped("d", [(1 - flag) * -1.7e308 for flag in keep], [BATCH, SEQ])))
        for mask in masks:
            self.assertEqual(stage.run(vf.varlen(library.meta(mask))), expected)
        row = library.key_mask_from_array(array.array("B", keep[:SEQ]), batch=BATCH)
        self.assertEqual(library.meta(row).cu_seqlens_values(), [0, LENGTHS[0], 2 * LENGTHS[0]])

    def test_values_that_are_no_mask(self):
        def refused(named, values, **others):
            with self.assertRaises(vf.Error) as raised:
                library.key_mask_from_array(values, **others)
            self.assertEqual(raised.exception.status, "MASK_ROW")
            self.assertIn(named, str(raised.exception))

        refused("row 0: token 1", array.array("f", [0, -2.5, 0]))
        refused("got 1", array.array("d", [1, 0]))
        refused("token 2", array.array("b", [0, 1, 2]), strict=True)
        for wrong in [array.array("u", "a"), memoryview(bytes(8)).cast("B", [2, 2, 2])]:
            with self.assertRaises(ValueError):
                library.key_mask_from_array(wrong)

    def test_key_mask_and_bias(self):
        stage = self.stage()
        by_mask = stage.run(vf.key(library.key_mask_from_lengths(LENGTHS, SEQ)))
        expected = stage.expected(0, 1, range(LENGTHS[0]))
        for s in range(SEQ):  # also of the queries that the mask drops
            start = (s * HEADS + 1) * DIM
            self.assertLess(furthest(by_mask[start : start + DIM], expected[s]), TOLERANCES[DTYPE])
        flat = self.memory(vf.F32, [0.0 if s < length else -math.inf for length in LENGTHS for s in range(SEQ)])
        for shape, strides in [([BATCH, 1, 1, SEQ], None), ([BATCH, HEADS, SEQ, SEQ], [SEQ, 0, 0, 1])]:
            by_bias = stage.run(vf.bias(flat.tensor(shape, strides)))
            self.assertLess(furthest(by_bias, by_mask), TOLERANCES[DTYPE])

    def check_rule(self, stage, got, valid, sees=lambda b, i, j: True, added=lambda i, j: 0.0, keeps=lambda b, i: True):
        """Rows are those of `attend`; those of queries that `keeps` drops, or that see nothing, are
        zeros."""
        for b in range(BATCH):
            for h in range(HEADS):
                rule = lambda i, j: sees(b, i, j)  # noqa: B023
                expected = stage.expected(b, h, valid[b], sees=rule, added=added)
                for i in range(SEQ):
                    start = ((b * SEQ + i) * HEADS + h) * DIM
                    row = got[start : start + DIM]
                    if not keeps(b, i) or not any(rule(i, j) for j in valid[b]):
                        self.assertEqual(row, [0.0] * DIM)
                        self.assertTrue(all(math.copysign(1, value) > 0 for value in row))
                    else:
                        self.assertLess(furthest(row, expected[i]), TOLERANCES[DTYPE])

    # Padding on the left, and a row that is whole.
    LEFT = [range(3, SEQ), range(SEQ)]

    def left_padded(self):
        return library.key_mask_from_runs([(b, keys.start, keys.stop) for b, keys in enumerate(self.LEFT)], BATCH, SEQ)

    def rules(self):
        """Ranges of every kind, each with what it means."""
        of, lib = (BATCH, SEQ, SEQ), library
        own = [(b + i) % 4 for b in range(BATCH) for i in range(SEQ)]
        causal, local = lib.key_ranges_causal(of), lib.key_ranges_window(of, 2, 1)
        return [
            (causal, lambda b, i, j: j <= i),
            (local, lambda b, i, j: i - 2 <= j <= i + 1),
            (lib.key_ranges_window(of, left=0), lambda b, i, j: j >= i),
            (lib.key_ranges_prefix(of, 4), lambda b, i, j: j < 4 or j <= i),
            (causal.intersect(local), lambda b, i, j: i - 2 <= j <= i),
            (
                lib.key_ranges_from_values(of, [(first, first + 3 * (first % 2)) for first in own]),
                lambda b, i, j: own[b * SEQ + i] % 2 == 1 and 0 <= j - own[b * SEQ + i] < 3,
            ),
        ]

    def test_ranges_are_what_a_loop_gives(self):
        stage, mask = self.stage(), self.left_padded()
        meta = library.meta(mask)
        keeps = lambda b, i: i in self.LEFT[b]
        whole = [range(SEQ)] * BATCH
        for ranges, sees in self.rules():
            self.check_rule(stage, stage.run(vf.none(ranges)), whole, sees)
            self.check_rule(stage, stage.run(vf.key(mask, ranges)), self.LEFT, sees)
            self.check_rule(stage, stage.run(vf.varlen(meta, ranges=ranges)), self.LEFT, sees, keeps=keeps)
            self.check_rule(stage, stage.run(vf.varlen(meta, meta, ranges)), self.LEFT, sees, keeps=keeps)

    def test_bias_beside_metadata_and_ranges(self):
        stage, mask = self.stage(), self.left_padded()
        meta = library.meta(mask)
        keeps = lambda b, i: i in self.LEFT[b]
        flat = randoms(self.memory, vf.F32, SEQ * SEQ, 5)
        values, tensor = flat.values(), flat.tensor([SEQ, SEQ])
        added = lambda i, j: values[i * SEQ + j]
        whole = [range(SEQ)] * BATCH
        self.check_rule(stage, stage.run(vf.varlen(meta, bias=tensor)), self.LEFT, added=added, keeps=keeps)
        self.check_rule(stage, stage.run(vf.key(mask, bias=tensor)), self.LEFT, added=added)
        for ranges, sees in self.rules()[:2]:
            self.check_rule(stage, stage.run(vf.varlen(meta, None, ranges, tensor)), self.LEFT, sees, added, keeps)
            for made in [vf.bias(tensor, ranges), vf.none(ranges, tensor)]:
                self.check_rule(stage, stage.run(made), whole, sees, added)

    def test_score_modifiers(self):
        stage, mask = self.stage(), self.left_padded()
        meta = library.meta(mask)
        keeps = lambda b, i: i in self.LEFT[b]
        slopes = [0.5] * HEADS
        linear, whole = library.score_modifiers(alibi=slopes), [range(SEQ)] * BATCH
        distance = lambda i, j: -0.5 * abs(i - j)
        for ranges, sees in [(None, lambda b, i, j: True), *self.rules()[:2]]:
            self.check_rule(stage, stage.run(vf.none(ranges, None, linear)), whole, sees, distance)
            self.check_rule(stage, stage.run(vf.key(mask, ranges, None, linear)), self.LEFT, sees, distance)
            got = stage.run(vf.varlen(meta, None, ranges, None, linear))
            self.check_rule(stage, got, self.LEFT, sees, distance, keeps)
        # A cap so large that it changes nothing, and sinks that take no weight.
        plain = stage.run(vf.varlen(meta))
        for modifiers in [library.score_modifiers(1e6), library.score_modifiers(sinks=[-math.inf] * HEADS)]:
            self.assertLess(furthest(stage.run(vf.varlen(meta, modifiers=modifiers)), plain), TOLERANCES[DTYPE])
        # A cap so small that all scores are equal, and sinks that take half of the weight then.
        equal = stage.run(vf.varlen(meta, modifiers=library.score_modifiers(1e-6)))
        sinks = [math.log(SEQ)] * HEADS
        whole_mask = library.key_mask_from_lengths([SEQ] * BATCH, SEQ)
        half = stage.run(vf.key(whole_mask, None, None, library.score_modifiers(1e-6, None, sinks)))
        mean = stage.run(vf.none(None, None, library.score_modifiers(1e-6)))
        self.assertLess(furthest(half, [value / 2 for value in mean]), TOLERANCES[DTYPE])
        row = SEQ * HEADS * DIM
        self.assertLess(furthest(equal[row:], mean[row:]), TOLERANCES[DTYPE])

    def test_documents(self):
        stage = self.stage()
        ids = [[1, 1, 2, 2, 2, 0, 3, 3, 0], [0, 9, 9, 9, 0, 0, 4, 5, 5]]
        meta = library.meta_from_document_ids(ids)
        self.assertEqual(meta.info().total_valid, 13)
        valid = [[i for i, number in enumerate(row) if number] for row in ids]
        same, keeps = lambda b, i, j: ids[b][i] == ids[b][j], lambda b, i: ids[b][i] != 0
        self.check_rule(stage, stage.run(vf.varlen(meta)), valid, same, keeps=keeps)
        causal = library.key_ranges_causal((BATCH, SEQ, SEQ))
        sees = lambda b, i, j: same(b, i, j) and j <= i
        self.check_rule(stage, stage.run(vf.varlen(meta, ranges=causal)), valid, sees, keeps=keeps)

    def test_packed_rows_with_ranges(self):
        q, k, v = (randoms(self.memory, DTYPE, TOTAL * HEADS * DIM, seed) for seed in (6, 7, 8))
        out, lse = nans(self.memory, DTYPE, TOTAL * HEADS * DIM), nans(self.memory, vf.F32, HEADS * TOTAL)
        cu = library.cu_seqlens([0, 5, TOTAL])
        options = library.options(ranges=library.key_ranges_causal((cu, cu)))
        tensors = [memory.tensor([TOTAL, HEADS, DIM]) for memory in (q, k, v)]
        last = out.tensor([TOTAL, HEADS, DIM])
        self.device.varlen_attention(*tensors, cu, cu, last, lse.tensor([HEADS, TOTAL]), options)
        got, sums = out.values(), lse.values()
        for h in range(HEADS):
            of = lambda memory: [memory.values()[(row * HEADS + h) * DIM :][:DIM] for row in range(TOTAL)]  # noqa: B023
            for first, end in [(0, 5), (5, TOTAL)]:
                queries, keys, values = (of(memory)[first:end] for memory in (q, k, v))
                expected = attend(queries, keys, values, range(end - first), DIM**-0.5, lambda i, j: j <= i)
                for i, row in enumerate(expected):
                    start = ((first + i) * HEADS + h) * DIM
                    self.assertLess(furthest(got[start : start + DIM], row), TOLERANCES[DTYPE])
                    scores = [sum(a * b for a, b in zip(queries[i], keys[j])) * DIM**-0.5 for j in range(i + 1)]
                    log = math.log(sum(map(math.exp, scores)))
                    self.assertLess(abs(sums[h * TOTAL + first + i] - log), TOLERANCES[DTYPE])

    def test_warm_up_takes_what_a_call_takes(self):
        stage, meta = self.stage(), library.meta_from_lengths(LENGTHS, SEQ)
        q, kv = [BATCH, SEQ, HEADS, DIM], [BATCH, SEQ, KV_HEADS, DIM]
        flat = self.memory(vf.F32, [0.0] * (BATCH * SEQ))
        key_mask = library.key_mask_from_lengths(LENGTHS, SEQ)
        bias, causal = flat.tensor([BATCH, 1, 1, SEQ]), library.key_ranges_causal((BATCH, SEQ, SEQ))
        masks = [None, vf.key(key_mask), vf.varlen(meta), vf.bias(bias), vf.none(causal), vf.varlen(meta, None, causal)]
        masks.append(vf.varlen(meta, None, causal, bias))
        for mask in masks:
            for options in [None, library.options(softmax_scale=0.5)]:
                warmed, plan = vf.Plan(), vf.Plan()
                self.device.warm_up(DTYPE, q, kv, mask, options, warmed)
                stage.run(mask, options=options, plan=plan)
                self.assertEqual(str(warmed), str(plan))
        self.device.warm_up(DTYPE, q, kv)

    def test_scale(self):
        stage = self.stage()
        got, expected = stage.run(options=library.options(softmax_scale=0.7)), stage.expected(1, 3, range(SEQ), 0.7)
        start = ((SEQ + 2) * HEADS + 3) * DIM
        self.assertLess(furthest(got[start : start + DIM], expected[2]), TOLERANCES[DTYPE])

    def test_strided_output_leaves_its_gaps(self):
        stage = self.stage(vf.F16)
        meta = library.meta_from_lengths(LENGTHS, SEQ)
        expected = stage.run(vf.varlen(meta))
        roomy = self.memory(vf.F16, [7.0] * (BATCH * HEADS * SEQ * (DIM + 8)))
        strides = [HEADS * SEQ * (DIM + 8), DIM + 8, SEQ * (DIM + 8), 1]  # heads outside tokens
        stage.out = roomy.tensor([BATCH, SEQ, HEADS, DIM], strides)
        stage.run(vf.varlen(meta))
        got = roomy.values()
        for b in range(BATCH):
            for s in range(SEQ):
                for h in range(HEADS):
                    start = b * strides[0] + s * strides[1] + h * strides[2]
                    dense = ((b * SEQ + s) * HEADS + h) * DIM
                    self.assertEqual(got[start : start + DIM], expected[dense : dense + DIM])
                    self.assertEqual(got[start + DIM : start + DIM + 8], [7.0] * 8)

    def test_primitives_are_the_packed_path(self):
        for dtype in DTYPES:
            stage, meta = self.stage(dtype), library.meta_from_lengths(LENGTHS, SEQ)
            expected = stage.run(vf.varlen(meta), options=library.options(path="packed"))
            packed = [nans(self.memory, dtype, TOTAL * heads * DIM) for heads in [HEADS, KV_HEADS, KV_HEADS, HEADS]]
            q, k, v, o = (m.tensor([TOTAL, m.count // TOTAL // DIM, DIM]) for m in packed)
            lse = nans(self.memory, vf.F32, HEADS * TOTAL)
            padded = nans(self.memory, dtype, BATCH * SEQ * HEADS * DIM)
            cu_seqlens = library.cu_seqlens([0, 5, 14])
            self.device.pack_qkv(stage.q, stage.k, stage.v, meta, q, k, v)
            self.device.varlen_attention(q, k, v, cu_seqlens, meta.cu_seqlens(), o, lse=lse.tensor([HEADS, TOTAL]))
            self.device.scatter_to_padded(o, meta, padded.tensor([BATCH, SEQ, HEADS, DIM]))
            self.assertEqual(padded.values(), expected)
            values, sums = (packed[0].values(), packed[1].values()), lse.values()
            for h in range(HEADS):
                row, kv = values[0][h * DIM :][:DIM], h // (HEADS // KV_HEADS)
                keys = [values[1][(key * KV_HEADS + kv) * DIM :][:DIM] for key in range(5)]
                total = sum(math.exp(sum(a * b for a, b in zip(row, key)) / 4) for key in keys)
                self.assertLess(abs(sums[h * TOTAL] - math.log(total)), 1e-4)

    def test_lse_and_merge(self):
        meta = library.meta_from_lengths(LENGTHS, SEQ)
        rest = library.key_mask_from_runs([(0, 3, LENGTHS[0]), (1, 0, LENGTHS[1])], BATCH, SEQ)
        first, second = library.meta_from_lengths([3, 0], SEQ), library.meta(rest)
        for dtype in DTYPES:
            stage, tolerance = self.stage(dtype), TOLERANCES[dtype]
            shape, sizes = [BATCH, SEQ, HEADS, DIM], [BATCH, HEADS, SEQ]
            parts = []
            for keys in [first, second]:
                lse = nans(self.memory, vf.F32, BATCH * HEADS * SEQ)
                stage.run(vf.varlen(meta, keys), lse=lse.tensor(sizes))
                out = self.memory(dtype, stage.out_memory.values())
                parts += [out, lse]
            views = [part.tensor(sizes if at % 2 else shape) for at, part in enumerate(parts)]
            out, lse = nans(self.memory, dtype, BATCH * SEQ * HEADS * DIM), nans(self.memory, vf.F32, BATCH * HEADS * SEQ)
            self.device.merge_attention(*views, out.tensor(shape), lse.tensor(sizes))
            self.check(stage, out.values(), 2 * tolerance)
            whole = nans(self.memory, vf.F32, BATCH * HEADS * SEQ)
            stage.run(vf.varlen(meta), lse=whole.tensor(sizes))
            for at, (merged, direct) in enumerate(zip(lse.values(), whole.values())):
                if at % SEQ < LENGTHS[at // SEQ // HEADS]:
                    self.assertLess(abs(merged - direct), 1e-4)
                else:
                    self.assertEqual((merged, direct), (-math.inf, -math.inf))
            with self.assertRaisesRegex(vf.Error, "`lse2`"):
                self.device.merge_attention(*views[:3], views[0], out.tensor(shape))

    def test_segments(self):
        """The bits of the call on whole tensors, of tensors that are cut differently."""
        token = {"q": HEADS * DIM, "k": KV_HEADS * DIM, "v": KV_HEADS * DIM, "out": HEADS * DIM}
        cuts = {"q": [4, 0, SEQ - 4], "k": [1, SEQ - 1], "v": [SEQ], "out": [SEQ - 2, 2]}
        meta = library.meta_from_lengths(LENGTHS, SEQ)
        for dtype in DTYPES:
            whole = {name: randoms(self.memory, dtype, BATCH * SEQ * size, 50) for name, size in token.items()}
            tensors, memories = {}, {}
            for name, size in token.items():
                heads = size // DIM
                values = whole[name].values()
                memories[name], tensors[name], first = [], [], 0
                for length in cuts[name]:
                    rows = [values[(b * SEQ + first) * size :][: length * size] for b in range(BATCH)]
                    memory = self.memory(dtype, [value for row in rows for value in row] or [0.0])
                    tensor = memory.tensor([BATCH, length, heads, DIM])
                    memories[name].append((first, length, memory))
                    tensors[name].append(tensor)
                    first += length
            shape = lambda name: [BATCH, SEQ, token[name] // DIM, DIM]
            q, k, v, out = (whole[name].tensor(shape(name)) for name in token)
            plan = vf.Plan()
            lses = [self.memory(vf.F32, [0.0] * (BATCH * HEADS * SEQ)) for _ in range(2)]
            lse, lse_of_segments = (lse.tensor([BATCH, HEADS, SEQ]) for lse in lses)
            self.device.forward(q, k, v, out, mask=vf.varlen(meta), lse=lse)
            self.device.forward(*tensors.values(), mask=vf.varlen(meta), lse=lse_of_segments, plan=plan)
            self.assertEqual(*(lse.values() for lse in lses))
            if device_name != "cuda":  # There it depends on the kernel.
                self.assertEqual("segments are copied" in str(plan), device_name == "wgpu", str(plan))
            expected = whole["out"].values()
            for first, length, memory in memories["out"]:
                got, size = memory.values(), token["out"]
                for b in range(BATCH):
                    rows = expected[(b * SEQ + first) * size :][: length * size]
                    self.assertEqual(got[b * length * size :][: length * size], rows, (first, b))
            # One of them may be a whole tensor.
            self.device.forward(q, tensors["k"], v, out, mask=vf.varlen(meta))
            self.assertEqual(whole["out"].values(), expected)
            with self.assertRaisesRegex(vf.Error, r"`k`: expected 1 to 8 segments, got 9"):
                self.device.forward(q, tensors["k"][:1] * 9, v, out)
            with self.assertRaisesRegex(vf.Error, r"`segments\[1\].q`: expected shape"):
                self.device.forward([tensors["q"][0], tensors["k"][1]], k, v, out)
            with self.assertRaisesRegex(vf.Error, r"`segments\[0\].out` may share memory with `segments\[0\].q`"):
                self.device.forward(tensors["q"], k, v, tensors["q"])

    def test_prepare_qk(self):
        meta = library.meta_from_lengths([3, SEQ], SEQ)
        lengths, half, eps = [4, SEQ - 4], 6, 1e-5
        heads = {"q": HEADS, "k": KV_HEADS}
        for number, dtype in enumerate(DTYPES):
            pairing = [vf.INTERLEAVED, vf.HALVES][number % 2]
            weights = {name: randoms(self.memory, vf.F32, DIM, 30 + at) for at, name in enumerate(heads)}
            parts, segments = [], []
            for at, length in enumerate(lengths):
                angles = [0.3 * (s + 1) * (i + 1) for s in range(length) for i in range(half)]
                cos, sin = (self.memory(dtype, [of(angle) for angle in angles]) for of in [math.cos, math.sin])
                x = {name: randoms(self.memory, dtype, BATCH * length * h * DIM, 40 + at) for name, h in heads.items()}
                out = {name: nans(self.memory, dtype, BATCH * length * h * DIM) for name, h in heads.items()}
                shape = lambda name: [BATCH, length, heads[name], DIM]
                views = [x[name].tensor(shape(name)) for name in heads]
                # The second segment is replaced.
                if at == 0:
                    views += [out[name].tensor(shape(name)) for name in heads]
                rotary = cos.tensor([length, half]), sin.tensor([length, half]), pairing
                norm = *(weights[name].tensor([DIM]) for name in heads), eps
                segments.append(vf.qk_segment(*views, norm=norm, rotary=rotary))
                before = {name: x[name].values() for name in heads}
                parts.append((length, before, out if at == 0 else x, x, cos, sin))
            self.device.prepare_qk(segments, meta=meta)
            for at, (length, before, out, _, cos, sin) in enumerate(parts):
                cos, sin = cos.values(), sin.values()
                for name, h in heads.items():
                    got = out[name].values()
                    for row in range(BATCH * length * h):
                        b, s = row // h // length, row // h % length
                        x, found = before[name][row * DIM :][:DIM], got[row * DIM :][:DIM]
                        if b == 0 and s + sum(lengths[:at]) >= 3:
                            self.assertTrue(all(map(math.isnan, found)) if at == 0 else found == x, (at, name, row))
                            continue
                        root = math.sqrt(sum(value * value for value in x) / DIM + eps)
                        expected = [value / root * weight for value, weight in zip(x, weights[name].values())]
                        for i in range(half):
                            a, other = (2 * i, 2 * i + 1) if pairing == vf.INTERLEAVED else (i, half + i)
                            turned = complex(expected[a], expected[other]) * complex(cos[s * half + i], sin[s * half + i])
                            expected[a], expected[other] = turned.real, turned.imag
                        self.assertLess(furthest(found, expected), TOLERANCES[dtype], (at, name, row))
            with self.assertRaisesRegex(vf.Error, "`mask`"):
                self.device.prepare_qk(segments[:1], meta=meta)

    def test_device_metadata(self):
        stage = self.stage()
        meta = self.device.device_meta(BATCH, SEQ)
        self.assertEqual(set(stage.run(vf.varlen(meta))), {0.0})
        # A [S, 2] array of 32-bit words, the batch rows its columns.
        turned = self.memory(vf.F32, [float(s < LENGTHS[b]) for s in range(SEQ) for b in range(BATCH)])
        meta.rebuild(vf.mask_view(turned.address, [BATCH, SEQ], [1, BATCH], 4, self.memory.kind))
        self.check(stage, stage.run(vf.varlen(meta)), TOLERANCES[DTYPE])


@unittest.skipIf(device_name != "cuda", "CUDA memory is that of the cuda device")
class External(Attention):
    """The same results in external CUDA memory, on an external stream; and what is refused
    there."""

    memory = CudaMemory

    @classmethod
    def setUpClass(cls):
        CudaMemory.cuda = Cuda()
        cls.device = CudaMemory.cuda.device

    def refused(self, status, words, call):
        with self.assertRaises(vf.Error) as caught:
            call()
        self.assertEqual(caught.exception.status, status, str(caught.exception))
        self.assertIn(words, str(caught.exception))

    def test_refusals(self):
        stage, host = self.stage(), Stage()
        for name in ["q", "k", "v", "out"]:
            good = getattr(stage, name)
            bad = vf.Tensor.from_buffer_copy(good)
            bad.data = host.out_memory.address  # host memory that the driver does not know
            setattr(stage, name, bad)
            self.refused("BAD_HANDLE", f"`{name}.data`", stage.run)
            bad.data, bad.memory = None, vf.CUDA
            self.refused("NULL_POINTER", f"`{name}.data`", stage.run)
            setattr(stage, name, good)
        stage.out.strides[0] = 1 << 40
        stage.out.bytes = 1 << 60
        # The descriptor allows more than the allocation has.
        self.refused("BAD_HANDLE", "`out.data`", stage.run)
        stage = self.stage()
        stage.out = stage.qkv.tensor([BATCH, SEQ, HEADS, DIM], stage.strides)
        self.refused("OVERLAP", "`out` may share memory with `q`", stage.run)


class Refusals(unittest.TestCase):
    def refused(self, status, words, call):
        with self.assertRaises(vf.Error) as caught:
            call()
        self.assertEqual(caught.exception.status, status, str(caught.exception))
        self.assertIn(words, str(caught.exception))

    def spoiled(self, status, words, **changes):
        """The call with some descriptor changed is refused, and its output is as it was."""
        stage = Stage()
        for name, change in changes.items():
            change(getattr(stage, name))
        self.refused(status, words, stage.run)
        self.assertTrue(all(math.isnan(value) for value in stage.out_memory.values()))

    def test_tensors(self):
        change = lambda **fields: lambda tensor: [setattr(tensor, *field) for field in fields.items()]

        def stride(dim, value):
            return lambda tensor: tensor.strides.__setitem__(dim, value)

        self.spoiled("NULL_POINTER", "`q.data`", q=change(data=None))
        self.spoiled("NULL_POINTER", "`k.data`", k=change(data=8))
        self.spoiled("MISALIGNED", "`v.data`", v=lambda tensor: setattr(tensor, "data", tensor.data + 1))
        self.spoiled("BUFFER_TOO_SMALL", "`out`", out=change(bytes=0))
        self.spoiled("BUFFER_TOO_SMALL", "`q`", q=lambda tensor: setattr(tensor, "bytes", tensor.bytes // 2))
        self.spoiled("BUFFER_TOO_SMALL", "`k`", k=stride(0, 1 << 30))
        self.spoiled("BAD_VALUE", "`k.strides`", k=stride(1, -8))
        self.spoiled("RANK", "`q.rank`", q=change(rank=9))
        self.spoiled("BAD_VALUE", "`q.dtype`", q=change(dtype=0))
        # The driver does not know host memory; other devices refuse CUDA memory.
        self.spoiled("BAD_HANDLE" if device_name == "cuda" else "DEVICE_MISMATCH", "`v", v=change(memory=vf.CUDA))
        self.spoiled("SELF_OVERLAP", "`out`", out=stride(1, 0))
        self.spoiled("INNER_STRIDE", "`q`", q=lambda tensor: tensor.strides.__setitem__(slice(2, 4), [0, 2]))

    def test_overlap(self):
        stage = Stage()
        stage.out = stage.qkv.tensor([BATCH, SEQ, HEADS, DIM], stage.strides)
        before = stage.qkv.values()
        self.refused("OVERLAP", "`out` may share memory with `q`", stage.run)
        self.assertEqual(stage.qkv.values(), before)

    def test_handles_after_free(self):
        stage, meta = Stage(), library.meta_from_lengths(LENGTHS, SEQ)
        mask = vf.varlen(meta)
        stage.run(mask)
        meta.free()
        self.refused("BAD_HANDLE", "freed", lambda: stage.run(mask))
        self.refused("BAD_HANDLE", "freed", meta.free)
        self.refused("BAD_HANDLE", "freed", meta.info)
        another = library.open("cpu")
        another.free()
        self.refused("BAD_HANDLE", "freed", another.info)
        made_up = ctypes.c_void_p(0x7FFF00001230)
        self.refused("BAD_HANDLE", "never issued", lambda: library.call("meta_free", made_up))
        self.refused("BAD_HANDLE", "got a device handle", lambda: library.call("meta_free", device.handle))

    def test_score_modifiers(self):
        stage, lib = Stage(), library
        for argument, given in [
            ("softcap", {"softcap": -1.0}),
            ("softcap", {"softcap": math.nan}),
            ("alibi", {"alibi": [0.5] * (HEADS + 1)}),
            ("sinks", {"sinks": [math.inf] * HEADS}),
        ]:
            mask = vf.none(modifiers=lib.score_modifiers(**given))
            self.refused("SCORE_MODIFIER", f"`{argument}`", lambda: stage.run(mask))  # noqa: B023
        with self.assertRaises(ValueError):
            lib.score_modifiers(alibi=[1.0], sinks=[1.0, 2.0])
        modifiers = lib.score_modifiers(2.0)
        in_options = lambda: stage.run(options=lib.options(modifiers=modifiers))
        self.refused("BAD_VALUE", "`options.modifiers`", in_options)
        mask = vf.none(modifiers=modifiers)
        modifiers.free()
        self.refused("BAD_HANDLE", "`mask.modifiers`", lambda: stage.run(mask))

    def test_ranges(self):
        stage, of, lib = Stage(), (BATCH, SEQ, SEQ), library
        causal, cu = lib.key_ranges_causal(of), lib.cu_seqlens([0, 5, 14])
        self.refused("BAD_VALUE", "`left`", lambda: lib.key_ranges_window(of, -2, 0))
        self.refused("BAD_VALUE", "`right`", lambda: lib.key_ranges_window(of, 0, -9))
        self.refused("TOO_LARGE", "queries of the ranges", lambda: lib.key_ranges_prefix((1, 1 << 31, 1), 2))
        self.refused("LENGTH", "`values`: expected 18", lambda: lib.key_ranges_from_values(of, [(0, 1)] * 17))
        self.refused("MASK_ROW", "row 1", lambda: lib.key_ranges_from_values(of, [(0, 9)] * 17 + [(0, 10)]))
        self.refused("MASK_SIZE", "`other`", lambda: causal.intersect(lib.key_ranges_causal((BATCH, SEQ, 8))))
        packed = lib.key_ranges_causal((cu, cu))
        self.refused("MASK_SIZE", "`other`", lambda: causal.intersect(packed))
        other = lib.key_ranges_causal((BATCH, SEQ, SEQ + 1))
        for ranges in [packed, other]:
            self.refused("MASK_SIZE", "`ranges`", lambda: stage.run(vf.none(ranges)))  # noqa: B023
        in_options = lambda: stage.run(options=lib.options(ranges=causal))
        self.refused("BAD_VALUE", "`options.ranges`", in_options)
        self.refused("MASK_ROW", "row 1", lambda: lib.meta_from_document_ids([[1, 1, 2], [2, 1, 2]]))
        with self.assertRaises(ValueError):
            lib.meta_from_document_ids([[1, 1], [1]])
        documents, plain = lib.meta_from_document_ids([[1] * SEQ] * BATCH), lib.meta_from_lengths(LENGTHS, SEQ)
        self.refused("NOT_APPLICABLE", "documents", lambda: stage.run(vf.varlen(documents, plain)))
        mask = vf.none(causal)
        causal.free()
        self.refused("BAD_HANDLE", "`mask.ranges`", lambda: stage.run(mask))
        self.refused("BAD_HANDLE", "`one`", lambda: causal.intersect(causal))
        self.assertTrue(all(math.isnan(value) for value in stage.out_memory.values()))

    def test_warm_up(self):
        q = [BATCH, SEQ, HEADS, DIM]
        self.refused("BAD_VALUE", "`dtype`", lambda: device.warm_up(99, q, q))
        self.refused("HEADS_NOT_DIVISIBLE", "", lambda: device.warm_up(DTYPE, q, [BATCH, SEQ, HEADS - 1, DIM]))
        null = lambda: library.call("warm_up", device.handle, None, DTYPE, None, None, None, None)
        self.refused("NULL_POINTER", "`q_shape`", null)

    def test_pipeline_cache(self):
        # A device of its own: other tests share the one above.
        with library.open(device_name) as own:
            self.refused("NOT_APPLICABLE", "`device`", own.pipeline_cache)
            if device_name != "wgpu":
                self.refused("NOT_APPLICABLE", "`device`", own.load_pipeline_cache)
                return
            try:
                own.load_pipeline_cache()
            except vf.Error as error:  # the adapter may have no caches
                self.assertEqual(error.status, "NOT_APPLICABLE")
                self.skipTest(str(error))
            q = [BATCH, SEQ, HEADS, DIM]
            own.warm_up(DTYPE, q, q)
            data = own.pipeline_cache()
            self.assertGreater(len(data), 0)
            count = ctypes.c_uint64()
            short = ctypes.create_string_buffer(len(data))
            self.refused(
                "LENGTH",
                "`capacity`",
                lambda: library.call("pipeline_cache_copy", own.handle, short, len(data) - 1, ctypes.byref(count)),
            )
            self.assertEqual((count.value, short.raw), (len(data), bytes(len(data))))
        with library.open(device_name) as later:
            later.load_pipeline_cache(data)
            stage = Stage(on=later)
            self.assertTrue(all(math.isfinite(value) for value in stage.run()))
            self.assertGreater(len(later.pipeline_cache()), 0)

    def test_devices(self):
        self.refused("BAD_VALUE", "`kind`", lambda: library.open(17))
        self.refused("DEVICE_UNAVAILABLE", "cuda:999", lambda: library.open("cuda", 999))


class Names(unittest.TestCase):
    def test_names_come_from_the_library(self):
        self.assertEqual(library.dtypes, {"f32": vf.F32, "f16": vf.F16, "bf16": vf.BF16})
        self.assertEqual(set(library.dtypes.values()), set(vf.ELEMENT_BYTES))
        self.assertEqual(list(library.device_kinds), ["auto", "cpu", "wgpu", "cuda"])
        self.assertEqual(list(library.paths), ["auto", "dense", "fused", "packed", "zero"])
        self.assertEqual((library.statuses["OK"], library.statuses["PANIC"]), (0, 200))
        self.assertEqual(library.reasons["fragmented"], 13)
        self.assertNotIn(8, library.reasons.values())  # reserved
        # The kernels of a device have names, and a plan gives the number of the kernel that it
        # names.
        kernels = [name for name, number in library.kernels.items() if device.info().kernels >> number & 1]
        self.assertTrue(kernels)
        self.assertEqual(len(kernels), bin(device.info().kernels).count("1"))
        for kernel in kernels:
            stage, plan = Stage(DTYPE), vf.Plan()
            try:
                stage.run(options=library.options(kernel=kernel), plan=plan)
            except vf.Error as error:  # a kernel may not have the element type
                self.assertEqual(error.status, "NOT_APPLICABLE")
                continue
            self.assertEqual(plan.kernel, library.kernels[kernel])
            self.assertIn(f"by {kernel}: ", str(plan))

    def test_unknown_names(self):
        for options in [{"path": "sideways"}, {"kernel": "sm81"}]:
            with self.assertRaises(ValueError) as caught:
                library.options(**options)
            self.assertIn(repr(*options.values()), str(caught.exception))
        with self.assertRaises(ValueError):
            library.open("tpu")


class Structs(unittest.TestCase):
    @unittest.skipIf(ctypes.sizeof(ctypes.c_void_p) != 8, "the sizes are those of 64-bit systems")
    def test_sizes_are_those_of_the_header(self):
        structs = [vf.Tensor, vf.MaskView, vf.AttentionMask, vf.Plan, vf.Options, vf.Run, vf.DeviceInfo, vf.MetaInfo]
        structs += [vf.KeyRange, vf.RangesOf, vf.Shards, vf.ParallelOptions, vf.ParallelPlan, vf.ParallelScores]
        sizes = [112, 72, 88, 272, 48, 24, 440, 64, 16, 72, 64, 80, 528, 48]
        self.assertEqual([ctypes.sizeof(struct) for struct in structs], sizes)


class Parallel(unittest.TestCase):
    """A sequence that is divided between two threads."""

    HEADS, DIM, LENGTHS = 4, 8, [3, 5]

    def setUp(self):
        self.seq = 2 + sum(self.LENGTHS)
        self.values = [math.sin(at) for at in range(self.seq * self.HEADS * self.DIM)]
        self.mask = library.key_mask_from_runs([(0, 0, 1), (0, 2, self.seq - 1)], 1, self.seq)

    def rank(self, communicator, rank, outputs, lengths, **settings):
        row = self.HEADS * self.DIM
        start = 2 + sum(self.LENGTHS[:rank])
        tokens = [0, 1, *range(start, start + self.LENGTHS[rank])]
        values = [value for token in tokens for value in self.values[token * row :][:row]]
        shape = [1, len(tokens), self.HEADS, self.DIM]
        x, out = Memory(DTYPE, values), Memory(DTYPE, [0.0] * len(values))
        try:
            meta = library.sharded_meta(self.mask, lengths, rank, prefix=2)
            request = device.parallel_prepare(
                communicator, meta, DTYPE, self.HEADS, self.HEADS, self.DIM, **settings
            )
            request.forward(communicator, x.tensor(shape), x.tensor(shape), x.tensor(shape), out.tensor(shape))
            outputs[rank] = (str(request.plan), tokens, out.values())
        except vf.Error as error:
            outputs[rank] = error

    def run_both(self, lengths, **settings):
        outputs = {}
        threads = [
            threading.Thread(target=self.rank, args=(communicator, rank, outputs, lengths[rank]), kwargs=settings)
            for rank, communicator in enumerate(library.communicators(2, 30000))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outputs

    def test_modes(self):
        shape, row = [1, self.seq, self.HEADS, self.DIM], self.HEADS * self.DIM
        x, out = Memory(DTYPE, self.values), Memory(DTYPE, [0.0] * len(self.values))
        device.forward(
            x.tensor(shape), x.tensor(shape), x.tensor(shape), out.tensor(shape), vf.varlen(library.meta(self.mask))
        )
        expected = out.values()
        for mode in ["auto", "gather", "ulysses", "ring"]:
            for plan, tokens, got in self.run_both([self.LENGTHS] * 2, mode=mode).values():
                self.assertTrue(mode == "auto" or plan.startswith(mode), plan)
                for at, token in enumerate(tokens):
                    for one, other in zip(got[at * row :][:row], expected[token * row :][:row]):
                        self.assertAlmostEqual(one, other, delta=2e-2)

    def test_what_calls_carry(self):
        # A bias of the whole sequence, sinks, text and image apart, and the log-sum-exp.
        row, shape = self.HEADS * self.DIM, [1, self.seq, self.HEADS, self.DIM]
        bias = Memory(DTYPE, [math.cos(at) for at in range(self.seq * self.seq)])
        added = bias.tensor([1, 1, self.seq, self.seq])
        modifiers = library.score_modifiers(sinks=[0.5, -1.0, 0.0, 2.0])
        x, out = Memory(DTYPE, self.values), Memory(DTYPE, [0.0] * len(self.values))
        lse = Memory(vf.F32, [0.0] * (self.HEADS * self.seq))
        mask = vf.varlen(library.meta(self.mask), bias=added, modifiers=modifiers)
        tensor = x.tensor(shape)
        device.forward(tensor, tensor, tensor, out.tensor(shape), mask, lse=lse.tensor([1, self.HEADS, self.seq]))
        expected, expected_lse = out.values(), lse.values()
        outputs = {}

        def run(communicator, rank):
            start = 2 + sum(self.LENGTHS[:rank])
            parts = [[0, 1], [*range(start, start + self.LENGTHS[rank])]]
            shapes = [[1, len(tokens), self.HEADS, self.DIM] for tokens in parts]
            inputs = [Memory(DTYPE, [self.values[t * row + i] for t in tokens for i in range(row)]) for tokens in parts]
            outs = [Memory(DTYPE, [0.0] * (len(tokens) * row)) for tokens in parts]
            tokens = sum(parts, [])
            lse = Memory(vf.F32, [0.0] * (self.HEADS * len(tokens)))
            meta = library.sharded_meta(self.mask, self.LENGTHS, rank, prefix=2)
            heads = [self.HEADS, self.HEADS, self.DIM]
            request = device.parallel_prepare(
                communicator, meta, DTYPE, *heads, modifiers=modifiers, bias=True, lse=True
            )
            x = [memory.tensor(shape) for memory, shape in zip(inputs, shapes)]
            out = [memory.tensor(shape) for memory, shape in zip(outs, shapes)]
            lse_tensor = lse.tensor([1, self.HEADS, len(tokens)])
            request.forward(communicator, x, x, x, out, bias=added, modifiers=modifiers, lse=lse_tensor)
            got = [value for memory in outs for value in memory.values()]
            outputs[rank] = (str(request.plan), tokens, got, lse.values())

        threads = [
            threading.Thread(target=run, args=(communicator, rank))
            for rank, communicator in enumerate(library.communicators(2, 30000))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(outputs), [0, 1])
        for plan, tokens, got, got_lse in outputs.values():
            self.assertTrue(plan.startswith("gather"), plan)
            for at, token in enumerate(tokens):
                for one, other in zip(got[at * row :][:row], expected[token * row :][:row]):
                    self.assertAlmostEqual(one, other, delta=2e-2)
                for head in range(self.HEADS):
                    one, other = got_lse[head * len(tokens) + at], expected_lse[head * self.seq + token]
                    self.assertTrue(one == other or abs(one - other) < 2e-2, (one, other))

    def test_ranks_that_differ(self):
        errors = self.run_both([self.LENGTHS, [4, 4]], mode="gather")
        for error in errors.values():
            self.assertIn(error.status, ["RANKS_DIFFER", "RANK_LOST"])
            self.assertIn("shards", str(error))

    def test_refusals(self):
        with self.assertRaises(vf.Error) as caught:
            library.communicators(0)
        self.assertEqual(caught.exception.status, "SHARDING")
        with self.assertRaises(vf.Error) as caught:
            library.connect("file:/no/such/folder/file", 0, 2, 10)
        self.assertEqual(caught.exception.status, "BACKEND")
        with library.open_cpu() as cpu:
            with self.assertRaises(vf.Error) as caught:
                library.peers([cpu, cpu])
            self.assertEqual(caught.exception.status, "DEVICE_MISMATCH")
            with self.assertRaises(vf.Error) as caught:
                library.nccl(cpu, "127.0.0.1:0", 0, 1)
            self.assertIn(caught.exception.status, ["DEVICE_MISMATCH", "DEVICE_UNAVAILABLE"])


def in_child(handle, meta, queue):
    """What a child made by fork gets of a call on its parent's device that is worth threads."""
    try:
        queue.put(("OK", large_call(handle, meta)))
    except vf.Error as error:
        queue.put((error.status, str(error)))


def large_call(on, meta):
    """The bytes of the output of a call of [1, 512, 4, 64]."""
    shape = [1, 512, 4, 64]
    values = [math.sin(at) for at in range(math.prod(shape))]
    x, out = Memory(DTYPE, values), Memory(DTYPE, [0.0] * len(values))
    on.forward(x.tensor(shape), x.tensor(shape), x.tensor(shape), out.tensor(shape), vf.varlen(meta))
    return out.data.tobytes()


@unittest.skipIf("fork" not in multiprocessing.get_all_start_methods(), "processes are not forked here")
class Fork(unittest.TestCase):
    def test_children_of_multiprocessing(self):
        meta = library.meta_from_lengths([400], 512)
        expected = large_call(device, meta)
        fork = multiprocessing.get_context("fork")
        for _ in range(2):
            queue = fork.SimpleQueue()
            child = fork.Process(target=in_child, args=(device, meta, queue))
            child.start()
            if not queue._reader.poll(60):
                child.kill()
                self.fail("the child hangs")
            status, got = queue.get()
            child.join(60)
            self.assertEqual(child.exitcode, 0)
            if device_name == "cpu":
                self.assertEqual((status, got), ("OK", expected))
            else:
                self.assertEqual(status, "DEVICE_LOST", got)
                self.assertIn("forked", got)
        self.assertEqual(large_call(device, meta), expected)

    @unittest.skipIf(device_name != "cpu", "threads are the CPU device's")
    def test_numbers_of_threads(self):
        meta = library.meta_from_lengths([400], 512)
        expected = large_call(device, meta)
        for threads in [1, 2, 3]:
            on = library.open_cpu(threads)
            self.assertTrue(on.info().adapter.decode().startswith(f"{threads} threads"))
            self.assertEqual(large_call(on, meta), expected)


class Threads(unittest.TestCase):
    def test_calls_at_once_and_a_handle_freed_under_them(self):
        meta = library.meta_from_lengths(LENGTHS, SEQ)
        expected = Stage().run(vf.varlen(meta))
        start, wrong = threading.Barrier(3), []

        def work():
            stage, kept = Stage(), vf.varlen(library.meta_from_lengths(LENGTHS, SEQ))
            shared = vf.varlen(meta)
            start.wait()
            for _ in range(20):
                if stage.run(kept) != expected:
                    wrong.append("another result")
                try:
                    if stage.run(shared) != expected:
                        wrong.append("another result with the shared handle")
                except vf.Error as error:
                    if error.status != "BAD_HANDLE" or "freed" not in str(error):
                        wrong.append(str(error))

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        start.wait()
        meta.free()
        for worker in workers:
            worker.join()
        self.assertEqual(wrong, [])


if __name__ == "__main__":
    print(f"varlen-fa {library.version} on {device.info().name.decode()}")
    unittest.main()
