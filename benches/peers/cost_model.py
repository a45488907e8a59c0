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
PIECE, ZEROED_ROWS, ZERO_SPAN_ROWS = 512, 64, 64
FIRST_KEYS, MIXED_BLOCKS = 64, 6
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
    zero_beside: float
    zero_alone: float


@dataclasses.dataclass
class TileCost:
    """Nanoseconds of a block, and the share of them that a lone block takes."""

    item: float
    listed: float
    scattered: float
    step: float
    masked: float
    dropped: float
    spared: float
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
    for kernel, width, keys, costs in re.findall(r"\(Kernel::(\w+), (\d+), (\d+), tile\(\[([^\]]*)\]\)\)", text):
        tiles[NAMES[kernel], int(width), int(keys)] = TileCost(*map(float, costs.split(",")))
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
    # Width and keys of its tiles.
    width: int
    keys: int
    path: str
    # Of the block that takes the first item of each wave: items, full and masked key tiles, dropped
    # keys in those, and keys that first tiles have fewer.
    slowest: list[int]
    # The same of all items, and of the last one.
    all: list[int]
    last: tuple[int, int, int, int, int]
    # Items of the last wave if that is not full; blocks that run at once; and those that take a place
    # where one wave is all.
    tail: int
    blocks: int
    places: int
    # Bytes of attention and of the copies around it, and launches of the latter.
    bytes: float
    launches: int
    copied: float
    # What the warp with the most zeros writes: pieces, and rows that it must find.
    zero_pieces: float
    zero_rows: float
    # With kernels that read single rows: rows that blocks write before they compute, and alone.
    zero_beside: float
    zero_alone: float

    @classmethod
    def of(cls, features, path, kernel, multiprocessors):
        """`kernel` may be followed by the keys of shorter tiles (`kernel_tiles.tiles_of`)."""
        tiles, heads, kv_heads = features["tiles"][kernel], features["heads"], features["kv_heads"]
        kernel = kernel.split()[0]
        by_lists = kernel not in BY_ROWS
        by_groups = path == "fused" and by_lists

        def tiles_of(queries, packed):
            """Query tiles of a batch row, of all heads, of which so many share tiles."""
            queries = queries if packed == 1 else -(-queries // GROUP) * GROUP * packed
            return -(-queries // tiles["rows"]) * (heads // packed)

        # As packed_heads.rs decides.
        packed = 1
        if kernel == "sm90":
            every = [count * GROUP for count in features["query_groups"]] if by_groups else features["queries"]
            alone, shared = (sum(tiles_of(queries, count) for queries in every) for count in (1, heads // kv_heads))
            packed = heads // kv_heads if alone > multiprocessors and shared < alone else 1
        rows = []
        for b, (queries, keys) in enumerate(zip(features["queries"], features["keys"])):
            full, masked, dropped = -(-keys // tiles["keys"]), 0, 0
            rest = keys
            if by_groups:
                queries = features["query_groups"][b] * GROUP
                full, in_groups = tiles["full_key_tiles"][b], tiles["masked_key_groups"][b] * GROUP
                masked, rest = -(-in_groups // tiles["keys"]), in_groups
                dropped = full * tiles["keys"] + in_groups - keys
            elif path == "fused":
                full, masked = 0, full
            elif path == "dense" and "key_steps" in tiles and keys > 0:
                # Every row; steps of which every key is dropped are passed over.
                queries, full = features["seq_q"], tiles["key_steps"][b]
            # Blocks of kernels that read single rows end at once if there is no key.
            items = tiles_of(queries, packed) if by_lists or keys > 0 else 0
            rest %= tiles["keys"]
            computed = min(-(-rest // FIRST_KEYS) * FIRST_KEYS, tiles["keys"]) if by_lists else rest
            spared = tiles["keys"] - computed if rest else 0
            if items > 0:
                rows.append((items, full, masked, dropped, spared))
        rows.sort(key=lambda row: -(row[1] + row[2]))
        blocks = multiprocessors * (tiles.get("blocks") or blocks_of(kernel, tiles["width"]))
        slowest, all_, items = [0] * 5, [0] * 5, 0
        for count, *parts in rows:
            waves = -(-(items + count) // blocks) - -(-items // blocks)
            slowest = [sum_ + waves * part for sum_, part in zip(slowest, (1, *parts))]
            all_ = [sum_ + count * part for sum_, part in zip(all_, (1, *parts))]
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
        zero_pieces = zero_rows = zero_beside = zero_alone = 0.0
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
            beside = 0
            for queries_, keys_, runs in zip(features["queries"], features["keys"], features["runs"]):
                end = min(-(-queries_ // tiles["rows"]) * tiles["rows"], features["seq_q"]) if keys_ > 0 else 0
                beside += end - sum(max(min(run_end, end) - start, 0) for start, run_end in runs)
            row_tiles = -(-features["seq_q"] // tiles["rows"])
            every = row_tiles * heads * features["batch"]
            of_warps = row_tiles * tiles["rows"] / (-(-features["seq_q"] // 32) * 32)
            each = heads * of_warps * max(every / blocks, 1.0) / max(every, 1)
            zero_beside, zero_alone = beside * each, (masked_rows - beside) * each
        last = (1, *rows[-1][1:]) if rows else (0,) * 5
        every = -(-features["seq_q"] // tiles["rows"]) * heads * features["batch"]
        places = every if path == "fused" and items < every <= blocks and items * MIXED_BLOCKS >= every else items
        return cls(kernel, tiles["width"], tiles["keys"], path, slowest, all_, last, items % blocks, blocks, places, attention, launches, copied * row_bytes, zero_pieces, zero_rows, zero_beside, zero_alone)

    def time(self, chip, tiles, multiprocessors):
        """Nanoseconds."""
        cost, by_lists = tiles[self.kernel, self.width, self.keys], self.kernel not in BY_ROWS
        busy = self.busy(cost, multiprocessors)
        zeros = self.zero_pieces * chip.zero_piece + self.zero_rows * chip.zero_row
        zeros += self.zero_beside * chip.zero_beside + self.zero_alone * chip.zero_alone
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
        slowest, all_, last = (
            parts[0] * item + parts[1] * cost.step + parts[2] * cost.masked + parts[3] * cost.dropped - parts[4] * cost.spared
            for parts in (self.slowest, self.all, self.last)
        )
        if self.slowest[0] == 1 and self.kernel != "sm90":
            return slowest * self.sharing(cost, self.places, all_ / max(self.all[0] * slowest, 1.0), multiprocessors)
        if self.tail == 0:
            return slowest
        return slowest - last + self.last_wave(cost, item, last, multiprocessors)

    def sharing(self, cost, count, evenness, multiprocessors):
        most = self.blocks // multiprocessors
        if most == 1:
            return 1.0
        others = max(1, min(-(-count // multiprocessors), most)) - 1
        return cost.alone + (1 - cost.alone) * others / (most - 1) * evenness

    def work(self, tiles):
        """The time of all items, one after another, of kernels that read single rows."""
        cost = tiles[self.kernel, self.width, self.keys]
        items, full, masked = self.all[:3]
        return items * cost.item + full * cost.step + masked * cost.masked

    def last_wave(self, cost, item, each, multiprocessors):
        if self.kernel != "sm90":
            # Blocks that only write zeros are gone before.
            return each * self.sharing(cost, self.tail, 1.0, multiprocessors)
        best, steps = each, self.last[1] + self.last[2]
        for parts in range(2, min(max(steps // MIN_PART_STEPS, 1), MAX_PARTS) + 1):
            rounds = -(-self.tail * parts // self.blocks)
            part = (item + (each - item) / parts) * PART_TIME + PART
            best = min(best, SPLIT + rounds * part + parts * ADDED_PART)
        return best
