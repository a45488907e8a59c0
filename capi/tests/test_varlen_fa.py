"""The C library from Python, through benches/peers/varlen_fa.py: `python3 test_varlen_fa.py cpu` or `wgpu`. Only Python's own library
is used. VARLEN_FA_LIBRARY names the shared library. Exits with 77 if the device is absent."""

import array
import ctypes
import math
import random
import struct
import sys
import threading
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benches" / "peers"))
import varlen_fa as vf  # noqa: E402

NOT_AVAILABLE = 77
BATCH, SEQ, HEADS, KV_HEADS, DIM = 2, 9, 4, 2, 16
LENGTHS = [5, 9]
TOTAL = sum(LENGTHS)

library = vf.Library()
device = None
device_name = sys.argv.pop(1) if len(sys.argv) > 1 else "cpu"


class Memory:
    """Elements of a type in memory of Python's own, as f32 or, through `struct`, f16."""

    def __init__(self, dtype, values):
        self.dtype, self.count = dtype, len(values)
        if dtype == vf.F32:
            self.data = array.array("f", values)
        else:
            self.data = array.array("H", struct.unpack(f"{len(values)}H", struct.pack(f"{len(values)}e", *values)))

    @property
    def address(self):
        return self.data.buffer_info()[0]

    def values(self):
        if self.dtype == vf.F32:
            return list(self.data)
        return list(struct.unpack(f"{self.count}e", self.data.tobytes()))

    def tensor(self, shape, strides=None, offset=0, **others):
        size = (self.count - offset) * vf.ELEMENT_BYTES[self.dtype]
        address = self.address + offset * vf.ELEMENT_BYTES[self.dtype]
        return vf.tensor(address, shape, strides, self.dtype, **{"size": size, **others})


def randoms(dtype, count, seed):
    generator = random.Random(seed)
    return Memory(dtype, [generator.uniform(-1, 1) for _ in range(count)])


def attend(q, k, v, valid, scale):
    """Rows of one head, slowly: q, k, v are lists of rows, `valid` the keys that count."""
    out = []
    for row in q:
        scores = [scale * sum(a * b for a, b in zip(row, k[key])) for key in valid]
        weights = [math.exp(score) for score in scores]
        total = sum(weights)
        out.append([sum(w * v[key][d] for w, key in zip(weights, valid)) / total for d in range(DIM)])
    return out


def rows(values, shape, strides, b, h):
    return [
        [values[b * strides[0] + s * strides[1] + h * strides[2] + d] for d in range(DIM)] for s in range(shape[1])
    ]


def nans(dtype, count):
    return Memory(dtype, [math.nan] * count)


class Stage:
    """q, k and v as parts of one fused projection, and an output."""

    FUSED = HEADS + 2 * KV_HEADS

    def __init__(self, dtype, seed=0):
        self.qkv = randoms(dtype, BATCH * SEQ * self.FUSED * DIM, seed)
        self.out_memory = nans(dtype, BATCH * SEQ * HEADS * DIM)
        self.strides = [SEQ * self.FUSED * DIM, self.FUSED * DIM, DIM, 1]
        part = lambda first, heads: self.qkv.tensor([BATCH, SEQ, heads, DIM], self.strides, first * DIM)
        self.q, self.k = part(0, HEADS), part(HEADS, KV_HEADS)
        self.v = part(HEADS + KV_HEADS, KV_HEADS)
        self.out = self.out_memory.tensor([BATCH, SEQ, HEADS, DIM])

    def run(self, mask=None, **others):
        device.forward(self.q, self.k, self.v, self.out, mask, **others)
        return self.out_memory.values()

    def expected(self, b, h, valid, scale=DIM**-0.5):
        values, shape, kv = self.qkv.values(), [BATCH, SEQ], h // (HEADS // KV_HEADS)
        of = lambda head: rows(values, shape, self.strides, b, head)
        return attend(of(h), of(HEADS + kv), of(HEADS + KV_HEADS + kv), valid, scale)


