"""What a PyTorch user would run instead of this library: SDPA with the mask, FlashAttention 2 and 3
on packed rows, and pack → FlashAttention → scatter, the design of sglang PR #26318."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError as error:
    varlen_attn, NO_FA2 = None, str(error)
try:
    from fa3_fwd_interface import flash_attn_func, flash_attn_varlen_func
except ImportError as error:
    flash_attn_varlen_func, NO_FA3 = None, str(error)


@triton.jit
def _gather_rows(a, b, c, packed_a, packed_b, packed_c, indices, width, BLOCK: tl.constexpr, TENSORS: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    source = tl.load(indices + row).to(tl.int64) * width + column
    target = row.to(tl.int64) * width + column
    tl.store(packed_a + target, tl.load(a + source, mask=inside), mask=inside)
    if TENSORS > 1:
        tl.store(packed_b + target, tl.load(b + source, mask=inside), mask=inside)
    if TENSORS > 2:
        tl.store(packed_c + target, tl.load(c + source, mask=inside), mask=inside)


@triton.jit
def _scatter_rows(packed, padded, inv_indices, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    source = tl.load(inv_indices + row).to(tl.int64)
    values = tl.load(packed + tl.maximum(source, 0) * width + column, mask=inside & (source >= 0), other=0.0)
    tl.store(padded + row.to(tl.int64) * width + column, values, mask=inside)


class ValidRows:
    """The metadata of a [batch, seq] mask, and the two copies that use it."""

    def __init__(self, valid):
        valid = valid.cuda()
        lengths = valid.sum(1)
        self.batch, self.seq = valid.shape
        self.indices = valid.flatten().nonzero().flatten()
        self.inv_indices = torch.full((valid.numel(),), -1, dtype=torch.int64, device="cuda")
        self.inv_indices[self.indices] = torch.arange(self.indices.numel(), device="cuda")
        self.cu_seqlens = torch.zeros(self.batch + 1, dtype=torch.int32, device="cuda")
        self.cu_seqlens[1:] = lengths.cumsum(0)
        self.max_seqlen = int(lengths.max())

    def pack(self, *padded):
        """Packs up to three tensors of one shape, in one launch."""
        heads, head_dim = padded[0].shape[2:]
        packed = [torch.empty((self.indices.numel(), heads, head_dim), dtype=x.dtype, device="cuda") for x in padded]
        three = [(tensors * 3)[:3] for tensors in (list(padded), packed)]
        width = heads * head_dim
        block, tensors = triton.next_power_of_2(width), len(padded)
        _gather_rows[(self.indices.numel(),)](*three[0], *three[1], self.indices, width, BLOCK=block, TENSORS=tensors)
        return packed

    def scatter(self, packed):
        heads, head_dim = packed.shape[1:]
        padded = torch.empty((self.batch, self.seq, heads, head_dim), dtype=packed.dtype, device="cuda")
        width = heads * head_dim
        block = triton.next_power_of_2(width)
        _scatter_rows[(self.inv_indices.numel(),)](packed, padded, self.inv_indices, width, BLOCK=block)
        return padded


class PackedRows(ValidRows):
    """The rows of a workload, and FlashAttention on them."""

    def __init__(self, workload):
        super().__init__(workload.valid)

    def fa2(self, q, k, v):
        return varlen_attn(q, k, v, self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen)

    def fa3(self, q, k, v):
        out = flash_attn_varlen_func(q, k, v, self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen)
        return out[0] if isinstance(out, tuple) else out


def sdpa(backend, mask):
    """SDPA on [B, S, H, D] tensors. A backend of None leaves the choice to PyTorch; a mask of None
    means no mask."""

    def call(q, k, v):
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return call


def pack_fa3_scatter(query, key):
    """FlashAttention-3 on the valid rows of padded q, k and v, with its output scattered into zeros.
    A side that is None is valid everywhere, and is neither packed nor scattered; with both, this is
    FlashAttention-3 alone."""

    def rows_of(side, seq, batch):
        if side is not None:
            return side.cu_seqlens, side.max_seqlen
        return torch.arange(0, (batch + 1) * seq, seq, dtype=torch.int32, device="cuda"), seq

    made = {}

    def call(q, k, v):
        if query is None and key is None:
            out = flash_attn_func(q, k, v)
            return out[0] if isinstance(out, tuple) else out
        if not made:
            # Outside of graphs: the first call is not captured.
            made["q"], made["k"] = rows_of(query, q.shape[1], q.shape[0]), rows_of(key, k.shape[1], k.shape[0])
        (cu_q, max_q), (cu_k, max_k) = made["q"], made["k"]
        padded = q.shape
        if query is key and q.shape == k.shape:
            q, k, v = query.pack(q, k, v)
        else:
            q = q.flatten(0, 1) if query is None else query.pack(q)[0]
            k, v = (k.flatten(0, 1), v.flatten(0, 1)) if key is None else key.pack(k, v)
        out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k)
        out = out[0] if isinstance(out, tuple) else out
        return out.view(padded) if query is None else query.scatter(out)

    return call


def missing():
    """Peers that are not installed, and why they cannot be imported."""
    found = {}
    if varlen_attn is None:
        found["fa2"] = NO_FA2
    if flash_attn_varlen_func is None:
        found["fa3"] = NO_FA3
    return found


def padded_peers(workload, rows):
    """Calls on padded (q, k, v) by name, and whether each writes zeros to masked rows."""
    mask = workload.valid.cuda()[:, None, None, :]
    peers = {
        "sdpa, default": (sdpa(None, mask), False),
        "sdpa, cudnn": (sdpa(SDPBackend.CUDNN_ATTENTION, mask), False),
        "sdpa, mem-efficient": (sdpa(SDPBackend.EFFICIENT_ATTENTION, mask), False),
    }
    if varlen_attn is not None:
        peers["pack + fa2 + scatter"] = (lambda q, k, v: rows.scatter(rows.fa2(*rows.pack(q, k, v))), True)
    if flash_attn_varlen_func is not None:
        peers["pack + fa3 + scatter"] = (lambda q, k, v: rows.scatter(rows.fa3(*rows.pack(q, k, v))), True)
    return peers


def packed_peers(rows):
    """Calls on packed (q, k, v) by name."""
    peers = {}
    if varlen_attn is not None:
        peers["fa2"] = rows.fa2
    if flash_attn_varlen_func is not None:
        peers["fa3"] = rows.fa3
    return peers
