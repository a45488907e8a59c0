"""The cost model of src/call/cost.rs, so that its constants can be fitted to measurements: the time
of each path and kernel from what the host knows of a call.

The formulas here and there are the same; fit_cost.py compares their results where a measurement
tells the estimate of the library."""

import dataclasses
import math

GROUP = 16
# More parts of a query tile than this are not made, nor parts of fewer key tiles.
MAX_PARTS, MIN_PART_STEPS = 8, 2


@dataclasses.dataclass
class Chip:
    """Constants of a chip. Times are in nanoseconds, rates in bytes a nanosecond."""

    # Until the first block of a kernel works, and after the last.
    launch: float = 2500.0
    # The same for a kernel that copies rows.
    copy_launch: float = 2000.0
    # Bytes read and written by kernels that copy rows, and by attention.
    copy_rate: float = 2700.0
    memory_rate: float = 2700.0
    multiprocessors: int = 132


@dataclasses.dataclass
class TileCost:
    """Nanoseconds of a block of one kernel, for one width of its tiles."""

    # Start and end of a query tile.
    item: float
    # A step over a tile of keys that are all kept, and over one made of groups.
    step: float
    masked: float
    # A dropped key in a tile made of groups.
    dropped: float
    # More for a query tile whose rows the kernel scatters itself.
    scattered: float


def blocks_a_multiprocessor(kernel, width):
    """Blocks that share a multiprocessor with 228 KiB of shared memory."""
    if kernel != "sm80":
        return 1
    return {64: 3, 192: 1}.get(width, 2)


def rows_of_waves(groups, slots):
    """The time of the slowest block, and what is left for a last wave: its items, and the time of
    each. `groups` are (items, time of each), the longest first, and blocks take them in turns."""
    time = items = 0
    for count, each in groups:
        # Multiples of `slots` among the items of this group: each starts a wave.
        first, last = -(-items // slots), -(-(items + count) // slots)
        time += (last - first) * each
        items += count
    return time, items


def last(groups):
    return groups[-1][1] if groups else 0.0


def makespan(groups, steps, slots, cost, alone, splits):
    """The time of all items on `slots` blocks that run at once.

    `groups` are (items, time of each), the longest first. `alone` is the time of a lone block of a
    multiprocessor over that of one that shares it. With `splits`, the items of a last wave that
    leaves blocks idle may be divided by keys into parts; `steps` are the key tiles of the item with
    the fewest."""
    time, items = rows_of_waves(groups, slots)
    tail = items % slots
    if tail == 0:
        return time
    if splits:
        whole = last(groups)
        best = whole
        for parts in range(2, min(max(steps // MIN_PART_STEPS, 1), MAX_PARTS) + 1):
            rounds = -(-tail * parts // slots)
            part = (cost.item + (whole - cost.item) / parts) * 1.125 + 2900.0
            best = min(best, 2000.0 + rounds * part + parts * 1450.0)
        return time - whole + best
    if alone < 1 and tail * 1.0 <= slots * 0.5:
        return time - last(groups) * (1 - alone)
    return time


def attention(features, kernel, form, chip, cost, alone):
    """Nanoseconds of an attention kernel; `form` is dense, fused or packed."""
    tiles = features["tiles"][kernel]
    rows, keys, heads = tiles["rows"], tiles["keys"], features["heads"]
    groups = []
    fewest = math.inf
    for b in range(features["batch"]):
        queries, kept = features["queries"][b], features["keys"][b]
        if form == "dense":
            queries = features["seq_q"]
        if queries == 0:
            continue
        by_groups = form != "packed" and kernel != "sm80" and not (form == "dense" and kept == features["seq_k"])
        if by_groups:
            full, key_groups = tiles["full_key_tiles"][b], tiles["masked_key_groups"][b]
            masked = -(-key_groups * GROUP // keys)
            dropped = full * keys + key_groups * GROUP - kept
        else:
            full, masked, dropped = kept // keys, int(kept % keys > 0), 0
        query_rows = queries
        if by_groups and form == "fused":
            query_rows = features["query_groups"][b] * GROUP
        if by_groups:
            each = cost.item + full * cost.step + masked * cost.masked + dropped * cost.dropped
        else:
            each = cost.item + (full + masked) * cost.step
        if form == "packed" and kernel == "sm90":
            each += cost.scattered
        groups.append((full + masked, -(-query_rows // rows) * heads, each))
        fewest = min(fewest, full + masked)
    if not groups:
        return chip.launch
    groups.sort(key=lambda group: -group[0])
    slots = chip.multiprocessors * blocks_a_multiprocessor(kernel, tiles["width"])
    busy = makespan([group[1:] for group in groups], fewest, slots, cost, alone if kernel == "sm80" else 1, kernel == "sm90")
    row = 2 * features["head_dim"]
    out_rows = features["batch"] * features["seq_q"]
    read = row * (heads * sum(features["queries"]) + 2 * features["kv_heads"] * sum(features["keys"]))
    written = row * heads * (out_rows if form != "packed" or kernel == "sm90" else sum(features["queries"]))
    memory = (read + written) / chip.memory_rate
    # Each hides most of the other, but neither wholly.
    return chip.launch + math.hypot(busy, memory)


def time(features, path, kernel, chip, cost, alone=0.6):
    """Nanoseconds of a call."""
    found = attention(features, kernel, path, chip, cost, alone)
    if path != "packed":
        return found
    row = 2 * features["head_dim"]
    heads, kv_heads = features["heads"], features["kv_heads"]
    queries, keys = sum(features["queries"]), sum(features["keys"])
    padded = features["batch"] * features["seq_q"]
    all_queries, all_keys = queries == padded, keys == features["batch"] * features["seq_k"]
    takes_padded = kernel == "sm80"
    packs_q, packs_k = not (all_queries and takes_padded), not (all_keys and takes_padded)
    moved = 2 * row * (heads * queries * packs_q + 2 * kv_heads * keys * packs_k)
    launches = 1 if not features["is_cross"] else packs_q + packs_k
    if kernel != "sm90" and packs_q:
        moved += row * heads * (queries + padded)
        launches += 1
    return found + launches * chip.copy_launch + moved / chip.copy_rate
