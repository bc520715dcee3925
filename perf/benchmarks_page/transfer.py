"""Tables of KV cache transfers: transfer.json, exposure.json, arrivals.json."""

from __future__ import annotations

import statistics
from typing import Any

import msgspec

from perf.benchmarks_page.markdown import number, table
from perf.benchmarks_page.result import Result, against_target
from perf.transfer import report
from perf.transfer.measuring import Point

LINKS = {
    "shm": "shared memory",
    "cma": "CMA, one host",
    "tcp": "TCP, one host",
    "hosts": "TCP, two hosts",
    "hosts, 1 Gbit/s": "TCP, two hosts, 1 Gbit/s",
}
SHOWN_LAYOUT, SHOWN_BLOCK = "Llama-3-8B", 16


def points() -> list[Point]:
    return msgspec.convert(Result("transfer").results["points"], list[Point])


def times() -> str:
    rows = []
    for point in points():
        if (point.layout, point.block) == (SHOWN_LAYOUT, SHOWN_BLOCK):
            measured = (point.memcpy, point.pull, point.raw, *_ways(point), point.per_block)
            cells = (number(value) if value is not None else "-" for value in measured)
            rows.append((LINKS[point.link], number(point.mib), *cells))
    head = ("link", "MiB", "memcpy", "pull", "raw NIXL", "whole", "direct", "block by block")
    return table(head, rows)


def _ways(point: Point) -> tuple[float, float | None]:
    return point.ways["whole"], point.ways.get("direct")


def comparisons() -> str:
    rows = []
    for one in report.comparisons(points()):
        unit = f" {one.unit}"
        middle, worst = (
            number(value) + unit for value in (statistics.median(one.values), one.worst)
        )
        rows.append(
            (
                one.what,
                str(len(one.values)),
                middle,
                worst,
                f"{one.bound} {number(one.limit)}{unit}" if one.promised else "none",
                f"{one.within:.0f} %",
            )
        )
    head = ("what", "points", "median", "worst", "target", "points within")
    return table(head, rows)


def choices() -> str:
    """Return how much longer the strategy that the cost model chose takes than the best one."""
    found = [report.regret(point) for point in points() if len(point.ways) > 1]
    good = 100 * sum(one <= report.TUNED for one in found) / len(found)
    rows = [
        ("points with a choice", str(len(found))),
        ("chosen way within 10 % of the best", f"{good:.1f} % (target: at least 90 %)"),
        ("longest time of the chosen way, of the best", f"{max(found):.2f} x"),
    ]
    return table(("what", "measured"), rows)


def strategies() -> str:
    found = points()
    rows = []
    for link, name in LINKS.items():
        mine = [(*_ways(point), point.spanning) for point in found if point.link == link]
        direct = [whole / other for whole, other, _ in mine if other is not None]
        spanning = [whole / other for whole, _, other in mine]
        rows.append((name, _won(direct), _won(spanning)))
    return table(("link", "against *direct*", "against blocks of all layers"), rows)


def _won(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    won = sum(ratio < 1 for ratio in ratios)
    return f"faster at {won} of {len(ratios)} points; median time {statistics.median(ratios):.2f} x"


def exposure() -> str:
    rows: dict[int, dict[str, Any]] = {}
    for row in Result("exposure").results["rows"]:
        rows.setdefault(row["tokens"], {})[row["strategy"]] = row
    cells = []
    for tokens, of in rows.items():
        whole, layered = of["whole"], of["auto"]
        cells.append(
            (
                f"{tokens:,}",
                number(whole["mib"]),
                number(whole["prefill"]),
                number(whole["exposed"]),
                number(layered["exposed"]),
                f"{100 * (1 - layered['exposed'] / whole['exposed']):.1f} %",
                f"{number(whole['second_token'])}, {number(layered['second_token'])}",
            )
        )
    head = (
        "prompt tokens",
        "MiB",
        "prefill, ms",
        "*whole* takes after it, ms",
        "*layered* takes after it, ms",
        "hidden",
        "first to second token, ms: *whole*, *layered*",
    )
    return table(head, cells)


def arrivals() -> str:
    result = Result("arrivals")
    phases = result.results["phases"]
    rows = []
    for key, name in (("without", "no arrivals"), ("with", "4 prompts of 1,000 tokens a second")):
        runs = phases[key]
        rows.append(
            (
                name,
                *(number(statistics.median(run[of] for run in runs)) for of in ("p50", "p99")),
                number(max(run["most"] for run in runs)),
            )
        )
    shown = table(("load", "median, ms", "99th percentile, ms", "longest, ms"), rows)
    what = "ITL p99 with 4 arrivals of 1000 tokens a second"
    name = "99th percentile with arrivals, of the one without"
    return f"{shown}\n\n{against_target([(name, result.budget(what))])}"
