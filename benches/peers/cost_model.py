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
# Bytes that a warp writes at once, and rows of zeros that are enough work for a block: of those that
# packed rows leave, and of those that no group covers.
PIECE, ZEROED_ROWS, ZERO_SPAN_ROWS = 512, 256, 64
# What plans and files call the kernels of the table.
NAMES = {
    "CudaSm80": "sm80",
    "CudaSm90": "sm90",
    "CudaSm100": "sm100",
    "WgslPortable": "wgsl-portable",
    "WgslCoop": "wgsl-coop",
}
# Kernels of wgpu, and all that read single rows.
WGSL = {"wgsl-portable", "wgsl-coop"}
BY_ROWS = WGSL | {"sm80"}


@dataclasses.dataclass
class Chip:
    """Constants of a chip: nanoseconds, and bytes a nanosecond."""

    launch: float
    lists_launch: float
    copy_launch: float
    copy_rate: float
    memory_rate: float
    zero_piece: float
    zero_row: float


@dataclasses.dataclass
class TileCost:
    """Nanoseconds of a block, and the share of them that a lone block takes."""

    item: float
    listed: float
    scattered: float
    step: float
    masked: float
    dropped: float
    alone: float


def constants(compute_capability):
    """The constants of a chip, and those of each (kernel, width), on the H100. (0, 0) is any GPU through
    wgpu."""
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


