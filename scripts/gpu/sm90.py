"""Tests and times the kernels of kernels/attention_sm90.cu through the driver API, without the crate, on a Hopper GPU.

  sm90.py test  CUBIN [HEAD_DIM...]        every form against f64, each head dimension in its own process
  sm90.py bench CUBIN[,CUBIN...] [NAME...] workloads, the kernels and the peers side by side: ms of GPU time (TFLOP/s of valid pairs)

CUBIN is NAME.cubin, beside it NAME.tiles with its tile table (tile_shape_sm90.cuh will do). NAME.cubin@2 prefers the kernels of two
warpgroups where a head dimension has several; the first in the table is the default. A cubin for tests is best compiled with
-DVARLEN_FA_SPIN_LIMIT=200000, so that an error in the barriers cannot hang the device. Compile with

  nvcc -O3 -std=c++17 -cubin -gencode arch=compute_90a,code=sm_90a -o NAME.cubin kernels/attention_sm90.cu

Needs PyTorch 2.11 or newer, for FA3 the package fa3-fwd. Variables: PEERS (of fa3, fa2, cudnn; fa3 alone by default), DTYPE (bf16, f16),
SECONDS_MAX.
"""
import ctypes, json, math, os, re, statistics, struct, sys, time
import numpy as np
import torch

LOG2E = math.log2(math.e)
GROUP, ZERO_ROWS = 16, 64
cuda = ctypes.CDLL("libcuda.so.1")


def check(code, what):
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{what}: {code} {text.value}")


class Kernels:
    """The kernels of a cubin, and their tiles."""

    def __init__(self, path):
        path, _, prefer = path.partition("@")
        torch.cuda.current_stream()
        torch.zeros(1, device="cuda")
        self.name = os.path.basename(path)[:-6] + ("@" + prefer if prefer else "")
        self.module = ctypes.c_void_p()
        check(cuda.cuModuleLoadData(ctypes.byref(self.module), open(path, "rb").read()), "load " + path)
        self.tiles = {}
        for d, warpgroups, n, alias in re.findall(r"X\((\d+),\s*(\d+),\s*(\d+),\s*(true|false)", open(path[:-6] + ".tiles").read()):
            if int(d) not in self.tiles or warpgroups == prefer:
                self.tiles[int(d)] = (int(warpgroups), int(n), alias == "true")
        self.functions = {}
        self.blocks = torch.cuda.get_device_properties(0).multi_processor_count

    def tile(self, d):
        compiled = min(c for c in self.tiles if c >= d)
        warpgroups, n, alias = self.tiles[compiled]
        return compiled, warpgroups * 64, n, alias

    def function(self, dtype, d):
        compiled, m, n, alias = self.tile(d)
        key = (dtype, compiled)
        if key not in self.functions:
            name = f"attention_sm90_{'f16' if dtype == torch.float16 else 'bf16'}_d{compiled}_w{m // 64}"
            f = ctypes.c_void_p()
            check(cuda.cuModuleGetFunction(ctypes.byref(f), self.module, name.encode()), name)
            size = compiled * 2 * (m * (1 if alias else 2) + 4 * n) + 1024
            check(cuda.cuFuncSetAttribute(f, 8, size), "shared memory")
            self.functions[key] = (f, 2 * m + 128, size)
        return self.functions[key]


def tensor_map(t, compiled, head_dim, rows):
    """[B, S, H, D] or [T, H, D] -> map over (d, token, head, batch)."""
    if t.dim() == 3: t = t[None]
    b, s, h, d = t.shape
    panel = 64 if compiled % 64 == 0 else 32
    raw = (ctypes.c_char * 192)()
    address = (ctypes.addressof(raw) + 63) // 64 * 64
    dims = (ctypes.c_uint64 * 4)(head_dim, max(s, 1), h, b)
    strides = (ctypes.c_uint64 * 3)(*[x * 2 for x in (t.stride(1), t.stride(2), t.stride(0))])
    box = (ctypes.c_uint32 * 4)(panel, rows, 1, 1)
    ones = (ctypes.c_uint32 * 4)(1, 1, 1, 1)
    check(cuda.cuTensorMapEncodeTiled(ctypes.c_void_p(address), 6 if t.dtype == torch.float16 else 9, 4, ctypes.c_void_p(t.data_ptr()), dims,
                                      strides, box, ones, 0, 3 if panel == 64 else 2, 2, 0), "tensor map")
    return ctypes.string_at(address, 128)


