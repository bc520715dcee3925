"""Tables of the ratio controller: control.json."""

from __future__ import annotations

import statistics
from typing import Any

from perf.benchmarks_page.markdown import percent, table
from perf.benchmarks_page.result import Result, against_target

CONTROLLER = "controller"
NAMES = {"square": "square wave"}
Point = dict[str, Any]


def goodput() -> str:
    """Return a row for each setting of each traffic: means over the repeats."""
    points: list[Point] = Result("control").results["points"]
    rows = []
    for traffic in dict.fromkeys(point["traffic"] for point in points):
        mine = [point for point in points if point["traffic"] == traffic]
        for setting in dict.fromkeys(point["setting"] for point in mine):
            some = [point for point in mine if point["setting"] == setting]
            rows.append((NAMES.get(traffic, traffic), *_row(setting, some)))
    head = ("traffic", "ratio", "good", "least and most", "expired", "late", "failed", "changes")
    return table(head, rows)


def _row(setting: str, points: list[Point]) -> tuple[str, ...]:
    good = [point["good"] for point in points]
    ours = setting == CONTROLLER
    return (
        f"**{setting}**" if ours else setting,
        percent(statistics.fmean(good)),
        f"{percent(min(good))} to {percent(max(good))}",
        percent(statistics.fmean(point["expired"] for point in points)),
        percent(statistics.fmean(point["late"] for point in points)),
        str(sum(point["failed"] for point in points)),
        str(sum(len(point["changes"]) for point in points)) if ours else "-",
    )


def targets() -> str:
    found = Result("control").budgets()
    return against_target([(one.what.strip(), one) for one in found])
