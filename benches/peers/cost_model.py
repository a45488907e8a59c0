"""The cost model of src/call/cost.rs, so that its constants can be fitted: the same formulas, with the
constants of src/call/chips.rs."""

import dataclasses
import heapq
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
FIRST_KEYS = 64
EXPECTED, TURNS, SECTORS = 0.5, 8, 64
WARP_ROWS, WARPGROUP_ROWS = 32, 64
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
    rows_launch: float
    copy_launch: float
    copy_rate: float
    memory_rate: float
    zero_piece: float
    zero_row: float
    zero_span: float
    scatter_rate: float
    zero_beside: float
    zero_alone: float
    narrow: float
    shared_heads: float
    cross_rows: float
    rows_idle: float
    lists_idle: float
    packed_lead: float


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
    # Items of the last wave if that is not full, and blocks that run at once.
    tail: int
    blocks: int
    # Bytes of attention and of the copies around it, launches of the latter, and bytes of zeros that
    # they write.
    bytes: float
    launches: int
    copied: float
    zeros: float
    # What the warp with the most zeros writes: pieces, spans, and rows that it must find.
    zero_pieces: float
    zero_spans: float
    zero_rows: float
    # With kernels of wgpu: rows that blocks write before they compute, and alone.
    zero_beside: float
    zero_alone: float
    # With sm80, blocks in the order of launch: for each batch row the parts of one (as above), and how
    # many write how many rows of zeros: two kinds that compute, and those that do not.
    launched: list
    # Whether heads are narrower than tiles, and whether they share query tiles.
    is_narrow: bool
    shares_heads: bool
    # The share of warps, or warpgroups, that have no query.
    idle: float
    # Whether the kernel writes packed rows to their padded places.
    scatters: bool
    # Whether a kernel by tile lists reads packed rows, and keys are those of other tokens.
    has_cross_rows: bool

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
        rows, launched, idle = [], [], 0.0
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
            if items > 0:
                filled = queries if packed == 1 else -(-queries // GROUP) * GROUP * packed
                part = WARPGROUP_ROWS if by_lists else WARP_ROWS
                row_tiles = -(-filled // tiles["rows"])
                idle += items * (1 - -(-filled // part) * part / (row_tiles * tiles["rows"]))
            if kernel == "sm80":
                zeros, computing = [], items // heads
                if path == "fused":
                    zeros = zeros_of_tiles(features["runs"][b], features["seq_q"], tiles["rows"])
                beside, alone = sorted(zeros[:computing]), zeros[computing:]
                parts = (1, full, masked, dropped, spared)
                # The blocks of the tile that has the most to write, the others, and those that only write.
                most = heads if beside else 0
                others = sum(beside[:-1]) / max(1, len(beside) - 1)
                only_zeros = (len(alone) * heads, sum(alone) / max(1, len(alone)))
                launched.append((parts, (most, max(beside, default=0)), (items - most, others), only_zeros))
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
        if path == "rows":
            # Packed before: there are no others.
            all_queries, all_keys = queries, keys
        # A side without masked rows is read where it lies, but by kernels of wgpu.
        in_place = kernel not in WGSL
        scatters = path == "packed" and kernel == "sm90" and queries < all_queries
        row_bytes = features.get("element", 2) * features["head_dim"]
        written = queries if path == "packed" and not scatters else all_queries
        read = all_queries if path == "dense" else queries
        # Rows of other lengths share pieces with the rows beside them.
        moved = row_bytes + SECTORS - math.gcd(row_bytes, SECTORS)
        attention = moved * (heads * (read + written) + 2 * kv_heads * keys)
        launches = copied = zeros = 0
        if path == "packed":
            packs_queries = not (in_place and queries == all_queries)
            packs_keys = not (in_place and keys == all_keys)
            launches = packs_queries + packs_keys
            if kernel in WGSL:
                # Each tensor in a launch of its own.
                launches += packs_keys
            elif not features["is_cross"] and launches == 2:
                launches = 1
            copied = 2 * heads * queries * packs_queries + 4 * kv_heads * keys * packs_keys
            if packs_queries and not scatters:
                launches += 1
                zeros = heads * (all_queries - queries)
                copied += 2 * heads * queries
        masked_rows = all_queries - queries
        zero_pieces = zero_spans = zero_rows = zero_beside = zero_alone = 0.0
        if scatters:
            # A warp of each block takes 32 rows at a time, which are masked in runs.
            warps = min(multiprocessors, max(1, items, -(-all_queries // ZEROED_ROWS)))
            share = -(-all_queries // 32) + warps - 1
            share = share // warps * 32 * masked_rows / max(1, all_queries)
            run = masked_rows / max(1, sum(features["query_runs"]))
            zero_rows = max(share, min(32.0, run))
            zero_pieces = zero_rows * pieces(heads * row_bytes)
        elif path == "fused" and by_lists:
            spans = -(-masked_rows * heads // ZERO_SPAN_ROWS)
            warps = min(multiprocessors, max(1, items, spans))
            zero_spans = spans / warps
            zero_pieces = row_bytes * heads * masked_rows / (warps * PIECE)
        elif path == "fused" and kernel != "sm80":
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
        return cls(
            kernel, tiles["width"], tiles["keys"], path, slowest, all_, last, items % blocks, blocks,
            attention, launches, copied * row_bytes, zeros * row_bytes, zero_pieces, zero_spans, zero_rows,
            zero_beside, zero_alone, launched, features["head_dim"] < tiles["width"], packed > 1, idle / max(1, items), scatters,
            by_lists and path in ("packed", "rows") and features["is_cross"],
        )  # fmt: skip

    def time(self, chip, tiles, multiprocessors):
        """Nanoseconds."""
        cost, by_lists = tiles[self.kernel, self.width, self.keys], self.kernel not in BY_ROWS
        width = chip.narrow if self.is_narrow else 1.0
        memory = self.bytes / chip.memory_rate
        if self.kernel == "sm80":
            attention = chip.launch + math.hypot(width * self.handed_out(cost, chip, multiprocessors), memory)
        else:
            busy = width * self.busy(cost, chip)
            zeros = self.zero_pieces * chip.zero_piece + self.zero_spans * chip.zero_span + self.zero_rows * chip.zero_row
            zeros += self.zero_beside * chip.zero_beside + self.zero_alone * chip.zero_alone
            if not by_lists:
                busy, zeros = busy + zeros, 0.0
            launch = chip.lists_launch if by_lists else chip.launch
            if by_lists and self.path == "rows":
                launch += chip.rows_launch
            attention = launch + math.hypot(busy, memory, zeros)
        return attention + self.launches * chip.copy_launch + self.copied / chip.copy_rate + self.zeros / chip.scatter_rate

    def lead(self, chip):
        """What the time is multiplied by where choices are compared."""
        return chip.packed_lead if self.path == "packed" else 1.0

    def block_time(self, cost, chip, parts, item):
        """Of so many items, full and masked key tiles, dropped and spared keys."""
        at_work = 1 - self.idle * (chip.rows_idle if self.kernel in BY_ROWS else chip.lists_idle)
        items, full, masked, dropped, spared = parts
        return items * item + at_work * (full * cost.step + masked * cost.masked + dropped * cost.dropped - spared * cost.spared)

    def busy(self, cost, chip):
        item = cost.item + (chip.shared_heads if self.shares_heads else 0.0)
        item += chip.cross_rows if self.has_cross_rows else 0.0
        if self.kernel not in BY_ROWS and self.path == "fused":
            item += cost.listed
        elif self.scatters:
            item += cost.scattered
        slowest, last = (self.block_time(cost, chip, parts, item) for parts in (self.slowest, self.last))
        if self.tail == 0 or self.kernel != "sm90":
            return slowest
        return slowest - last + self.last_wave(item, last)

    def handed_out(self, cost, chip, multiprocessors):
        """The time in which the multiprocessors compute blocks in the order of launch, each as soon as
        there is a place."""
        free, zeros_end, computing, every = [(0.0, self.blocks)], 0.0, [], 0
        most = self.blocks // multiprocessors
        # Of the first blocks of all multiprocessors, the second ones, ...: how many compute.
        of_levels = [0.0] * most

        def take(count, each):
            while count > 0:
                start, places = heapq.heappop(free)
                taken = min(count, places)
                if taken < places:
                    heapq.heappush(free, (start, places - taken))
                heapq.heappush(free, (start + each, taken))
                count -= taken
                yield start, start + each, taken

        for parts, *beside, (zeroing, alone) in self.launched:
            time, items = self.block_time(cost, chip, parts, cost.item), sum(count for count, _ in beside)
            here = items + zeroing
            for level in range(most):
                overlap = min(every + here, (level + 1) * multiprocessors) - max(every, level * multiprocessors)
                of_levels[level] += max(overlap, 0) * items / max(here, 1)
            every += here
            turns = max(1, TURNS // len(self.launched)) if items and zeroing else 1
            for turn in range(turns):

                def now(count):
                    return count * (turn + 1) // turns - count * turn // turns

                for count, zeros in beside:
                    computing += take(now(count), time + zeros * chip.zero_beside)
                zeros_end = max([zeros_end, *(end for _, end, _ in take(now(zeroing), alone * chip.zero_alone))])
        # All places are taken until the last block starts.
        last_start = max((start for start, _, _ in computing), default=0.0)
        running = [(end - last_start, count) for _, end, count in computing if end > last_start]
        if not running:
            return zeros_end
        longest, count = max(end for end, _ in running), sum(count for _, count in running)
        evenness = sum(end * count for end, count in running) / (count * longest)
        sharing = min(max(-(-count // multiprocessors), 1), most)
        if any(zeroing for *_, (zeroing, _) in self.launched):
            sharing = max(sharing, most if every > self.blocks else crowd(of_levels, multiprocessors))
        share = 1.0 if most == 1 else cost.alone + (1 - cost.alone) * (sharing - 1) / (most - 1) * evenness
        return max(zeros_end, last_start + longest * share)

    def work(self, tiles):
        """The time of all items, one after another, of kernels that read single rows."""
        cost = tiles[self.kernel, self.width, self.keys]
        items, full, masked = self.all[:3]
        return items * cost.item + full * cost.step + masked * cost.masked

    def last_wave(self, item, each):
        best, steps = each, self.last[1] + self.last[2]
        for parts in range(2, min(max(steps // MIN_PART_STEPS, 1), MAX_PARTS) + 1):
            rounds = -(-self.tail * parts // self.blocks)
            part = (item + (each - item) / parts) * PART_TIME + PART
            best = min(best, SPLIT + rounds * part + parts * ADDED_PART)
        return best


def zeros_of_tiles(runs, seq, tile_rows):
    """For each tile of a batch row, the masked rows of the warp that has the most of them, as if all
    warps had as many."""
    warps = [min(WARP_ROWS, seq - first) for first in range(0, seq, WARP_ROWS)]
    for start, end in runs:
        for warp in range(start // WARP_ROWS, -(-end // WARP_ROWS)):
            warps[warp] -= min(end, (warp + 1) * WARP_ROWS) - max(start, warp * WARP_ROWS)
    each = tile_rows // WARP_ROWS
    return [each * max(warps[first : first + each]) for first in range(0, len(warps), each)]


def crowd(of_levels, multiprocessors):
    """The most computing blocks of some multiprocessor, where so many of the first blocks of all of
    them compute, of the second ones, and so on, and chance decides which."""
    chances = [1.0]
    for computing in of_levels:
        part = computing / multiprocessors
        chances = [
            (chances[count] if count < len(chances) else 0.0) * (1 - part) + (chances[count - 1] * part if count else 0.0)
            for count in range(len(chances) + 1)
        ]
    return max((most for most in range(1, len(chances)) if multiprocessors * sum(chances[most:]) >= EXPECTED), default=1)