class Attention(unittest.TestCase):
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
                        for value, wanted in zip(row, expected[s]):
                            self.assertLess(abs(value - wanted), tolerance)

    def test_varlen_is_what_a_loop_gives(self):
        meta = library.meta_from_lengths(LENGTHS, SEQ)
        for dtype, tolerance in [(vf.F32, 1e-5), (vf.F16, 2e-3)]:
            stage, plan = Stage(dtype), vf.Plan()
            self.check(stage, stage.run(vf.varlen(meta), plan=plan), tolerance)
            self.assertRegex(str(plan), "^(fused|packed) by ")
            for path in ["dense", "packed"] + ["fused"] * (device_name == "cpu"):
                plan = vf.Plan()
                self.check(stage, stage.run(vf.varlen(meta), options=vf.options(path=path), plan=plan), tolerance)
                self.assertEqual(plan.path, vf.PATHS[path])

    def test_every_mask_type_says_the_same(self):
        stage = Stage(vf.F32)
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

    def test_key_mask_and_bias(self):
        stage = Stage(vf.F32)
        mask = library.key_mask_from_lengths(LENGTHS, SEQ)
        by_mask = stage.run(vf.key(mask))
        expected = stage.expected(0, 1, range(LENGTHS[0]))
        for s in range(SEQ):  # also of the queries that the mask drops
            start = (s * HEADS + 1) * DIM
            for value, wanted in zip(by_mask[start : start + DIM], expected[s]):
                self.assertLess(abs(value - wanted), 1e-5)
        flat = Memory(vf.F32, [0.0 if s < length else -math.inf for length in LENGTHS for s in range(SEQ)])
        for shape, strides in [([BATCH, 1, 1, SEQ], None), ([BATCH, HEADS, SEQ, SEQ], [SEQ, 0, 0, 1])]:
            by_bias = stage.run(vf.bias(flat.tensor(shape, strides)))
            self.assertLess(max(abs(a - b) for a, b in zip(by_bias, by_mask)), 1e-5)

    def test_scale(self):
        stage = Stage(vf.F32)
        got, expected = stage.run(options=vf.options(softmax_scale=0.7)), stage.expected(1, 3, range(SEQ), 0.7)
        start = ((SEQ + 2) * HEADS + 3) * DIM
        self.assertLess(max(abs(a - b) for a, b in zip(got[start : start + DIM], expected[2])), 1e-5)

    def test_strided_output_leaves_its_gaps(self):
        stage = Stage(vf.F16)
        meta = library.meta_from_lengths(LENGTHS, SEQ)
        expected = stage.run(vf.varlen(meta))
        roomy = Memory(vf.F16, [7.0] * (BATCH * HEADS * SEQ * (DIM + 8)))
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
        for dtype in [vf.F32, vf.F16]:
            stage, meta = Stage(dtype), library.meta_from_lengths(LENGTHS, SEQ)
            expected = stage.run(vf.varlen(meta), options=vf.options(path="packed"))
            packed = [nans(dtype, TOTAL * heads * DIM) for heads in [HEADS, KV_HEADS, KV_HEADS, HEADS]]
            q, k, v, o = (m.tensor([TOTAL, m.count // TOTAL // DIM, DIM]) for m in packed)
            lse = nans(vf.F32, HEADS * TOTAL)
            padded = nans(dtype, BATCH * SEQ * HEADS * DIM)
            cu_seqlens = library.cu_seqlens([0, 5, 14])
            device.pack_qkv(stage.q, stage.k, stage.v, meta, q, k, v)
            device.varlen_attention(q, k, v, cu_seqlens, meta.cu_seqlens(), o, lse=lse.tensor([HEADS, TOTAL]))
            device.scatter_to_padded(o, meta, padded.tensor([BATCH, SEQ, HEADS, DIM]))
            self.assertEqual(padded.values(), expected)
            values = packed[0].values(), packed[1].values()
            for h in range(HEADS):
                row, kv = values[0][h * DIM :][:DIM], h // (HEADS // KV_HEADS)
                keys = [values[1][(key * KV_HEADS + kv) * DIM :][:DIM] for key in range(5)]
                sums = sum(math.exp(sum(a * b for a, b in zip(row, key)) / 4) for key in keys)
                self.assertLess(abs(lse.values()[h * TOTAL] - math.log(sums)), 1e-4)

    def test_device_metadata(self):
        if device_name != "cpu":
            with self.assertRaises(vf.Error) as caught:
                device.device_meta(BATCH, SEQ)
            self.assertEqual(caught.exception.status, "NOT_APPLICABLE")
            return
        stage = Stage(vf.F32)
        expected = stage.run(vf.varlen(library.meta_from_lengths(LENGTHS, SEQ)))
        meta = device.device_meta(BATCH, SEQ)
        turned = array.array("q", [int(s < LENGTHS[b]) << 40 for s in range(SEQ) for b in range(BATCH)])
        meta.rebuild(vf.mask_view(turned.buffer_info()[0], [BATCH, SEQ], [1, BATCH], 8))
        self.assertEqual(stage.run(vf.varlen(meta)), expected)


class Refusals(unittest.TestCase):
    def refused(self, status, words, call):
        with self.assertRaises(vf.Error) as caught:
            call()
        self.assertEqual(caught.exception.status, status, str(caught.exception))
        self.assertIn(words, str(caught.exception))

    def spoiled(self, status, words, **changes):
        """The call with some descriptor changed is refused, and its output is as it was."""
        stage = Stage(vf.F32)
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
        self.spoiled("MISALIGNED", "`v.data`", v=lambda tensor: setattr(tensor, "data", tensor.data + 2))
        self.spoiled("BUFFER_TOO_SMALL", "`out`", out=change(bytes=0))
        self.spoiled("BUFFER_TOO_SMALL", "`q`", q=lambda tensor: setattr(tensor, "bytes", tensor.bytes // 2))
        self.spoiled("BUFFER_TOO_SMALL", "`k`", k=stride(0, 1 << 30))
        self.spoiled("BAD_VALUE", "`k.strides`", k=stride(1, -8))
        self.spoiled("RANK", "`q.rank`", q=change(rank=9))
        self.spoiled("BAD_VALUE", "`q.dtype`", q=change(dtype=0))
        self.spoiled("DEVICE_MISMATCH", "`v`", v=change(memory=vf.CUDA))
        self.spoiled("SELF_OVERLAP", "`out`", out=stride(1, 0))
        self.spoiled("INNER_STRIDE", "`q`", q=lambda tensor: tensor.strides.__setitem__(slice(2, 4), [0, 2]))

    def test_overlap(self):
        stage = Stage(vf.F32)
        stage.out = stage.qkv.tensor([BATCH, SEQ, HEADS, DIM], stage.strides)
        before = stage.qkv.values()
        self.refused("OVERLAP", "`out` overlaps `q`", stage.run)
        self.assertEqual(stage.qkv.values(), before)

    def test_handles_after_free(self):
        stage, meta = Stage(vf.F32), library.meta_from_lengths(LENGTHS, SEQ)
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
        self.refused("BAD_HANDLE", "never gave out", lambda: library.call("meta_free", made_up))
        self.refused("BAD_HANDLE", "got a device handle", lambda: library.call("meta_free", device.handle))

    def test_devices(self):
        self.refused("BAD_VALUE", "`kind`", lambda: library.open(17))
        self.refused("DEVICE_UNAVAILABLE", "cuda:999", lambda: library.open("cuda", 999))


class Structs(unittest.TestCase):
    @unittest.skipIf(ctypes.sizeof(ctypes.c_void_p) != 8, "the numbers are those of 64-bit systems")
    def test_sizes_are_those_of_the_header(self):
        structs = [vf.Tensor, vf.MaskView, vf.AttentionMask, vf.Plan, vf.Options, vf.Run, vf.DeviceInfo, vf.MetaInfo]
        self.assertEqual([ctypes.sizeof(struct) for struct in structs], [112, 72, 88, 272, 48, 24, 440, 64])


class Threads(unittest.TestCase):
    def test_calls_at_once_and_a_handle_freed_under_them(self):
        meta = library.meta_from_lengths(LENGTHS, SEQ)
        expected = Stage(vf.F32).run(vf.varlen(meta))
        start, wrong = threading.Barrier(3), []

        def work():
            stage, kept = Stage(vf.F32), vf.varlen(library.meta_from_lengths(LENGTHS, SEQ))
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
    try:
        device = library.open(device_name)
    except vf.Error as error:
        if error.status != "DEVICE_UNAVAILABLE":
            raise
        print(error, file=sys.stderr)
        sys.exit(NOT_AVAILABLE)
    print(f"varlen-fa {library.version} on {device.info().name.decode()}")
    unittest.main()
