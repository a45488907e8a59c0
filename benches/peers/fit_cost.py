"""Fits the constants of the cost model (src/call/chips.rs) to what regret.py measured on a GPU, prints
them as rows of its tables, and tells the regret of the model's choices on calls that it was not
fitted to.

    pip install numpy
    python benches/peers/fit_cost.py regret-1.jsonl regret-2.jsonl [--write]

Half of the calls, those of even number, are fitted first; the regret is that on the others. The
rows that are printed are fitted to all. Constants that no call depends on keep their values. After
`--write`, a unit test needs its cases anew:

    python benches/peers/fit_cost.py regret-1.jsonl --cases src/call/cost_cases.json
"""

import argparse
import dataclasses
import json
import math
import pathlib
import re

import numpy

from cost_model import CHIPS, NAMES, WGSL, Work, constants
from kernel_tiles import cut, steps, tile, tiles_of


# Differences of logarithms beyond this count by their absolute value.
OUTLIER = 0.08
# Runs of a case that a unit test reads, and cases.
MOST_RUNS, MOST_CASES = 30, 60
# What a constant costs that is e times as large as in the tables, or an e-th: so that those on which
# few calls depend stay near.
DRIFT = 0.01
# By how much a logarithm moves where a slope is measured; and the damping that means that nothing helps.
NUDGE, MOST_DAMPING = 0.02, 1e4
# Constants that are parts of 1.
SHARES = {"alone", "rows_idle", "lists_idle"}
PORTABLE = NAMES["WgslPortable"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=pathlib.Path, nargs="+", help="what regret.py wrote")
    parser.add_argument("--compute-capability", default="9.0", help="0.0 is any GPU through wgpu")
    parser.add_argument("--multiprocessors", type=int, help="of the machine that measured, if the file does not tell")
    parser.add_argument("--passes", type=int, default=12, help="over all constants")
    parser.add_argument("--no-fit", action="store_true", help="judge the constants of the tables as they are")
    parser.add_argument("--worst", type=int, default=10, help="calls to print")
    parser.add_argument("--cases", type=pathlib.Path, help="write the estimates of some small calls, for a unit test, and end")
    parser.add_argument("--write", action="store_true", help="write the fitted constants to the tables")
    return parser.parse_args()


@dataclasses.dataclass
class Sample:
    """One choice for one call, and its milliseconds."""

    work: Work
    ms: float
    weight: float
    multiprocessors: int


@dataclasses.dataclass
class Call:
    number: int
    title: str
    chosen: str
    samples: dict
    # Milliseconds of the quickest path and kernel, also of one that the plan may not take.
    best_ms: float


def is_all_valid(features):
    tokens = [features["batch"] * features["seq_q"], features["batch"] * features["seq_k"]]
    return [sum(features["queries"]), sum(features["keys"])] == tokens


def read(files, multiprocessors):
    """The calls of all files, and the library's estimates as (call, choice, milliseconds)."""
    calls, estimates = [], []
    for file in files:
        on, is_packed = multiprocessors, False
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            if "facts" in entry:
                is_packed = entry["facts"].get("rows") == "packed"
                on = on or entry["facts"].get("multiprocessors")
                continue
            features = {**entry["features"], "runs": entry["query_runs"]}
            # The plan takes the dense path where every token is valid, and nowhere else.
            paths = ["dense"] if is_all_valid(features) else ["fused", "packed"]
            if is_packed:
                paths = ["rows"]
            elif WGSL & features["tiles"].keys() and not is_all_valid(features):
                paths.append("dense")
            times = {name: found["median_ms"] for name, found in entry["times"].items() if name.split(" by ")[0] in paths}
            best = min(times.values())
            every = (found["median_ms"] for name, found in entry["times"].items() if name.split(" by ")[0] in ("dense", "fused", "packed", "rows"))
            samples = {}
            for name, ms in times.items():
                path, _, kernel = name.partition(" by ")
                keys = entry.get("tile_keys", {}).get(name)
                if f"{kernel} {keys}" in features["tiles"]:
                    kernel = f"{kernel} {keys}"
                # Choices that are far from the best need not be known as well.
                weight = min(1.0, 1.5 * best / ms) ** 2
                samples[name] = Sample(Work.of(features, path, kernel, on or 132), ms, weight, on or 132)
            call = Call(entry["number"], entry["title"], entry.get("chosen", ""), samples, min(every))
            calls.append(call)
            if told := re.search(r"\(about ([\d.]+) µs", entry.get("plan") or ""):
                estimates.append((call, entry["chosen"], float(told.group(1)) / 1e3))
    return calls, estimates


def logarithms(samples, chip, tiles):
    """Of estimates over times."""
    return numpy.array([math.log(found.work.time(chip, tiles, found.multiprocessors) / 1e6 / found.ms) for found in samples])


