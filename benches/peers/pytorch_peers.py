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
def _gather_rows(q, k, v, packed_q, packed_k, packed_v, indices, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    source = tl.load(indices + row).to(tl.int64) * width + column
    target = row.to(tl.int64) * width + column
    tl.store(packed_q + target, tl.load(q + source, mask=inside), mask=inside)
    tl.store(packed_k + target, tl.load(k + source, mask=inside), mask=inside)
    tl.store(packed_v + target, tl.load(v + source, mask=inside), mask=inside)


@triton.jit
def _scatter_rows(packed, padded, inv_indices, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    source = tl.load(inv_indices + row).to(tl.int64)
    values = tl.load(packed + tl.maximum(source, 0) * width + column, mask=inside & (source >= 0), other=0.0)
    tl.store(padded + row.to(tl.int64) * width + column, values, mask=inside)


class PackedRows:
    """The metadata of a mask, and the two copies that use it."""

    def __init__(self, workload):
        valid = workload.valid.cuda()
        self.workload = workload
        self.indices = valid.flatten().nonzero().flatten()
        self.inv_indices = torch.full((valid.numel(),), -1, dtype=torch.int64, device="cuda")
        self.inv_indices[self.indices] = torch.arange(self.indices.numel(), device="cuda")
        self.cu_seqlens = torch.zeros(workload.batch + 1, dtype=torch.int32, device="cuda")
        self.cu_seqlens[1:] = valid.sum(1).cumsum(0)
        self.max_seqlen = int(workload.lengths.max())
        self.width = workload.heads * workload.head_dim

    def pack(self, q, k, v):
        shape = (self.indices.numel(), *q.shape[2:])
        packed = [torch.empty(shape, dtype=q.dtype, device="cuda") for _ in range(3)]
        block = triton.next_power_of_2(self.width)
        _gather_rows[(shape[0],)](q, k, v, *packed, self.indices, self.width, BLOCK=block)
        return packed

    def scatter(self, packed):
        padded = torch.empty(self.workload.shape, dtype=packed.dtype, device="cuda")
        block = triton.next_power_of_2(self.width)
        _scatter_rows[(self.inv_indices.numel(),)](packed, padded, self.inv_indices, self.width, BLOCK=block)
        return padded

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