def words_of(mask):
    b, s = mask.shape
    words = (s + 31) // 32
    bits = np.zeros((b, words * 32), np.uint8)
    bits[:, :s] = mask
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint32).copy()


class Lists:
    """The fused form's metadata, by the algorithm of params_sm90.cuh."""

    def __init__(self, key_mask, query_mask, m, n):
        key_mask, query_mask = key_mask.cpu().numpy().astype(bool), query_mask.cpu().numpy().astype(bool)
        b, sk = key_mask.shape
        sq = query_mask.shape[1]
        batches, query_groups, key_tiles, key_groups, spans = [], [], [], [], []
        for row in range(b):
            kept = np.append(key_mask[row], False)
            ends = np.where(~kept, np.arange(sk + 1), sk)
            ends = np.minimum.accumulate(ends[::-1])[::-1]  # the first dropped key from here on
            nexts = np.minimum.accumulate(np.where(kept, np.arange(sk + 1), sk)[::-1])[::-1]
            first_key_tile, groups, p = len(key_tiles), [], int(nexts[0])

            def close():
                key_tiles.append(~(len(key_groups) // (n // GROUP)))
                key_groups.extend(groups + [sk] * (n // GROUP - len(groups)))
                groups.clear()

            while p < sk:
                if ends[p] - p >= n:
                    key_tiles.append(p)
                    p += n
                else:
                    groups.append(p)
                    p += GROUP
                    if len(groups) == n // GROUP: close()
                p = int(nexts[min(p, sk)])
            if groups: close()
            kept = np.append(query_mask[row], False)
            nexts = np.minimum.accumulate(np.where(kept, np.arange(sq + 1), sq)[::-1])[::-1]
            first_query_tile, groups, p, done = len(query_groups) // (m // GROUP), [], int(nexts[0]), 0

            def zeros(a, z):
                for s in range(a, z, ZERO_ROWS): spans.append((row, s, min(z - s, ZERO_ROWS), 0))

            while p < sq:
                zeros(done, p)
                groups.append(p)
                done = min(p + GROUP, sq)
                p = int(nexts[done])
            zeros(done, sq)
            groups += [sq] * (-len(groups) % (m // GROUP))
            query_groups.extend(groups)
            if groups: batches.append((row, len(groups) // (m // GROUP), first_query_tile, len(key_tiles) - first_key_tile, first_key_tile, 0))
        batches.sort(key=lambda t: -(t[1] and t[3]) * 100000 - t[1])
        up = lambda a: torch.from_numpy(np.array(a if len(a) else [0], np.int32).reshape(-1)).cuda()
        self.batches, self.query_groups, self.key_tiles, self.key_groups, self.spans = map(up, (batches, query_groups, key_tiles, key_groups, spans))
        self.key_bits = torch.from_numpy(words_of(key_mask).view(np.int32)).cuda()
        self.row_bits = torch.from_numpy(words_of(query_mask).view(np.int32)).cuda()
        self.groups, self.zero_spans, self.q_tiles = len(batches), len(spans), sum(t[1] for t in batches)
        self.work = sum(t[1] * t[3] for t in batches)


class Call:
    """A prepared launch. q, k, v, out: [B, S, H, D], or [T, H, D] with cu_seqlens."""

    def __init__(self, kernels, q, k, v, out, scale=None, lse=None, cu=None, order=None, lists=None, blocks=None):
        d = q.shape[-1]
        compiled, m, n, _ = kernels.tile(d)
        self.function, self.threads, self.shared = kernels.function(q.dtype, d)
        scale = d**-0.5 if scale is None else scale
        packed = cu is not None
        maps = [tensor_map(q, compiled, d, GROUP), tensor_map(k, compiled, d, n), tensor_map(v, compiled, d, n), tensor_map(k, compiled, d, GROUP),
                tensor_map(v, compiled, d, GROUP), tensor_map(out, compiled, d, GROUP)]
        ptr = lambda t: t.data_ptr() if t is not None else 0
        form = 2 if lists else 1 if packed else 0
        h, hkv = q.shape[-2], k.shape[-2]
        sq, sk = (0, 0) if packed else (q.shape[1], k.shape[1])
        groups = lists.groups if lists else len(cu[0]) - 1 if packed else q.shape[0]
        at = [ptr(out), ptr(lse), *(map(ptr, cu) if packed else (0, 0)), ptr(order)]
        at += [ptr(x) for x in (lists.key_bits, lists.row_bits, lists.batches, lists.query_groups, lists.key_tiles, lists.key_groups, lists.spans)] if lists else [0] * 7
        strides = [0 if packed else out.stride(0), out.stride(-3), out.stride(-2), lse.stride(0) if lse is not None else 0]
        ints = [form, groups, h, h // hkv, sq, sk, d, lists.key_bits.shape[1] if lists else 0, lists.row_bits.shape[1] if lists else 0, lists.zero_spans if lists else 0]
        data = b"".join(maps) + struct.pack("<12Q4q10if4x", *at, *strides, *ints, scale * LOG2E)
        data += bytes(960 - len(data))
        raw = ctypes.create_string_buffer(960 + 64)
        address = (ctypes.addressof(raw) + 63) // 64 * 64
        ctypes.memmove(address, data, 960)
        self.keep = (raw, q, k, v, out, lse, cu, order, lists)
        self.args = (ctypes.c_void_p * 1)(address)
        if lists: items = (lists.q_tiles + lists.zero_spans) * h
        elif packed: items = 1 << 30
        else: items = -(-sq // m) * h * q.shape[0]
        self.blocks = max(1, min(blocks or kernels.blocks, items))

    def __call__(self):
        check(cuda.cuLaunchKernel(self.function, self.blocks, 1, 1, self.threads, 1, 1, self.shared, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
                                  self.args, None), "launch")


# ---------------------------------------------------------------------------------------------------------------- tests

def reference(q, k, v, scale, key_mask=None):
    """[S, H, D] of one batch row in f32 -> out, lse."""
    q, k, v = (x.float().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    if key_mask is not None:
        k, v = (torch.where(key_mask[None, :, None], x, torch.zeros_like(x)) for x in (k, v))
    s = q.double() @ k.double().transpose(1, 2) * scale
    if key_mask is not None: s = s.masked_fill(~key_mask, -math.inf)
    lse = torch.logsumexp(s, -1) if s.shape[-1] else torch.full(s.shape[:2], -math.inf, device=s.device)
    p = torch.where(torch.isinf(lse)[..., None], torch.zeros_like(s), torch.exp(s - lse[..., None]))
    return (p @ v.double()).transpose(0, 1), lse


class Suite:
    def __init__(self, kernels, d):
        self.kernels, self.d, self.failures, self.count = kernels, d, 0, 0

    def compare(self, name, out, ref, lse=None, ref_lse=None, dtype=torch.bfloat16):
        out, ref = out.double(), ref.double()
        bound = 8e-3 if dtype == torch.bfloat16 else 1.2e-3
        bad = []
        if not torch.isfinite(out).all(): bad.append(f"{(~torch.isfinite(out)).sum().item()} not finite")
        error = ((out - ref).norm() / ref.norm().clamp_min(1e-20)).item() if ref.numel() else 0.0
        if not error < bound: bad.append(f"error {error:.2e}")
        # An element is off by rounding of P and of the result.
        worst = ((out - ref).abs() - (3 * bound) * ref.abs()).max().item() if ref.numel() else 0.0
        if not worst < 4 * bound * max(1.0, ref.abs().mean().item() if ref.numel() else 1): bad.append(f"worst {worst:.2e}")
        if not (out[(ref == 0)] == 0).all(): bad.append("zeros")
        if lse is not None:
            same = torch.isinf(ref_lse) & (lse.double() == ref_lse)
            off = torch.where(same, torch.zeros_like(ref_lse), (lse.double() - ref_lse).abs() / (1 + ref_lse.abs()))
            if not (off < 1e-4).all(): bad.append(f"lse {off.max().item():.2e}")
        self.report(name, bad)

    def report(self, name, bad):
        self.count += 1
        if bad:
            self.failures += 1
            if self.failures < 12: print(f"  d{self.d} {self.kernels.name} FAIL {name}: {', '.join(bad)}", flush=True)

    def launch(self, call, out, name, repeats=3):
        results = []
        for _ in range(repeats):
            out.fill_(math.nan)
            call()
            torch.cuda.synchronize()
            results.append(out.clone())
        if not all(torch.equal(results[0].view(torch.int16), r.view(torch.int16)) for r in results): self.report(name + " repeats", ["bits differ"])
        return results[0]

    def dense(self, b, sq, sk, h, hkv, dtype=torch.bfloat16, scale=None, magnitude=1.0, layout="bshd", d=None, whole_numbers=False):
        d = d or self.d
        name = f"dense B{b} {sq}x{sk} {h}/{hkv} d{d} {str(dtype)[6:]} scale {scale} x{magnitude} {layout}"
        if layout == "bshd":
            q, k, v = (torch.randn(b, s, n, d, device="cuda", dtype=dtype) for s, n in ((sq, h), (sk, hkv), (sk, hkv)))
        elif layout == "bhsd":
            q, k, v = (torch.randn(b, n, s, d, device="cuda", dtype=dtype).transpose(1, 2) for s, n in ((sq, h), (sk, hkv), (sk, hkv)))
        else:  # views of one projection
            q, k, v = torch.randn(b, sq, 3, h, d, device="cuda", dtype=dtype).unbind(2)
        q = q * magnitude if magnitude != 1 else q
        # Scores without rounding, so that those of any size can be compared.
        if whole_numbers: q, k = q.round(), k.round()
        whole = torch.empty(b, sq + 3, h + 1, d, device="cuda", dtype=dtype)
        out = whole[:, :sq, :h]
        lse = torch.full((h, b * sq), math.nan, device="cuda")
        call = Call(self.kernels, q, k, v, out, scale, lse)
        got = self.launch(call, whole, name)
        if not torch.isnan(got[:, sq:]).all() or not torch.isnan(got[:, :, h:]).all(): self.report(name, ["wrote outside"])
        s = d**-0.5 if scale is None else scale
        refs = [reference(q[i], k[i], v[i], s) for i in range(b)]
        self.compare(name, got[:, :sq, :h], torch.stack([r[0] for r in refs]), lse, torch.cat([r[1] for r in refs], 1), dtype)

    def packed(self, lens_q, lens_k, h, hkv, dtype=torch.bfloat16, poison=None, order=False):
        d = self.d
        name = f"packed {lens_q} {lens_k} {h}/{hkv} {str(dtype)[6:]} poison {poison}"
        tq, tk = sum(lens_q), sum(lens_k)
        q = torch.randn(tq, h, d, device="cuda", dtype=dtype)
        k, v = (torch.randn(tk + 200, hkv, d, device="cuda", dtype=dtype) for _ in range(2))
        k[tk:] = math.nan
        v[tk:] = math.inf
        cq, ck = ([0] + list(np.cumsum(x)) for x in (lens_q, lens_k))
        if poison is not None:
            k[ck[poison]:ck[poison + 1]] = math.nan
            v[ck[poison]:ck[poison + 1]] = math.nan
            q[cq[poison]:cq[poison + 1]] = math.inf
        whole = torch.empty(tq + 40, h, d, device="cuda", dtype=dtype)
        lse = torch.full((h, tq), math.nan, device="cuda")
        cu = tuple(torch.tensor(x, device="cuda", dtype=torch.int32) for x in (cq, ck))
        by = torch.tensor(np.argsort([-a * b for a, b in zip(lens_q, lens_k)]), device="cuda", dtype=torch.int32) if order else None
        got = self.launch(Call(self.kernels, q, k[:tk], v[:tk], whole[:tq], None, lse, cu, by), whole, name)
        bad = [] if torch.isnan(got[tq:]).all() else ["wrote past the end"]
        self.report(name, bad)
        for i in range(len(lens_q)):
            if i == poison or not lens_q[i]: continue
            ref, ref_lse = reference(q[cq[i]:cq[i + 1]], k[ck[i]:ck[i + 1]], v[ck[i]:ck[i + 1]], d**-0.5)
            self.compare(f"{name} sequence {i}", got[cq[i]:cq[i + 1]], ref, lse[:, cq[i]:cq[i + 1]], ref_lse, dtype)

    def fused(self, what, key_mask, query_mask=None, h=2, hkv=1, dtype=torch.bfloat16, scale=None):
        d = self.d
        name = f"fused {what} {str(dtype)[6:]}"
        key_mask = key_mask.cuda()
        query_mask = key_mask if query_mask is None else query_mask.cuda()
        b, sk = key_mask.shape
        sq = query_mask.shape[1]
        q = torch.randn(b, sq, h, d, device="cuda", dtype=dtype)
        k, v = (torch.randn(b, sk, hkv, d, device="cuda", dtype=dtype) for _ in range(2))
        q[~query_mask] = math.nan
        k[~key_mask] = math.nan
        v[~key_mask] = -math.inf
        v[:, 1::3][~key_mask[:, 1::3]] = math.nan
        whole = torch.empty(b, sq + 5, h, d, device="cuda", dtype=dtype)
        lse = torch.full((h, b * sq), math.nan, device="cuda")
        _, m, n, _ = self.kernels.tile(d)
        lists = Lists(key_mask, query_mask, m, n)
        got = self.launch(Call(self.kernels, q, k, v, whole[:, :sq], scale, lse, lists=lists), whole, name)
        self.report(name, [] if torch.isnan(got[:, sq:]).all() else ["wrote past the end"])
        s = d**-0.5 if scale is None else scale
        for i in range(b):
            ref, ref_lse = reference(torch.where(query_mask[i][:, None, None], q[i], 0), k[i], v[i], s, key_mask[i])
            ref[~query_mask[i]] = 0
            ref_lse[:, ~query_mask[i]] = -math.inf
            self.compare(f"{name} row {i}", got[i, :sq], ref, lse[:, i * sq:(i + 1) * sq], ref_lse, dtype)

    def run(self):
        _, m, n, _ = self.kernels.tile(self.d)
        f16 = torch.float16
        for sq, sk in ((128, n), (1, 1), (m - 1, n - 1), (m + 1, n + 1), (m, n), (15, 2 * n), (17, 2 * n + 1), (300, 3 * n - 1), (777, 1000)):
            self.dense(2, sq, sk, 4, 2)
        self.dense(1, 200, 333, 3, 3, f16)
        self.dense(3, 1111, 1500, 6, 2, f16)
        self.dense(2, 400, 400, 4, 4, layout="qkv")
        self.dense(2, 300, 410, 4, 2, layout="bhsd")
        self.dense(2, 200, 333, 2, 1, scale=-0.1)
        self.dense(2, 200, 333, 2, 1, scale=1e-30)
        self.dense(1, 200, 333, 2, 1, magnitude=3000.0)
        self.dense(1, 200, 333, 2, 1, scale=-300.0)
        self.dense(1, 200, 333, 2, 1, scale=20000.0, whole_numbers=True)
        self.dense(1, 200, 333, 2, 1, scale=-20000.0, whole_numbers=True)
        self.dense(4, 2048, 2048, 8, 8)
        if self.d == 96: self.dense(2, 300, 410, 4, 2, d=72); self.dense(2, 300, 410, 4, 2, d=80)
        if self.d == 192: self.dense(2, 300, 410, 4, 2, d=160)
        self.packed([m, m + 1, 1, 0, m - 1, 300], [n, n + 1, 1, 7, n - 1, 500], 4, 2)
        self.packed([5, 600, 17, 33], [5, 600, 17, 33], 2, 2, f16, poison=1, order=True)
        self.packed([100, 200, 300], [0, 3 * n, 111], 4, 1, poison=2)
        self.packed([3] * 70 + [900], [9] * 70 + [1000], 2, 2, order=True)
        g = torch.Generator().manual_seed(5)
        joint = torch.zeros(4, 1000, dtype=torch.bool)
        for i, valid in enumerate((37, 0, 200, 5)): joint[i, :valid] = True
        joint[:, 256:] = True
        self.fused("joint", joint)
        self.fused("joint", joint, dtype=f16, h=4, hkv=4)
        self.fused("joint negative", joint, scale=-0.2)
        prefix = torch.arange(700)[None] < torch.tensor([700, 1, 350, 0, 512])[:, None]
        self.fused("prefix", prefix)
        for p in (0.02, 0.5, 0.95): self.fused(f"random {p}", torch.rand(3, 1100, generator=g) < p)
        single = torch.zeros(3, 900, dtype=torch.bool)
        single[0, 899] = True; single[1, 450] = True
        self.fused("single", single)
        self.fused("empty", torch.zeros(2, 300, dtype=torch.bool))
        self.fused("full", torch.ones(2, 2 * m + 3, dtype=torch.bool))
        self.fused("cross", torch.rand(4, 77, generator=g) < 0.5, torch.rand(4, 500, generator=g) < 0.7)
        self.fused("cross without keys", prefix[:, :300], torch.rand(5, 333, generator=g) < 0.7)
        for length in (1, 15, 16, 17, n - 1, n, n + 1, m - 1, m + 1): self.fused(f"length {length}", torch.rand(2, length, generator=g) < 0.8)
        print(f"d{self.d} {self.kernels.name}: {self.count} checks, {self.failures} failed", flush=True)
        return self.failures


def forked(work, seconds):
    """Runs `work` in its own process, since an error on the device ends its CUDA context. True if it succeeded in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work() or 0
        except Exception as error:
            print(f"  {type(error).__name__}: {str(error)[:300]}", flush=True)
        finally:
            os._exit(min(code, 100))
    end = time.time() + seconds
    while time.time() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid: return status == 0
        time.sleep(0.05)
    os.kill(child, 9)
    print("  killed: out of time", flush=True)
    return False


def test(path, dims):
    def one(d):
        torch.manual_seed(d)
        return Suite(Kernels(path), d).run()
    results = [forked(lambda: one(d), 60) for d in dims]
    return all(results)


# ---------------------------------------------------------------------------------------------------------------- bench

def joint_mask(b, text, valid, image):
    mask = torch.zeros(b, text + image, dtype=torch.bool)
    for i in range(b): mask[i, :valid[i % len(valid)]] = True
    mask[:, text:] = True
    return mask


def prefix_mask(b, s, low, high):
    n = torch.randint(low, high + 1, (b,), generator=torch.Generator().manual_seed(0))
    return torch.arange(s)[None] < n[:, None]


def random_mask(b, s, p):
    return torch.rand(b, s, generator=torch.Generator().manual_seed(0)) < p


PROMPTS = [12, 37, 80, 211, 256, 5, 150, 64]
# name: heads, kv heads, head_dim, mask; a tuple (B, S) is dense
WORKLOADS = {
    "joint-1024-b1": (24, 24, 128, lambda: joint_mask(1, 512, [37], 4096)),
    "joint-1024-b8": (24, 24, 128, lambda: joint_mask(8, 256, PROMPTS, 4096)),
    "joint-512-b8": (24, 24, 128, lambda: joint_mask(8, 256, PROMPTS, 1024)),
    "prefix-2048-b16": (24, 24, 128, lambda: prefix_mask(16, 2048, 256, 1792)),
    "prefix-512-b64": (12, 12, 64, lambda: prefix_mask(64, 512, 16, 512)),
    "random-.25-4096": (24, 24, 128, lambda: random_mask(2, 4096, 0.25)),
    "random-.5-4096": (24, 24, 128, lambda: random_mask(2, 4096, 0.5)),
    "random-.75-4096": (24, 24, 128, lambda: random_mask(2, 4096, 0.75)),
    "dense-d128-4k": (16, 16, 128, (4, 4096)),
    "dense-d128-16k": (16, 16, 128, (1, 16384)),
    "dense-d64-4k": (32, 32, 64, (4, 4096)),
    "dense-d256-4k": (8, 8, 256, (4, 4096)),
    "dense-d96-4k": (24, 8, 96, (4, 4096)),
    "dense-d192-4k": (12, 12, 192, (4, 4096)),
}


def measure(fn, sets, reps=5):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(2): fn(*sets[i % len(sets)])
    torch.cuda.synchronize()
    n = max(len(sets), 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(n): fn(*sets[i % len(sets)])
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(reps):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record(); graph.replay(); b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) / n)
    del graph
    return statistics.median(times)


def bench(paths, names, dtype=torch.bfloat16, peers=("fa3",)):
    torch.manual_seed(0)
    kernels = [Kernels(p) for p in paths]
    fa3 = fa3v = varlen = None
    if "fa3" in peers:
        from fa3_fwd_interface import flash_attn_varlen_func as fa3v, flash_attn_func as fa3
    if "fa2" in peers:
        from torch.nn.attention.varlen import varlen_attn as varlen
    from torch.nn.functional import scaled_dot_product_attention as sdpa
    from torch.nn.attention import sdpa_kernel, SDPBackend
    for name, (h, hkv, d, mask) in WORKLOADS.items():
        if names and name not in names: continue
        mine = [x for x in kernels if d in x.tiles]
        jobs = {}

        def run(key, fn, sets):
            jobs[key] = (fn, sets)

        dense = isinstance(mask, tuple)
        keep = None if dense else mask().cuda()
        b, s = mask if dense else keep.shape
        count = max(2, min(6, int(4e8 // (b * s * (h + 2 * hkv) * d * 2)) + 1))
        sets = [tuple(torch.randn(b, s, n, d, device="cuda", dtype=dtype) for n in (h, hkv, hkv)) for _ in range(count)]
        outs = [torch.empty_like(x[0]) for x in sets]
        if dense:
            flop = 4.0 * b * s * s * h * d
            for x in mine: run(x.name, lambda c: c(), [(Call(x, *t, o),) for t, o in zip(sets, outs)])
            if fa3: run("FA3", lambda q, k, v: fa3(q, k, v), sets)
            if "cudnn" in peers:
                def cudnn(q, k, v):
                    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION): return sdpa(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=h != hkv)
                run("cuDNN", cudnn, sets)
            if "fa2" in peers:
                def flash(q, k, v):
                    with sdpa_kernel(SDPBackend.FLASH_ATTENTION): return sdpa(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=h != hkv)
                run("FA2", flash, sets)
        else:
            lens = keep.sum(1)
            flop = 4.0 * float((lens.double()**2).sum()) * h * d
            indices = keep.reshape(-1).nonzero().flatten()
            cu = torch.zeros(b + 1, dtype=torch.int32, device="cuda")
            cu[1:] = lens.cumsum(0)
            longest = int(lens.max())
            order = torch.argsort(-lens, stable=True).int()
            packed = [tuple(t.reshape(b * s, t.shape[2], d)[indices] for t in x) for x in sets]
            for x in mine:
                lists = Lists(keep, keep, *x.tile(d)[1:3])
                run(x.name, lambda c: c(), [(Call(x, *t, o, lists=lists),) for t, o in zip(sets, outs)])
                run(x.name + " packed", lambda c: c(), [(Call(x, *t, torch.empty_like(t[0]), cu=(cu, cu), order=order),) for t in packed])
            if fa3v: run("FA3", lambda q, k, v: fa3v(q, k, v, cu, cu, longest, longest), packed)
            if varlen: run("FA2", lambda q, k, v: varlen(q, k, v, cu, cu, longest, longest), packed)
            if "cudnn" in peers:
                am = keep[:, None, None]
                run("SDPA with mask", lambda q, k, v: sdpa(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=am), sets)
        # The better of two medians, from two rounds: the card's clock falls as it warms up.
        times = {}
        for _ in range(2):
            for key, (fn, inputs) in jobs.items():
                try:
                    times[key] = min(times.get(key, math.inf), measure(fn, inputs))
                except Exception as error:
                    print(name, key, type(error).__name__, str(error)[:200], flush=True)
        del jobs
        print(f"{name:16s} " + "  ".join(f"{k} {t:.4f} ({flop / t / 1e9:.0f})" for k, t in times.items()), flush=True)
        del sets, outs
        if not dense: del packed
        torch.cuda.empty_cache()


def main():
    mode, path, rest = sys.argv[1], sys.argv[2], sys.argv[3:]
    if mode == "test":
        sys.exit(0 if test(path, [int(d) for d in rest] or [64, 96, 128, 192, 256]) else 1)
    peers = tuple(os.environ.get("PEERS", "fa3").split(","))
    dtype = torch.float16 if os.environ.get("DTYPE") == "f16" else torch.bfloat16
    ok = forked(lambda: bench(path.split(","), rest, dtype, peers), float(os.environ.get("SECONDS_MAX", "60")))
    sys.exit(0 if ok else 1)


main()
