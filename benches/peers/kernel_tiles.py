"""What the host knows of a call before it is launched: the tiles that each CUDA kernel makes of it.

Tile sizes come from the kernels' headers, and tiles are counted as
src/backends/cuda/attention/tile_lists.rs makes them."""

import pathlib
import re

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "kernels" / "attention"
# Rows of a group, which tiles are made of where runs are short.
GROUP = 16
WARPGROUP_ROWS = 64
# The tiles of `wgsl-portable`, as src/backends/wgpu/tilings.rs has them: a unit test compares estimates.
PORTABLE_TILES = [(64, 64, 64), (128, 64, 64), (256, 32, 64)]




def table(kernel, file="tiles.h"):
    """The rows of one of a kernel's tables of tiles."""
    if kernel == "wgsl-portable":
        return PORTABLE_TILES
    text = (KERNELS / kernel / file).read_text()
    return [tuple(map(int, row.split(","))) for row in re.findall(r"^ *X\((\d[^)]*)\)", text, re.MULTILINE)]


def tile(kernel, head_dim):
    """(width, query rows, keys) of the narrowest tile of a kernel that holds a head dimension, or
    None."""
    row = next((row for row in table(kernel) if row[0] >= head_dim), None)
    if row is None:
        return None
    if kernel in ("sm80", "wgsl-portable"):
        return row[:3]
    if kernel == "sm90":
        width, warpgroups, keys, *_ = row
        return width, warpgroups * WARPGROUP_ROWS, keys
    return row[0], 256, 128


def steps(runs, keys):
    """Steps over so many keys each that have a valid one."""
    count = covered = 0
    for start, end in runs:
        first, after = max(start // keys, covered), -(-end // keys)
        if start < end and first < after:
            count, covered = count + after - first, after
    return count


def groups(runs):
    """Groups that cover the runs of a batch row, from the left."""
    count = covered = 0
    for start, end in runs:
        start = max(start, covered)
        if start < end:
            made = -(-(end - start) // GROUP)
            count, covered = count + made, start + made * GROUP
    return count


def key_tiles(runs, keys):
    """(full tiles, groups of masked tiles) of a batch row, for tiles of so many keys."""
    full = groups = covered = 0
    for start, end in runs:
        start = max(start, covered)
        if start >= end:
            continue
        whole = (end - start) // keys
        rest = -(-(end - start - whole * keys) // GROUP)
        full, groups = full + whole, groups + rest
        covered = start + whole * keys + rest * GROUP
    return full, groups


def features(workload):
    """What a model of the time may use. Lists have one entry a batch row."""
    query, key = workload.query, workload.key
    found = {
        "batch": workload.batch,
        "seq_q": query.seq,
        "seq_k": key.seq,
        "heads": workload.heads,
        "kv_heads": workload.kv_heads,
        "head_dim": workload.head_dim,
        "is_cross": workload.is_cross,
        "queries": query.lengths,
        "keys": key.lengths,
        "query_runs": [len(runs) for runs in query.runs],
        "key_runs": [len(runs) for runs in key.runs],
        "query_groups": [groups(runs) for runs in query.runs],
        "key_groups": [groups(runs) for runs in key.runs],
        "tiles": {},
    }
    for kernel in ["sm80", "sm90", "sm100"]:
        for name, sizes in tiles_of(kernel, workload.head_dim).items():
            found["tiles"][name] = cut(sizes, key.runs)
    return found


def tiles_of(kernel, head_dim):
    """(width, query rows, keys) of all tiles among which a kernel chooses for a head dimension, by name:
    the kernel's, and for tiles that are shorter than the longest one the kernel's and their keys."""
    longest = tile(kernel, head_dim)
    if longest is None:
        return {}
    found = {kernel: longest}
    if kernel == "sm90":
        for width, warpgroups, keys, *_ in table(kernel, "short_tiles.h"):
            if width == longest[0]:
                found[f"{kernel} {keys}"] = width, warpgroups * WARPGROUP_ROWS, keys
    return found


def cut(sizes, key_runs):
    """Tiles of these sizes, and how many of keys each batch row has."""
    width, rows, keys = sizes
    full_and_groups = [key_tiles(runs, keys) for runs in key_runs]
    return {
        "width": width,
        "rows": rows,
        "keys": keys,
        "full_key_tiles": [full for full, _ in full_and_groups],
        "masked_key_groups": [groups for _, groups in full_and_groups],
    }