def pieces(bytes):
    """How often a warp writes to as many bytes."""
    return -(-bytes // PIECE)


@dataclasses.dataclass
class Work:
    """What the model needs of a call on a path by a kernel, without any constant."""

    kernel: str
    width: int
    path: str
    # Of the block that takes the first item of each wave: items, full and masked key tiles, and
    # dropped keys in those.
    slowest: list[int]
    # The same of the last item, and how many there are of its wave if that is not full.
    last: tuple[int, int, int, int]
    tail: int
    # The same parts of all items.
    total: list[int]
    blocks: int
    # Bytes of attention and of the copies around it, and launches of the latter.
    bytes: float
    launches: int
    copied: float
    # What the warp with the most zeros writes: pieces, and rows that it must find.
    zero_pieces: float
    zero_rows: float

    @classmethod
    def of(cls, features, path, kernel, multiprocessors):
        tiles, heads, kv_heads = features["tiles"][kernel], features["heads"], features["kv_heads"]
        by_lists = kernel not in BY_ROWS
        by_groups = path == "fused" and by_lists
        rows = []
        for b, (queries, keys) in enumerate(zip(features["queries"], features["keys"])):
            full, masked, dropped = -(-keys // tiles["keys"]), 0, 0
            if by_groups:
                queries = features["query_groups"][b] * GROUP
                full, in_groups = tiles["full_key_tiles"][b], tiles["masked_key_groups"][b] * GROUP
                masked = -(-in_groups // tiles["keys"])
                dropped = full * tiles["keys"] + in_groups - keys
            elif path == "fused":
                full, masked = 0, full
            elif path == "dense" and "key_steps" in tiles and keys > 0:
                # Every row; steps of which every key is dropped are passed over.
                queries, full = features["seq_q"], tiles["key_steps"][b]
            # Blocks of kernels that read single rows end at once if there is no key.
            items = -(-queries // tiles["rows"]) * heads if by_lists or keys > 0 else 0
            if items > 0:
                rows.append((items, full, masked, dropped))
        rows.sort(key=lambda row: -(row[1] + row[2]))
        blocks = multiprocessors * (tiles.get("blocks") or blocks_of(kernel, tiles["width"]))
        slowest, total, items = [0, 0, 0, 0], [0, 0, 0, 0], 0
        for count, *parts in rows:
            total = [sum_ + count * part for sum_, part in zip(total, (1, *parts))]
            waves = -(-(items + count) // blocks) - -(-items // blocks)
            slowest = [sum_ + waves * part for sum_, part in zip(slowest, (1, *parts))]
            items += count
        queries, keys = sum(features["queries"]), sum(features["keys"])
        all_queries, all_keys = features["batch"] * features["seq_q"], features["batch"] * features["seq_k"]
        scatters = path == "packed" and kernel == "sm90"
        row_bytes = features.get("element", 2) * features["head_dim"]
        written = queries if path == "packed" and not scatters else all_queries
        read = all_queries if path == "dense" else queries
        attention = row_bytes * (heads * (read + written) + 2 * kv_heads * keys)
        launches = copied = 0
        if path == "packed":
            packs_queries = not (kernel == "sm80" and queries == all_queries)
            packs_keys = not (kernel == "sm80" and keys == all_keys)
            launches = packs_queries + packs_keys
            if kernel in WGSL:
                # Each tensor in a launch of its own.
                launches += packs_keys
            elif not features["is_cross"] and launches == 2:
                launches = 1
            copied = 2 * heads * queries * packs_queries + 4 * kv_heads * keys * packs_keys
            if packs_queries and not scatters:
                launches += 1
                copied += heads * (queries + all_queries)
        masked_rows = all_queries - queries
        zero_pieces = zero_rows = 0.0
        if scatters:
            # A warp of each block takes 32 rows at a time, which are masked in runs.
            warps = min(multiprocessors, max(1, items, -(-all_queries // ZEROED_ROWS)))
            share = -(-all_queries // 32) + warps - 1
            share = share // warps * 32 * masked_rows / max(1, all_queries)
            run = masked_rows / max(1, sum(features["query_runs"]))
            zero_rows = max(share, min(32.0, run))
            zero_pieces = zero_rows * pieces(heads * row_bytes)
        elif path == "fused" and by_lists:
            warps = min(multiprocessors, max(1, items, -(-masked_rows * heads // ZERO_SPAN_ROWS)))
            zero_pieces = row_bytes * heads * masked_rows / (warps * PIECE)
        elif path == "fused":
            zero_pieces = heads * masked_rows / blocks
        last = (1, *rows[-1][1:]) if rows else (0, 0, 0, 0)
        return cls(kernel, tiles["width"], path, slowest, last, items % blocks, total, blocks, attention, launches, copied * row_bytes, zero_pieces, zero_rows)

    def time(self, chip, tiles, multiprocessors):
        """Nanoseconds."""
        cost, by_lists = tiles[self.kernel, self.width], self.kernel not in BY_ROWS
        busy = self.busy(cost, multiprocessors)
        zeros = self.zero_pieces * chip.zero_piece + self.zero_rows * chip.zero_row
        if not by_lists:
            busy, zeros = busy + zeros, 0.0
        attention = (chip.lists_launch if by_lists else chip.launch) + math.hypot(busy, self.bytes / chip.memory_rate, zeros)
        return attention + self.launches * chip.copy_launch + self.copied / chip.copy_rate

    def busy(self, cost, multiprocessors):
        item = cost.item
        if self.kernel not in BY_ROWS and self.path == "fused":
            item += cost.listed
        elif self.kernel == "sm90" and self.path == "packed":
            item += cost.scattered
        sums = [parts[0] * item + parts[1] * cost.step + parts[2] * cost.masked + parts[3] * cost.dropped for parts in (self.slowest, self.last)]
        if self.tail == 0:
            return sums[0]
        return sums[0] - sums[1] + self.last_wave(cost, item, sums[1], multiprocessors)

    def work(self, tiles):
        """The time of all items, one after another, of kernels that read single rows."""
        cost = tiles[self.kernel, self.width]
        return self.total[0] * cost.item + self.total[1] * cost.step + self.total[2] * cost.masked

    def last_wave(self, cost, item, each, multiprocessors):
        if self.kernel != "sm90":
            most = self.blocks // multiprocessors
            # Blocks that only write zeros are gone before.
            share = min(-(-self.tail // multiprocessors), most)
            return each * (cost.alone + (1 - cost.alone) * (share - 1) / (most - 1)) if most > 1 else each
        best, steps = each, self.last[1] + self.last[2]
        for parts in range(2, min(max(steps // MIN_PART_STEPS, 1), MAX_PARTS) + 1):
            rounds = -(-self.tail * parts // self.blocks)
            part = (item + (each - item) / parts) * PART_TIME + PART
            best = min(best, SPLIT + rounds * part + parts * ADDED_PART)
        return best
