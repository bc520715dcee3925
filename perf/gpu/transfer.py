"""Part `transfer`: KV caches from one process to another, by the package's own two ends.

Over CUDA IPC on a GPU, over shared memory on a CPU; in both cases against copies within the device,
against blocks with a handshake before each, and against NIXL. The bytes of every way are compared
with those that were sent, outside the measured time.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping

from msgspec import Struct

from pdserve.errors import InstanceError
from perf.budgets import Budget
from perf.gpu.outcome import Outcome, Rows
from perf.gpu.place import Place
from perf.gpu.scale import Scale
from perf.gpu.transfer_bench import Bench, Way
from perf.transfer.layouts import LAYOUTS
from perf.transfer.raw import PACKAGES

MEASURED = ("Llama-3-8B", "70B, 1 of 8 ranks")
LARGE_MIB = 64
"""KV caches from this size on have targets, as rates of the copy within the device."""
PULL, SCATTER = 0.8, 0.7
WHOLE_MS = 1.0
"""Target for `WHOLE_TOKENS` tokens of an 8B model, 512 MiB, from one process's arena to the other's
pool."""
WHOLE_TOKENS = 4096


class Point(Struct):
    """One KV cache into a pool whose blocks are in random order; medians in milliseconds."""

    layout: str
    tokens: int
    mib: float
    ways: dict[str, float]


def run(outcome: Outcome, scale: Scale, *, measure: bool = True) -> None:
    """Move KV caches of all sizes by all ways.

    NIXL comes last, with holders of its own: a fault of it costs no other result.

    Args:
        measure: False: each way once, for its bytes only.
    """
    place, name = Place(scale), "shm" if scale.gpu is None else "cuda_ipc"
    if scale.gpu is None:
        outcome.not_shown("CUDA IPC between processes: there is no GPU; shared memory instead")
    names = [name]
    if any(importlib.util.find_spec(package) for package in PACKAGES):
        names.append("nixl")
    else:
        outcome.not_shown("NIXL: it is not installed")
    points: dict[tuple[str, int], Point] = {}
    for one, layout in itertools.product(names, MEASURED):
        try:
            _layout(outcome, scale, place, one, layout, points, measure)
        except (InstanceError, OSError, EOFError) as error:
            if one == name:
                raise
            outcome.not_shown(f"NIXL, {layout}: {error!r:.300}")
    if measure:
        for budget in targets(list(points.values()), scale.gpu is not None):
            outcome.target(budget)


def _layout(
    outcome: Outcome,
    scale: Scale,
    place: Place,
    name: str,
    layout: str,
    points: dict[tuple[str, int], Point],
    measure: bool,
) -> None:
    """Move KV caches of one layout over one transport."""
    sizes = scale.transfers
    bench = Bench(place, name, layout, max(sizes.tokens))
    try:
        outcome.data(f"connecting over {name}, ms: {layout}", round(bench.connect(name), 1))
        for tokens in sizes.tokens:
            mib = round(LAYOUTS[layout].nbytes(tokens) / 2**20, 1)
            point = points.setdefault((layout, tokens), Point(layout, tokens, mib, {}))
            ways = bench.ways(name, tokens, sizes.handshakes)
            if name == "nixl":
                ways = {f"NIXL: {way}": one for way, one in ways.items() if not one.slow}
                ways["NIXL alone: pull"] = bench.raw(tokens)
            else:
                ways = bench.local(tokens) | ways
            wrong = _measure(point, ways, place, sizes.repeats if measure else 0)
            outcome.check(f"{name}: bytes of {layout}, {tokens} tokens, {len(ways)} ways", wrong)
            outcome.table(table(list(points.values())))
    finally:
        bench.close()


def _measure(point: Point, ways: Mapping[str, Way], place: Place, repeats: int) -> list[str]:
    """Measure each way; return those whose bytes are wrong, or that failed.

    Args:
        repeats: 0: nothing is measured.
    """
    wrong = []
    for name, way in ways.items():
        try:
            way.work()
            place.sync()
            if way.right is not None and not way.right():
                wrong.append(f"{name}: other bytes than were sent")
            elif repeats and name == "copy":
                point.ways[name] = round(place.device_ms(way.work, repeats), 4)
            elif repeats:
                point.ways[name] = round(place.ms(way.work, 1 if way.slow else repeats), 4)
        except (InstanceError, RuntimeError, TimeoutError) as error:
            wrong.append(f"{name}: {error!r:.300}")
    return wrong


def table(points: list[Point]) -> Rows:
    """Return all points, in milliseconds and as shares of the rate of the copy."""
    names = list(dict.fromkeys(name for point in points for name in point.ways))
    rows = []
    for point in points:
        copy = point.ways.get("copy", 0.0)
        cells = []
        for name in names:
            taken = point.ways.get(name)
            cells.append("-" if taken is None else f"{taken:.3f} ({copy / taken:.0%})")
        rows.append([point.layout, f"{point.tokens}", f"{point.mib:g}", *cells])
    title = "KV caches between two processes: ms (share of the rate of a copy within the device)"
    return Rows(title, ["layout", "tokens", "MiB", *names], rows)


def targets(points: list[Point], gpu: bool) -> list[Budget]:
    """Return the targets; on a CPU the same values, without limits."""
    large = [point for point in points if point.mib >= LARGE_MIB]
    made = []
    for name, limit in (("pull", PULL), ("fused scatter", SCATTER)):
        rates = [(p.ways["copy"] / p.ways[name], p.mib) for p in large if name in p.ways]
        if rates:
            worst, mib = min(rates)
            what = f"{name} from {LARGE_MIB} MiB on, share of the copy's rate, worst ({mib:g} MiB)"
            bound = limit if gpu else None
            made.append(Budget(what, round(worst, 3), "", "at least", bound))
    whole = [p for p in points if (p.layout, p.tokens) == (MEASURED[0], WHOLE_TOKENS)]
    for name in ("handed over", "pull, then scatter"):
        made += [
            Budget(f"{point.mib:g} MiB {name}", point.ways[name], "ms", "at most", WHOLE_MS)
            for point in whole
            if name in point.ways
        ]
    for other in ("a handshake per block", "NIXL: handed over"):
        ratios = [p.ways["handed over"] / p.ways[other] for p in points if other in p.ways]
        if ratios:
            what = f"handed over, of the time of {other}, worst"
            made.append(Budget(what, round(max(ratios), 3), "x", "at most", None))
    return made