def fit(calls, chip, tiles, passes):
    """Least squares of the logarithms, by Gauss and Newton with damping: constants are moved by
    factors."""
    chip, tiles = dataclasses.replace(chip), {of: dataclasses.replace(cost) for of, cost in tiles.items()}
    samples = [sample for call in calls for sample in call.samples.values()]
    by_tile = {}
    for at, sample in enumerate(samples):
        by_tile.setdefault((sample.work.kernel, sample.work.width, sample.work.keys), []).append(at)
    # (object, field, samples that depend on it)
    found = [(chip, range(len(samples))), *((tiles[of], at) for of, at in by_tile.items())]
    fitted = [(of, field.name, at) for of, at in found for field in dataclasses.fields(of) if getattr(of, field.name) > 0]
    weights = numpy.array([sample.weight for sample in samples])
    start = now = numpy.array([math.log(getattr(of, name)) for of, name, _ in fitted])

    def judged(values):
        for (of, name, _), value in zip(fitted, values):
            setattr(of, name, math.exp(value))
        offs = logarithms(samples, chip, tiles)
        size = abs(offs)
        each = numpy.where(size < OUTLIER, size**2, OUTLIER * (2 * size - OUTLIER))
        return offs, (weights * each).sum() + DRIFT * ((values - start) ** 2).sum()

    offs, least = judged(now)
    damping = 1e-3
    for _ in range(passes):
        slopes = numpy.zeros((len(samples), len(fitted)))
        for column, (of, name, at) in enumerate(fitted):
            value = getattr(of, name)
            setattr(of, name, value * math.exp(NUDGE))
            slopes[at, column] = (logarithms([samples[i] for i in at], chip, tiles) - offs[at]) / NUDGE
            setattr(of, name, value)
        pull = weights * numpy.minimum(1.0, OUTLIER / numpy.maximum(abs(offs), 1e-9))
        square = slopes.T @ (pull[:, None] * slopes) + DRIFT * numpy.eye(len(fitted))
        slope = slopes.T @ (pull * offs) + DRIFT * (now - start)
        while damping < MOST_DAMPING:
            step = -numpy.linalg.solve(square + damping * numpy.diag(numpy.diag(square)), slope)
            tried = now + step.clip(-0.5, 0.5)
            for column, (_, name, _) in enumerate(fitted):
                if name in SHARES:
                    tried[column] = min(tried[column], 0.0)
            found_offs, total = judged(tried)
            if total < least:
                damping = max(damping / 5, 1e-5)
                break
            damping *= 5
        else:
            judged(now)
            break
        gain, now, offs, least = least - total, tried, found_offs, total
        if gain < 1e-4 * least:
            break
    return chip, tiles


def takes_dense(dense, fused, tiles):
    """Whether the plan may take the dense path: that of metadata only if it is no more work."""
    return fused is None or dense.work(tiles) <= fused.work(tiles)


def may_take(call, name, tiles):
    """Whether the plan may take a choice."""
    path, _, kernel = name.partition(" by ")
    fused = call.samples.get(f"fused by {kernel}")
    return path != "dense" or takes_dense(call.samples[name].work, fused and fused.work, tiles)


def judge(title, calls, chip, tiles, worst):
    """Prints how well the model predicts, and the regret of its choices and of those measured."""
    offs, regrets, planned = [], [], []
    for call in calls:
        guess = {name: s.work.time(chip, tiles, s.multiprocessors) / 1e6 for name, s in call.samples.items()}
        offs += [abs(math.log(guess[name] / sample.ms)) for name, sample in call.samples.items()]
        best = call.best_ms
        # As the plan compares them.
        order = {name: guess[name] * call.samples[name].work.lead(chip) for name in guess if may_take(call, name, tiles)}
        choice = min(order, key=order.get)
        regrets.append((call.samples[choice].ms / best, choice, guess, call))
        if call.chosen in call.samples:
            planned.append(call.samples[call.chosen].ms / best)
    offs.sort()
    print(f"{title}: {len(calls)} calls; model off by {offs[len(offs) // 2]:.1%} at the median, {offs[len(offs) * 9 // 10]:.1%} at 90 %")
    for name, found in [("the model's choice", [regret for regret, *_ in regrets]), ("the measured plan", planned)]:
        if found := sorted(found):
            at = [found[min(len(found) - 1, math.ceil(part * len(found)) - 1)] for part in (0.5, 0.9, 0.95, 1)]
            print(f"  regret of {name:18}: median {at[0]:.3f}, 90 % {at[1]:.3f}, 95 % {at[2]:.3f}, worst {at[3]:.3f}; over 1.03: {sum(regret > 1.03 for regret in found)}, over 1.10: {sum(regret > 1.1 for regret in found)}")
    for regret, choice, guess, call in sorted(regrets, key=lambda found: -found[0])[:worst]:
        if regret > 1.0:
            times = ", ".join(f"{name} {sample.ms:.4f} ({guess[name]:.4f})" for name, sample in call.samples.items())
            print(f"    {regret:.3f}  {call.title}; {choice}; ms (model): {times}")


