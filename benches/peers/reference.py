"""Attention in f32, and the tolerance of outputs in 16 bits."""

import torch

# On top of twice the error of a naive computation in the working precision, as flash-attention's
# tests allow.
ATOL = 2e-3


def naive(q, k, v, scale):
    """Attention of [H, n, D] tensors, in their element type."""
    return torch.softmax((q @ k.transpose(-1, -2)) * scale, dim=-1) @ v


class Reference:
    """The right answer for one set of padded inputs, row by packed row."""

    def __init__(self, workload, rows, q, k, v):
        self.rows, self.workload = rows, workload
        scale = workload.head_dim**-0.5
        exact, rough = [], []
        ends = rows.cu_seqlens.tolist()
        for start, end in zip(ends, ends[1:]):
            at = rows.indices[start:end]
            taken = [tensor.flatten(0, 1)[at].transpose(0, 1) for tensor in (q, k, v)]
            exact.append(naive(*(tensor.float() for tensor in taken), scale).transpose(0, 1))
            rough.append(naive(*taken, scale).transpose(0, 1))
        self.packed = torch.cat(exact)
        self.allowed = 2 * (torch.cat(rough).float() - self.packed).abs().max().item() + ATOL

    def check(self, out, kind):
        """`ok` or `WRONG`, and the error. `kind` tells whether the output is packed or padded, and
        whether its masked rows must be zero."""
        got = out if kind == "packed" else out.flatten(0, 1)[self.rows.indices]
        error = (got.float() - self.packed).abs().max().item()
        # Not `error > allowed`: NaN is wrong.
        good = error <= self.allowed
        if kind == "padded, zeros":
            masked = out.flatten(0, 1)[self.rows.inv_indices < 0]
            good = good and not masked.count_nonzero().item()
        return f"{'ok' if good else 'WRONG'} ({error:.1e} of {self.allowed:.1e})"
