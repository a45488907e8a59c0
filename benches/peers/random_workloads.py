"""Random attention calls under key masks: six kinds of masks and none, self-attention and
cross-attention. The same seed gives the same calls on every machine: only Python's own random
numbers are used."""

import dataclasses
import random

# Kinds of masks.
KINDS = ["full", "prefix", "left", "joint", "holes", "runs", "random"]
# The share of calls that are cross-attention.
CROSS_SHARE = 0.15


@dataclasses.dataclass(frozen=True)
class Size:
    """How large calls are."""

    tokens: tuple[int, int]
    shortest: int
    heads: list[int]
    head_dims: list[int]
    # The widest row of q, in elements.
    width: int


# Calls of transformers on GPUs.
GPU = Size((1_000, 17_000), 64, [4, 8, 12, 16, 20, 24, 32, 40], [64, 64, 64, 72, 96, 128, 128, 128, 192, 256], 5120)


@dataclasses.dataclass(frozen=True)
class Side:
    """Which tokens of `[batch, seq]` are valid: the runs (start, end) of each batch row."""

    seq: int
    runs: list[list[tuple[int, int]]]

    @property
    def batch(self):
        return len(self.runs)

    @property
    def lengths(self):
        return [sum(end - start for start, end in row) for row in self.runs]

    @property
    def total_valid(self):
        return sum(self.lengths)

    @property
    def is_all_valid(self):
        return self.total_valid == self.batch * self.seq

    def keep(self):
        """One byte a token, row-major."""
        keep = bytearray(self.batch * self.seq)
        for row, runs in enumerate(self.runs):
            for start, end in runs:
                first = row * self.seq
                keep[first + start : first + end] = bytes([1]) * (end - start)
        return keep


@dataclasses.dataclass(frozen=True)
class RandomWorkload:
    """q and the output are [batch, query.seq, heads, head_dim], k and v [batch, key.seq, kv_heads,
    head_dim]. In self-attention both sides are one object."""

    number: int
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    query: Side
    key: Side

    @property
    def is_cross(self):
        return self.query is not self.key

    @property
    def batch(self):
        return self.query.batch

    @property
    def q_shape(self):
        return (self.batch, self.query.seq, self.heads, self.head_dim)

    @property
    def kv_shape(self):
        return (self.batch, self.key.seq, self.kv_heads, self.head_dim)

    @property
    def pairs(self):
        """Valid pairs of query and key."""
        return sum(q * k for q, k in zip(self.query.lengths, self.key.lengths))

    @property
    def flops(self):
        """Operations on valid pairs: two products of two operations each."""
        return 4.0 * self.pairs * self.heads * self.head_dim

    @property
    def title(self):
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        seq = f"{self.query.seq}, keys {self.key.seq}" if self.is_cross else str(self.query.seq)
        valid = self.key.total_valid / (self.batch * self.key.seq)
        runs = sum(map(len, self.key.runs))
        return f"{self.number}: {self.kind} B{self.batch} S{seq} {heads}x{self.head_dim}, {valid:.0%} valid, {runs} runs"


def merged(runs):
    """Runs without empty ones; neighbours become one."""
    made = []
    for start, end in runs:
        if end <= start:
            continue
        if made and made[-1][1] == start:
            made[-1] = (made[-1][0], end)
        else:
            made.append((start, end))
    return made


def mask(rng, kind, batch, seq):
    """A random mask of a kind. Some token of each batch row is valid, but for masks of short runs
    and of random tokens, whose rows may be empty by chance."""
    if kind == "full":
        return Side(seq, [[(0, seq)]] * batch)
    if kind in ("prefix", "left"):
        shortest = max(1, int(seq * rng.choice([0.05, 0.25, 0.5, 0.8])))
        lengths = [rng.randint(shortest, seq) for _ in range(batch)]
        return Side(seq, [[(0, n)] if kind == "prefix" else [(seq - n, seq)] for n in lengths])
    if kind == "joint":
        text = rng.randint(min(16, seq // 2), min(512, seq // 2))
        return Side(seq, [merged([(0, rng.randint(1, text)), (text, seq)]) for _ in range(batch)])
    if kind == "holes":
        # One token dropped in every `step`: at regular places, or anywhere.
        step, is_regular = rng.randint(16, 128), rng.random() < 0.5
        return Side(seq, [holes(rng, seq, step, is_regular) for _ in range(batch)])
    if kind == "runs":
        longest, gap = int(log_uniform(rng, 2, 512)), int(log_uniform(rng, 1, 256))
        return Side(seq, [alternating(rng, seq, longest, gap) for _ in range(batch)])
    share = rng.choice([0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95])
    return Side(seq, [merged((at, at + 1) for at in range(seq) if rng.random() < share) for _ in range(batch)])


def holes(rng, seq, step, is_regular):
    if is_regular:
        dropped = range(rng.randrange(step), seq, step)
    else:
        dropped = [at for at in range(seq) if rng.random() * step < 1]
    ends = [-1, *dropped, seq]
    return merged((before + 1, after) for before, after in zip(ends, ends[1:]))


def alternating(rng, seq, longest, gap):
    runs, at = [], rng.randrange(gap + 1)
    while at < seq:
        end = min(seq, at + rng.randint(1, longest))
        runs.append((at, end))
        at = end + rng.randint(1, gap)
    return merged(runs)


def log_uniform(rng, least, most):
    return least * (most / least) ** rng.random()


def workload(rng, number, size):
    kind = KINDS[number % len(KINDS)]
    tokens = rng.choice([log_uniform(rng, *size.tokens), rng.uniform(*size.tokens)])
    seq = max(size.shortest, round(log_uniform(rng, size.shortest, tokens)))
    # Half of the lengths are multiples of 64, as models and servers round them.
    if rng.random() < 0.5:
        seq = max(1, round(seq / 64)) * 64
    batch = max(1, round(tokens / seq))
    head_dim = rng.choice(size.head_dims)
    heads = rng.choice([heads for heads in size.heads if heads * head_dim <= size.width])
    groups = [group for group in [1, 1, 1, 1, 2, 3, 4, 8] if heads % group == 0]
    key = mask(rng, kind, batch, seq)
    query = key
    if rng.random() < CROSS_SHARE:
        # As many queries as a self-attention would have, and mostly fewer keys.
        query = mask(rng, rng.choice(["full", "full", "prefix", "joint"]), batch, seq)
        key = mask(rng, kind, batch, round(log_uniform(rng, 16, max(64, min(seq, 1024)))))
        kind = f"cross {kind}"
    return RandomWorkload(number, kind, heads, heads // rng.choice(groups), head_dim, query, key)


def workloads(seed, count, size):
    """`count` calls of a seed. The first of them do not depend on `count`."""
    made, number = [], 0
    while len(made) < count:
        # Each with a generator of its own, so that one call can be repeated alone.
        found = workload(random.Random(f"{seed}/{number}"), number, size)
        number += 1
        # No valid pair: nothing is computed.
        if found.pairs > 0:
            made.append(found)
    return made
