"""Table of instances that change roles: role-switch-emulated.json, role-switch-torch.json."""

from __future__ import annotations

import statistics
from typing import Any

from perf.benchmarks_page.markdown import number, table
from perf.benchmarks_page.result import Result


def role_switch() -> str:
    """Return a row for each way and direction of each engine."""
    rows = []
    for engine in ("emulated", "torch"):
        result = Result(f"role-switch-{engine}").results["result"]
        for how, changes in (("in place", result["switches"]), ("loaded anew", result["loads"])):
            for role in ("prefill", "decode"):
                mine = [one for one in changes if one["role"] == role]
                rows.append((engine, how, f"to {role}", *_times(mine)))
    head = ("engine", "how", "change", "number", "assigned, s", "served, s", "served at most, s")
    return table(head, rows)


def _times(changes: list[dict[str, Any]]) -> tuple[str, str, str, str]:
    """Return the number of changes, the medians of both times, and the longest time."""
    served = [max(one["served_s"]) for one in changes if None not in one["served_s"]]
    assigned = [one["assigned_s"] for one in changes if "assigned_s" in one]
    missing = len(changes) - len(served)
    return (
        str(len(changes)),
        number(statistics.median(assigned)) if assigned else "-",
        number(statistics.median(served)),
        number(max(served)) + (f"; {missing} never" if missing else ""),
    )
