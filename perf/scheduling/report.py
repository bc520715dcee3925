"""A report of the points: a table, the targets, a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from perf.answers import Percentiles
from perf.budgets import Budget
from perf.scheduling.loads import MANY_GATEWAYS, POISSON, TIDES, TRACES, USERS
from perf.scheduling.points import IDLE_S, Point, between, crossing
from perf.scheduling.servers import GATEWAYS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, OLD = "on_demand", "fewest_streams"
IDEALS = ("ideal", "ideal by limit")
OLD_SHARE = 0.57
"""Share of the paper's own old version within the limit at its highest load, and by how many
percentage points the new one is ahead there: figure 14a."""
PAPER_AHEAD = 42.3


def table(points: Sequence[Point]) -> Table:
    """Return a table: times in milliseconds, offers per request, rejections per accepted offer."""
    columns = ("load", "", "policy", "layout", "requests", "good", "good/s", "kept")
    times = ("TTFT p50", "p99", "short p50", "p99")
    made = Table(*columns, *times, "offers", "rejected", "idle")
    last = None
    for p in sorted(points, key=lambda p: _order(points, p)):
        if (p.part, p.level) != last and last is not None:
            made.add_section()
        last = p.part, p.level
        made.add_row(
            p.part,
            str(p.level),
            p.policy,
            p.layout,
            str(p.requests),
            f"{p.good:.1%}",
            f"{p.good_per_s:.1f}",
            f"{p.kept:.1%}",
            *_middle_and_tail(p.ttft_ms),
            *_middle_and_tail(p.short_ttft_ms),
            *(f"{value:.2f}" if value is not None else "-" for value in (p.offers, p.rejections)),
            f"{p.idle_ms:.0f}",
        )
    return made


def _middle_and_tail(times: Percentiles | None) -> tuple[str, str]:
    return (f"{times.p50:.0f}", f"{times.p99:.0f}") if times else ("-", "-")


def _order(points: Sequence[Point], point: Point) -> tuple[int, int]:
    parts = list(dict.fromkeys(p.part for p in points))
    return parts.index(point.part), point.level


def _of(points: Sequence[Point], part: str, policy: str, layout: str = "pool") -> list[Point]:
    return [p for p in points if (p.part, p.policy, p.layout) == (part, policy, layout)]


def limits(points: Sequence[Point]) -> list[Budget]:
    """Return the targets, and comparisons without one, of the parts that were measured."""
    failed = sum(p.failed for p in points)
    return [
        *_poisson(points),
        *_users(points),
        *_traces(points),
        *_tides(points),
        *_gateways(points),
        Budget("errors that are no refusals", failed, "requests", "at most", 0),
    ]


def _poisson(points: Sequence[Point]) -> Iterator[Budget]:
    ours = _of(points, POISSON, OURS)
    if not ours:
        return
    for mine, best in zip(ours, _of(points, POISSON, "ideal"), strict=True):
        ratio = round(mine.good / best.good, 3)
        yield Budget(f"{mine.level} %: within limit, of the ideal", ratio, "x", "at least", 0.97)
    kept = round(100 * min(p.kept for p in ours), 2)
    yield Budget("accepted and within limit, worst load", kept, "%", "at least", 99)
    what = f"refused while a prefill was idle for {IDLE_S * 1e3:g} ms"
    yield Budget(what, sum(p.idle for p in ours), "requests", "at most", 0)


def _users(points: Sequence[Point]) -> Iterator[Budget]:
    def levels(policy: str) -> list[tuple[float, float]]:
        return [(p.level, p.good) for p in _of(points, USERS, policy)]

    users = crossing(levels(OLD), OLD_SHARE)
    if users is None:
        return
    yield Budget(f"users at which {OLD} has {OLD_SHARE:.0%}", round(users, 1), "", "at least", None)
    for policy in (OURS, *IDEALS):
        ahead = round(100 * (between(levels(policy), users) - OLD_SHARE), 1)
        paper = PAPER_AHEAD if policy == OURS else None
        yield Budget(f"there, {policy} is ahead by", ahead, "points", "at least", None, paper)


def _traces(points: Sequence[Point]) -> Iterator[Budget]:
    for name in TRACES:
        ours = _of(points, name, OURS)
        for other in ("round_robin", "shortest_queue"):
            for mine, theirs in zip(ours, _of(points, name, other), strict=False):
                assert mine.short_ttft_ms is not None
                assert theirs.short_ttft_ms is not None
                ratio = round(theirs.short_ttft_ms.p99 / mine.short_ttft_ms.p99, 2)
                what = f"{name}: {other}, TTFT p99 of short prompts, by ours"
                yield Budget(what, ratio, "x", "at least", 2)


def _tides(points: Sequence[Point]) -> Iterator[Budget]:
    for part in TIDES:
        if not _of(points, part, OURS):
            continue
        for policy in (OURS, "ideal"):
            pool, groups = (_of(points, part, policy, layout) for layout in ("pool", "groups"))
            ahead = round(100 * (groups[0].good - pool[0].good), 1)
            what = f"{part}: {policy}, groups ahead of one pool"
            yield Budget(what, ahead, "points", "at least", None)
        for layout in ("pool", "groups"):
            spread = _of(points, part, OURS, layout)[0].spread
            yield Budget(f"{part}: {layout}, T_p p90/p10", spread, "x", "at most", None)


def _gateways(points: Sequence[Point]) -> Iterator[Budget]:
    part, most = MANY_GATEWAYS, float(GATEWAYS)
    of_both = (_of(points, part, policy, "gateways") for policy in (OURS, "ideal"))
    for ours, best in zip(*of_both, strict=True):
        yield Budget(f"{part}: the worst, by the mean", ours.worst_gateway, "x", "at least", 0.95)
        yield Budget("  by chance alone (ideal)", best.worst_gateway, "x", "at least", None)
        ratio = round(ours.good / best.good, 3)
        yield Budget(f"{part}: within limit, of the ideal", ratio, "x", "at least", 0.97)
        assert ours.rejections is not None
        yield Budget(f"{part}: rejections for each accepted", ours.rejections, "", "at most", most)


def plot(points: Sequence[Point], path: Path) -> Path:
    """Plot loads and users as lines, traces and tides as bars."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, ((loads, users), (short, tides)) = plt.subplots(2, 2, figsize=(12, 9))
    policies = list(dict.fromkeys(p.policy for p in points))
    colours = {policy: f"C{number}" for number, policy in enumerate(policies)}
    for axis, part in ((loads, POISSON), (users, USERS)):
        for policy, colour in colours.items():
            mine = _of(points, part, policy)
            style = "--" if policy in IDEALS else "o-"
            levels, shares = [p.level for p in mine], [100 * p.good for p in mine]
            axis.plot(levels, shares, style, color=colour, label=policy)
        axis.set(ylabel="% within the TTFT limit", ylim=(0, 103))
        axis.grid(visible=True, alpha=0.3)
    loads.set(title="Poisson arrivals", xlabel="% of what the prefills can compute")
    loads.legend(fontsize=8)
    users.set(title="Constant users", xlabel="users")

    def bars(axis: Axes, some: Iterable[tuple[Point, float]]) -> None:
        shown = sorted(some, key=lambda one: (one[0].part, one[0].layout))
        names = [f"{p.part}: {p.layout}" for p, _ in shown]
        heights = [value for _, value in shown]
        axis.bar(range(len(shown)), heights, color=[colours[p.policy] for p, _ in shown])
        axis.set_xticks(range(len(shown)), names, rotation=45, ha="right", fontsize=7)

    bars(short, [(p, p.short_ttft_ms.p99) for p in points if p.part in TRACES and p.short_ttft_ms])
    short.set(title="Public traces: TTFT of short prompts", ylabel="p99, ms")
    bars(tides, [(p, 100 * p.good) for p in points if p.part in TIDES])
    tides.set(title="Two scenarios, by turns", ylabel="% within the TTFT limit", ylim=(0, 103))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path
