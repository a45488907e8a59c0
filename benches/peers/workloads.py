"""The padded batches of the benches: shapes, and which tokens are valid."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Workload:
    """Tensors are [batch, seq, heads, head_dim]; `valid` is a [batch, seq] mask on the host."""

    name: str
    heads: int
    head_dim: int
    valid: torch.Tensor

    @property
    def batch(self):
        return self.valid.shape[0]

    @property
    def seq(self):
        return self.valid.shape[1]

    @property
    def shape(self):
        return (self.batch, self.seq, self.heads, self.head_dim)

    @property
    def lengths(self):
        return self.valid.sum(1)

    @property
    def total_valid(self):
        return int(self.lengths.sum())

    @property
    def valid_share(self):
        return self.total_valid / (self.batch * self.seq)

    @property
    def flops(self):
        """Operations on the valid pairs of query and key only: two products of two operations
        each."""
        return 4.0 * float((self.lengths.double() ** 2).sum()) * self.heads * self.head_dim

    @property
    def row_bytes(self):
        """Bytes of one token in one tensor of a 16-bit element type."""
        return self.heads * self.head_dim * 2


def joint(text, valid_text, image):
    """Text padded at its end, then image tokens that are all valid, as in joint diffusion
    transformers."""
    valid = torch.zeros(len(valid_text), text + image, dtype=torch.bool)
    for row, length in enumerate(valid_text):
        valid[row, :length] = True
    valid[:, text:] = True
    return valid


def prefix(batch, seq, shortest, longest):
    """Rows of evenly spread lengths, padded at their end; the order of the lengths is drawn with a
    fixed seed."""
    lengths = torch.linspace(shortest, longest, batch).round().long()
    lengths = lengths[torch.randperm(batch, generator=torch.Generator().manual_seed(0))]
    return torch.arange(seq)[None] < lengths[:, None]


def bernoulli(batch, seq, p):
    """Each token valid with probability p, drawn with a fixed seed."""
    return torch.rand(batch, seq, generator=torch.Generator().manual_seed(0)) < p


RAGGED_TEXT = [12, 37, 80, 211, 256, 5, 150, 64]

WORKLOADS = [
    Workload("joint-1024-b1", 24, 128, joint(512, [37], 4096)),
    Workload("joint-1024-b8", 24, 128, joint(256, RAGGED_TEXT, 4096)),
    Workload("joint-512-b8", 24, 128, joint(256, RAGGED_TEXT, 1024)),
    Workload("prefix-2048-b16", 24, 128, prefix(16, 2048, 256, 1792)),
    Workload("prefix-512-b64", 12, 64, prefix(64, 512, 16, 512)),
    Workload("random-4096-p25", 24, 128, bernoulli(2, 4096, 0.25)),
    Workload("random-4096-p50", 24, 128, bernoulli(2, 4096, 0.5)),
    Workload("random-4096-p75", 24, 128, bernoulli(2, 4096, 0.75)),
]