def rows(chip, tiles):
    """The constants, as chips.rs has them."""
    lines = [f"{field.name}: {getattr(chip, field.name):.{1 if getattr(chip, field.name) > 10 else 3}f}," for field in dataclasses.fields(chip)]
    kernels = {name: kernel for kernel, name in NAMES.items()}
    for (kernel, width, keys), cost in tiles.items():
        values = [f"{getattr(cost, field.name):.{2 if field.name in ('alone', 'dropped') else 1}f}" for field in dataclasses.fields(cost)]
        lines.append(f"(Kernel::{kernels[kernel]}, {width}, {keys}, tile([{', '.join(values)}])),")
    return lines


def write(chip, tiles, compute_capability):
    text = CHIPS.read_text()
    major, minor = compute_capability
    start = text.index(f"compute_capability: ({major}, {minor}),")
    end = text.index("source:", start)
    row = text[start:end]
    for line in rows(chip, tiles):
        name = line.split(":")[0]
        if line.startswith("(Kernel"):
            which = re.match(r"\(Kernel::\w+, \d+, \d+", line).group(0)
            text = re.sub(re.escape(which) + r", tile\(\[[^\]]*\]\)\),", lambda _: line, text)
        else:
            text = text.replace(row, changed := re.sub(rf"\b{name}: [\d.e]+,", line, row))
            row = changed
    CHIPS.write_text(text)


def portable_features(features, key_runs):
    """The same call with the tiles of `wgsl-portable`. None for head dimensions without costs."""
    sizes = tile(PORTABLE, features["head_dim"])
    if sizes is None:
        return None
    width, rows, keys = sizes
    found = {"width": width, "rows": rows, "keys": keys, "key_steps": [steps(runs, keys) for runs in key_runs]}
    return {**features, "tiles": {PORTABLE: found}}


def write_cases(file, files, multiprocessors, chip, tiles):
    """The estimates of calls with few runs, of every kernel and path, those of `wgsl-portable` too."""
    adapter_chip, adapter_tiles = constants((0, 0))
    cases = []
    for line in (line for found in files for line in found.read_text().splitlines()):
        entry = json.loads(line)
        if "facts" in entry or sum(map(len, entry["query_runs"] + entry["key_runs"])) > MOST_RUNS:
            continue
        features = {**entry["features"], "runs": entry["query_runs"]}
        paths = ["dense"] if is_all_valid(features) else ["fused", "packed"]
        times = {}
        for path in paths:
            for kernel in ("sm80", "sm90"):
                # A kernel takes the tiles that take it the least time.
                estimates = []
                for name, sizes in tiles_of(kernel, features["head_dim"]).items():
                    features["tiles"].setdefault(name, cut(sizes, entry["key_runs"]))
                    if (kernel, sizes[0], sizes[2]) in tiles:
                        work = Work.of(features, path, name, multiprocessors)
                        estimates.append(work.time(chip, tiles, multiprocessors))
                if estimates:
                    times[f"{path} by {kernel}"] = round(min(estimates), 3)
        if portable := portable_features(features, entry["key_runs"]):
            works = {path: Work.of(portable, path, PORTABLE, multiprocessors) for path in {*paths, "dense"}}
            if not takes_dense(works["dense"], works.get("fused"), adapter_tiles):
                del works["dense"]
            for path, work in sorted(works.items()):
                times[f"{path} by {PORTABLE}"] = round(work.time(adapter_chip, adapter_tiles, multiprocessors), 3)
        names = ["seq_q", "seq_k", "heads", "kv_heads", "head_dim", "is_cross"]
        runs = {name: entry[name] for name in ["query_runs", "key_runs"]}
        cases.append({**{name: features[name] for name in names}, **runs, "times": times})
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases[:MOST_CASES])
    file.write_text(f"[\n{lines}\n]\n")


def main():
    options = arguments()
    compute_capability = tuple(map(int, options.compute_capability.split(".")))
    chip, tiles = constants(compute_capability)
    if options.cases:
        return write_cases(options.cases, options.files, options.multiprocessors or 132, chip, tiles)
    calls, estimates = read(options.files, options.multiprocessors)
    differing = 0
    for call, choice, ms in estimates:
        sample = call.samples.get(choice)
        guess = sample and sample.work.time(chip, tiles, sample.multiprocessors) / 1e6
        differing += bool(guess and abs(guess - ms) > 0.002 * ms + 2e-4)
    if differing:
        print(f"{differing} of the library's {len(estimates)} estimates are not those of these tables: it was built with others")
    judge("the tables' constants", calls, chip, tiles, options.worst)
    if options.no_fit:
        return
    even, odd = ([call for call in calls if call.number % 2 == part] for part in (0, 1))
    if even and odd:
        judge("fitted to the even calls, judged by the odd", odd, *fit(even, chip, tiles, options.passes), options.worst)
    fitted = fit(calls, chip, tiles, options.passes)
    judge("fitted to all", calls, *fitted, options.worst)
    print("\n".join(rows(*fitted)))
    if options.write:
        write(*fitted, compute_capability)


if __name__ == "__main__":
    main()
