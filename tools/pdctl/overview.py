"""A server's status as a page for people."""

from __future__ import annotations

import re
import time
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from pdctl.links import microseconds

_LABEL = re.compile(r'="([^"]*)"')


def page(entry: dict[str, Any]) -> Group:
    """Render what `pdctl.status.status` has found."""
    process = f", process {entry['pid']}" if entry["pid"] else ""
    lines = [
        f"[bold]{entry['server']}[/bold] {entry['state']}{process}",
        f"  HTTP {entry['http']}, gRPC {entry['grpc']}, metrics {entry['metrics']}",
        f"  model {escape(entry['model'])}, engine {entry['engine']}",
    ]
    if entry["pid"] or entry["watchdog"]:
        lines.append(f"  {escape(_watchdog(entry))}")
    tables = []
    for rows in (_models(entry), summary(entry["values"])):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for row in rows.items():
            table.add_row(*row)
        tables.append(table)
    return Group(*lines, *tables)


def _models(entry: dict[str, Any]) -> dict[str, str]:
    """Render each model's state, and that of each version where there are several."""
    rows = dict(entry["models"])
    for name, versions in entry["versions"].items():
        each = ", ".join(f"version {version} {state}" for version, state in versions.items())
        rows[name] = f"{rows[name]} ({each})"
    return rows


def _watchdog(entry: dict[str, Any]) -> str:
    """Render a watchdog's report: one line, and one more for each problem."""
    found = entry["watchdog"]
    if found is None and entry["state"] == "starting":
        return "it is still loading: `pdctl up` waits for it, and then starts its watchdog"
    if found is None and entry["unwatched"]:
        return "no watchdog, as it was started: nothing is repaired"
    if found is None:
        return "no watchdog: nothing is repaired (`pdctl up` starts it)"
    if found["at"] is None:
        return f"watchdog process {found['pid']}, which has not reported yet"
    lines = [f"watchdog process {found['pid']}, {time.time() - found['at']:.0f} s ago:"]
    for thing, health in found["things"].items():
        if health["repairs"] or health["state"] != "healthy":
            lines.append(
                f"{thing} {health['state']}, {health['repairs']} repairs, "
                f"the last took {health['down_s']:.1f} s; {health['reason']}"
            )
    return "\n    ".join(lines if len(lines) > 1 else [f"{lines[0]} all is well"])


def summary(values: dict[str, float]) -> dict[str, str]:
    """Return a few words for each metric: totals by label, means of histograms."""
    found: dict[str, list[str]] = {}
    for series, value in values.items():
        name, _, labels = series.partition("{")
        words = " ".join(_LABEL.findall(labels))
        if name.endswith("_count") and value:
            mean = values[series.replace("_count", "_sum", 1)] / value
            text = f"{words} mean {mean * 1e3:.1f} ms of {value:.0f}"
            found.setdefault(name.removesuffix("_count"), []).append(text)
        elif value and not name.endswith(("_sum", "_count")):
            text = microseconds(value) if name.endswith("_seconds") else f"{value:.0f}"
            found.setdefault(name, []).append(f"{words} {text}")
    return {
        name.removeprefix("pdserve_"): ", ".join(text.strip() for text in sorted(texts))
        for name, texts in sorted(found.items())
    }
