"""A report of the points: a table, the targets, comparisons, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct
from rich.table import Table

from perf.budgets import Budget
from perf.transfer.measuring import Point

LARGE_MIB = 16
# Block sizes of real paged pools, which the paper's comparison uses.
POOL_BLOCKS = (16, 32)
TUNED = 1.10


def table(points: Sequence[Point]) -> Table:
    """Return a table of all points, in milliseconds."""
    columns = ("link", "layout", "MiB", "block", "memcpy", "pull", "raw", "scatter")
    made = Table(*columns, "one run", "whole", "direct", "chosen", "per block", "spanning", "saved")
    for p in points:
        times = (p.memcpy, p.pull, p.raw, p.scatter, p.one_run, p.ways["whole"])
        made.add_row(
            p.link,
            p.layout,
            f"{p.mib:g}",
            str(p.block),
            *map(_ms, times),
            _ms(p.ways.get("direct")),
            p.chosen,
            _ms(p.per_block),
            _ms(p.spanning),
            "-" if p.per_block is None else f"{_saved(p):.0%}",
        )
    return made


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _saved(point: Point) -> float:
    assert point.per_block is not None
    return 1 - point.ways["whole"] / point.per_block


def regret(point: Point) -> float:
    """Return the time of the strategy that the cost model chose, divided by that of the best."""
    return point.ways[point.chosen] / min(point.ways.values())


class Comparison(Struct):
    """A ratio or percentage at each of many points, and its target for all of them."""

    what: str
    values: list[float]
    unit: Literal["x", "%"]
    limit: float
    promised: bool = True
    """True: the limit is a target; False: it only serves to count the points within it."""

    @property
    def bound(self) -> Literal["at most", "at least"]:
        """Return the kind of bound: ratios should be small, percentages large."""
        return "at most" if self.unit == "x" else "at least"

    @property
    def worst(self) -> float:
        return max(self.values) if self.unit == "x" else min(self.values)

    @property
    def within(self) -> float:
        """Return the percent of the points that are within the limit."""
        kept = [v <= self.limit if self.unit == "x" else v >= self.limit for v in self.values]
        return 100 * sum(kept) / len(kept)


def comparisons(points: Sequence[Point]) -> list[Comparison]:
    """Return all comparisons; those without measured points are left out."""
    large = [p for p in points if p.mib >= LARGE_MIB * 0.9]
    mapped = [p for p in large if p.link == "shm"]
    pulls = [_over(p, p.pull, 2.0) for p in large if p.link == "cma" and p.pull]
    copies = "time, of 1.25 memcpy + 1 ms"
    made = [
        Comparison(
            f"shm, blocks in a row: {copies}", [_over(p, p.one_run, 1.0) for p in mapped], "x", 1.0
        ),
        Comparison(
            f"shm, blocks in random order: {copies}",
            [_over(p, p.ways["whole"], 1.0) for p in mapped],
            "x",
            1.0,
        ),
        Comparison("cma, pull: time, of 1.25 memcpy + 2 ms", pulls, "x", 1.0),
    ]
    for link in dict.fromkeys(p.link for p in large if p.raw):
        raw = [(p.pull, p.raw, p.raw_again) for p in large if p.link == link]
        ours = [pull / raw for pull, raw, _ in raw if pull and raw]
        again = [again / raw for _, raw, again in raw if raw and again]
        made += [
            Comparison(f"{link}, pull: time, of raw NIXL's", ours, "x", 1.05),
            Comparison(f"{link}, raw NIXL again: time, of the first", again, "x", 1.05, False),
        ]
    for link in dict.fromkeys(p.link for p in points):
        saved = [
            100 * _saved(p)
            for p in points
            if p.link == link and p.block in POOL_BLOCKS and p.per_block is not None
        ]
        made.append(
            Comparison(f"{link}: time saved against a handshake for each block", saved, "%", 46)
        )
    return [one for one in made if one.values]


def limits(points: Sequence[Point]) -> list[Budget]:
    """Return the targets, each with its worst point, and how often the cost model chose well."""
    made = []
    for one in comparisons(points):
        middle = f"  median {statistics.median(one.values):.3g} {one.unit}; within {one.limit:g}"
        limit = one.limit if one.promised else None
        made += [
            Budget(one.what, round(one.worst, 3), one.unit, one.bound, limit),
            Budget(middle, round(one.within, 1), f"% of {len(one.values)}", "at least", None),
        ]
    choices = [p for p in points if len(p.ways) > 1]
    if choices:
        good = 100 * sum(regret(p) <= TUNED for p in choices) / len(choices)
        what = f"cost model within 10 % of the best, of {len(choices)} points"
        made.append(Budget(what, round(good, 1), "%", "at least", 90))
    return made


def _over(point: Point, taken: float, extra_ms: float) -> float:
    """Return the time divided by 1.25 copies and a constant: 1 is just within."""
    return taken / (1.25 * point.memcpy + extra_ms)


def remarks(points: Sequence[Point]) -> Table:
    """Return a table of the comparisons without a target: won or lost."""
    made = Table("link", "whole against direct", "whole against blocks that span all layers")
    for link in dict.fromkeys(p.link for p in points):
        mine = [p for p in points if p.link == link]
        directs = [p.ways["whole"] / p.ways["direct"] for p in mine if "direct" in p.ways]
        made.add_row(link, _won(directs), _won([p.ways["whole"] / p.spanning for p in mine]))
    return made


def _won(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    won = sum(ratio < 1 for ratio in ratios)
    middle = statistics.median(ratios)
    return (
        f"{won} of {len(ratios)} won; {min(ratios):.2f} to {max(ratios):.2f} x, median {middle:.2f}"
    )


def plot(points: Sequence[Point], path: Path) -> Path:
    """Plot times over memcpy, by size; a row for each link, a column for each layout."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    links = list(dict.fromkeys(p.link for p in points))
    layouts = list(dict.fromkeys(p.layout for p in points))
    size = (4 * len(layouts), 2.6 * len(links))
    figure, axes = plt.subplots(len(links), len(layouts), squeeze=False, figsize=size)
    for row, link in zip(axes, links, strict=True):
        for axis, layout in zip(row, layouts, strict=True):
            mine = [p for p in points if (p.link, p.layout, p.block) == (link, layout, 16)]
            sizes = [p.mib for p in mine]
            for name, style, values in (
                ("whole", "o-", [p.ways["whole"] for p in mine]),
                ("direct", "s--", [p.ways.get("direct") for p in mine]),
                ("handshake per block", "x:", [p.per_block for p in mine]),
                ("blocks of all layers", "+:", [p.spanning for p in mine]),
            ):
                ratios = [
                    value / p.memcpy if value else float("nan")
                    for value, p in zip(values, mine, strict=True)
                ]
                axis.plot(sizes, ratios, style, label=name)
            axis.set(xscale="log", yscale="log", title=f"{link}: {layout}")
            axis.title.set_fontsize(9)
            axis.grid(visible=True, which="major", alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("MiB")
    for row in axes:
        row[0].set_ylabel("time / memcpy")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle("KV hand-off in blocks of 16 tokens, in random order")
    figure.legend(handles, labels, loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    figure.savefig(path, dpi=110)
    return path
