"""The cost model of src/call/cost.rs, so that its constants can be fitted: the same formulas, with the
constants of src/call/chips.rs."""

import dataclasses
import math
import pathlib
import re

CHIPS = pathlib.Path(__file__).resolve().parents[2] / "src" / "call" / "chips.rs"
GROUP = 16
# As in cost.rs.
MAX_PARTS, MIN_PART_STEPS = 8, 2
SPLIT, PART, ADDED_PART, PART_TIME = 2000.0, 2900.0, 1450.0, 1.125
# What plans and files call the kernels of the table.
NAMES = {"CudaSm80": "sm80", "CudaSm90": "sm90", "CudaSm100": "sm100"}


@dataclasses.dataclass
class Chip:
    """Constants of a chip: nanoseconds, and bytes a nanosecond."""

    launch: float
    copy_launch: float
    copy_rate: float
    memory_rate: float


@dataclasses.dataclass
class TileCost:
    """Nanoseconds of a block, and the share of them that a lone block takes."""

    item: float
    step: float
    masked: float
    dropped: float
    scattered: float
    alone: float


def constants(compute_capability):
    """The constants of a chip, and those of each (kernel, width), on the H100."""
    text = CHIPS.read_text()
    major, minor = compute_capability
    row = re.search(rf"compute_capability: \({major}, {minor}\),(.*?)source:", text, re.DOTALL).group(1)
    values = {name: float(value) for name, value in re.findall(r"(\w+): ([\d.e]+),", row)}
    chip = Chip(*(values[field.name] for field in dataclasses.fields(Chip)))
    tiles = {}
    for kernel, width, costs in re.findall(r"\(Kernel::(\w+), (\d+), tile\(([^)]*)\)\)", text):
        tiles[NAMES[kernel], int(width)] = TileCost(*map(float, costs.split(",")))
    return chip, tiles


def blocks_of(kernel, width):
    """Blocks that share a multiprocessor with the 228 KiB of shared memory of an H100."""
    if kernel != "sm80":
        return 1
    return {64: 3, 192: 1}.get(width, 2)


@dataclasses.dataclass
class Work:
    """What the model needs of a call on a path by a kernel, without any constant."""

    kernel: str
    width: int
    # Of each batch row with queries: items, full and masked key tiles, dropped keys in those; the
    # most key tiles first.
    rows: list[tuple[int, int, int, int]]
    # Bytes of attention and of the copies around it, and launches of the latter.
    bytes: float
    launches: int
    copied: float
    scatters: bool

    @classmethod
    def of(cls, features, path, kernel):
        tiles, heads, kv_heads = features["tiles"][kernel], features["heads"], features["kv_heads"]
        by_groups = path == "fused" and kernel != "sm80"
        rows = []
        for b, (queries, keys) in enumerate(zip(features["queries"], features["keys"])):
            if queries == 0:
                continue
            full, masked, dropped = -(-keys // tiles["keys"]), 0, 0
            if by_groups:
                queries = features["query_groups"][b] * GROUP
                full, in_groups = tiles["full_key_tiles"][b], tiles["masked_key_groups"][b] * GROUP
                masked = -(-in_groups // tiles["keys"])
                dropped = full * tiles["keys"] + in_groups - keys
            rows.append((-(-queries // tiles["rows"]) * heads, full, masked, dropped))
        rows.sort(key=lambda row: -(row[1] + row[2]))
        queries, keys = sum(features["queries"]), sum(features["keys"])
        all_queries, all_keys = features["batch"] * features["seq_q"], features["batch"] * features["seq_k"]
        scatters = path == "packed" and kernel == "sm90"
        row_bytes = 2 * features["head_dim"]
        written = queries if path == "packed" and not scatters else all_queries
        attention = row_bytes * (heads * (queries + written) + 2 * kv_heads * keys)
        launches = copied = 0
        if path == "packed":
            packs_queries = not (kernel == "sm80" and queries == all_queries)
            packs_keys = not (kernel == "sm80" and keys == all_keys)
            launches = packs_queries + packs_keys
            if not features["is_cross"] and launches == 2:
                launches = 1
            copied = 2 * heads * queries * packs_queries + 4 * kv_heads * keys * packs_keys
            if packs_queries and not scatters:
                launches += 1
                copied += heads * (queries + all_queries)
        return cls(kernel, tiles["width"], rows, attention, launches, copied * row_bytes, scatters)

    def time(self, chip, tiles, multiprocessors):
        """Nanoseconds."""
        busy = self.busy(tiles[self.kernel, self.width], multiprocessors)
        attention = chip.launch + math.hypot(busy, self.bytes / chip.memory_rate)
        return attention + self.launches * chip.copy_launch + self.copied / chip.copy_rate

    def busy(self, cost, multiprocessors):
        if not self.rows:
            return 0.0
        a_multiprocessor = blocks_of(self.kernel, self.width)
        blocks = multiprocessors * a_multiprocessor
        time, before = 0.0, 0
        item = cost.item + (cost.scattered if self.scatters else 0.0)
        for count, full, masked, dropped in self.rows:
            each = item + full * cost.step + masked * cost.masked + dropped * cost.dropped
            end = before + count
            time += (-(-end // blocks) - -(-before // blocks)) * each
            before = end
        tail = before % blocks
        if tail == 0:
            return time
        steps = self.rows[-1][1] + self.rows[-1][2]
        return time - each + self.last_wave(cost, tail, steps, each, blocks, a_multiprocessor)

    def last_wave(self, cost, tail, steps, each, blocks, a_multiprocessor):
        if self.kernel != "sm90":
            return each * cost.alone if tail * a_multiprocessor <= blocks else each
        best = each
        for parts in range(2, min(max(steps // MIN_PART_STEPS, 1), MAX_PARTS) + 1):
            rounds = -(-tail * parts // blocks)
            part = (cost.item + (each - cost.item) / parts) * PART_TIME + PART
            best = min(best, SPLIT + rounds * part + parts * ADDED_PART)
        return best
