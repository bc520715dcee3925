"""A report of the points: a table, the targets, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from perf.answers import Percentiles
from perf.budgets import Budget
from perf.control import mixes, traffic
from perf.control.points import BIN_S, CONTROLLER, Point, back_s
from perf.control.traffic import SCALE, WINDOW_S

HOUR_S = 3600.0
BEFOREHAND = tuple(mixes.ratio(prefills) for prefills in (mixes.best(0), 4, mixes.best(1)))
"""Ratios that an operator would have chosen: the best of A, half of each role, the best of B."""


def table(points: Sequence[Point]) -> Table:
    """Return a table: times in milliseconds, CPU time as a number of cores."""
    columns = ("traffic", "setting", "repeat", "requests", "good", "good/s", "expired", "late")
    made = Table(*columns, "failed", "TTFT p50", "p99", "TPOT p50", "p99", "changes", "cores")
    last = None
    for p in points:
        if p.traffic != last and last is not None:
            made.add_section()
        last = p.traffic
        made.add_row(
            p.traffic,
            p.setting,
            str(p.repeat),
            str(p.requests),
            f"{p.good:.1%}",
            f"{p.good_per_s:.1f}",
            f"{p.expired:.1%}",
            f"{p.late:.1%}",
            str(p.failed),
            *_middle_and_tail(p.ttft_ms),
            *_middle_and_tail(p.tpot_ms),
            " ".join(change.ratio for change in p.changes) or "-",
            f"{p.used.servers:.2f}",
        )
    return made


def _middle_and_tail(times: Percentiles | None) -> tuple[str, str]:
    return (f"{times.p50:.0f}", f"{times.p99:.0f}") if times else ("-", "-")


def by_repeat(points: Sequence[Point], name: str) -> dict[str, list[Point]]:
    """Return the points of a traffic by their setting, in the order of the repeats."""
    found: dict[str, list[Point]] = {}
    for one in sorted(points, key=lambda one: one.repeat):
        if one.traffic == name:
            found.setdefault(one.setting, []).append(one)
    return found


def limits(points: Sequence[Point]) -> list[Budget]:
    """Return the targets of the traffics that were measured."""
    failed = sum(p.failed for p in points)
    return [
        *_stationary(by_repeat(points, "stationary")),
        *_tide(by_repeat(points, "tide")),
        *_step(by_repeat(points, "step")),
        *_square(by_repeat(points, "square")),
        Budget("failed requests", failed, "requests", "at most", 0),
    ]


def _stationary(found: dict[str, list[Point]]) -> Iterator[Budget]:
    fixed = {name: some for name, some in found.items() if name != CONTROLLER}
    if not fixed:
        return
    measured, predicted = _best(fixed), mixes.ratio(mixes.best(0.5))
    behind = 1 - _mean(fixed[predicted]) / _mean(fixed[measured])
    what = f"stationary: {predicted}, the best by equation (1), behind the best fixed one"
    yield Budget(what, round(100 * behind, 2), "%", "at most", 2)
    if ours := found.get(CONTROLLER):
        gains = _ratios(ours, fixed[measured])
        what = "stationary: goodput, of the best fixed ratio's"
        yield Budget(what, round(statistics.fmean(gains), 4), "x", "at least", 0.98)
        yield Budget("  in the worst repeat", round(min(gains), 4), "x", "at least", None)
        yield Budget("stationary: changes per scaled hour", _per_hour(ours), "", "at most", 2)


def _tide(found: dict[str, list[Point]]) -> Iterator[Budget]:
    ours = found.get(CONTROLLER)
    fixed = {name: some for name, some in found.items() if name != CONTROLLER}
    if not ours or not fixed:
        return
    best = _best(fixed)
    gains = _ratios(ours, fixed[best])
    what = f"tide: goodput, of the best fixed ratio's ({best})"
    yield Budget(what, round(statistics.fmean(gains), 4), "x", "at least", 1)
    yield from _margin("  lead, by the spread of the repeats", [gain - 1 for gain in gains])
    beforehand = {name: some for name, some in fixed.items() if name in BEFOREHAND}
    if beforehand:
        worst = min(beforehand, key=lambda name: _mean(beforehand[name]))
        gains = _ratios(ours, beforehand[worst])
        what = f"tide: goodput, of the worst chosen beforehand ({worst})"
        yield Budget(what, round(statistics.fmean(gains), 4), "x", "at least", 1.6)
        yield from _margin("  lead over 1.6, by the spread", [gain - 1.6 for gain in gains])
    yield Budget("tide: changes per scaled hour", _per_hour(ours), "", "at most", None)


def _step(found: dict[str, list[Point]]) -> Iterator[Budget]:
    came = traffic.STEP_SCALED_S / SCALE
    for name, some in found.items():
        took = max(back_s(one.bins, came) for one in some) / WINDOW_S
        bound = 2.0 if name == CONTROLLER else None
        what = f"step: {name}, back within the SLO, worst repeat"
        yield Budget(what, round(took, 2), "windows", "at most", bound)


def _square(found: dict[str, list[Point]]) -> Iterator[Budget]:
    if ours := found.get(CONTROLLER):
        changes = sum(len(one.changes) for one in ours)
        yield Budget("square wave: changes, all repeats", changes, "", "at most", 0)


def _mean(points: Sequence[Point]) -> float:
    return statistics.fmean(one.good for one in points)


def _best(fixed: dict[str, list[Point]]) -> str:
    return max(fixed, key=lambda name: _mean(fixed[name]))


def _ratios(ours: Sequence[Point], others: Sequence[Point]) -> list[float]:
    """Return the ratio of goodputs in each repeat, whose arrivals are the same."""
    return [one.good / other.good for one, other in zip(ours, others, strict=True)]


def _margin(what: str, leads: Sequence[float]) -> Iterator[Budget]:
    """Yield how many times the mean lead is the range of the leads; one repeat has none."""
    if len(leads) > 1:
        spread = max(max(leads) - min(leads), 1e-4)
        yield Budget(what, round(statistics.fmean(leads) / spread, 2), "x", "at least", 1)


def _per_hour(points: Sequence[Point]) -> float:
    """Return the changes in an hour of the controller's clock."""
    scaled_s = sum(len(one.bins) * BIN_S * SCALE for one in points)
    return round(sum(len(one.changes) for one in points) / scaled_s * HOUR_S, 2)


def plot(points: Sequence[Point], path: Path) -> Path:
    """Plot the share of good requests over time, of the first repeat of each traffic."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    names = list(dict.fromkeys(p.traffic for p in points))
    figure, axes = plt.subplots(len(names), 1, figsize=(11, 3.2 * len(names)), squeeze=False)
    for (axis,), name in zip(axes, names, strict=True):
        for setting, (first, *_) in by_repeat(points, name).items():
            at = [(place + 0.5) * BIN_S * SCALE / 60 for place in range(len(first.bins))]
            ours = setting == CONTROLLER
            width, colour = (2.4, "black") if ours else (1.0, None)
            shares = [100 * share for share in first.bins]
            axis.plot(at, shares, linewidth=width, color=colour, label=setting)
            for change in first.changes:
                axis.axvline(change.at_s * SCALE / 60, color="grey", linestyle=":")
                axis.text(change.at_s * SCALE / 60, 102, change.ratio, fontsize=7)
        axis.set(title=name, xlabel="minutes by the controller's clock", ylim=(0, 110))
        axis.set_ylabel("% within the limits")
        axis.legend(fontsize=7, ncols=6, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path
