"""The ``stats`` of an answer as a picture of where its time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

WIDTH = 24


@dataclass(frozen=True)
class Phase:
    """A period of the request's life, in milliseconds from its arrival."""

    name: str
    begin: float
    end: float
    note: str


def phases(stats: dict[str, Any]) -> list[Phase]:
    """Return the phases of a finished request, in order."""
    ms, kv = stats["ms"], stats["kv"]
    forwarded, first, end = ms["forward"], ms["ttft"], ms["e2e"]
    tokens = stats["output_tokens"]
    found = [
        Phase(
            "forward", 0, forwarded, f"{_count(stats['attempts'], 'attempt')}, {stats['prefill']}"
        ),
        Phase(
            "prefill",
            forwarded,
            forwarded + ms["prefill"],
            f"{_count(stats['prompt_tokens'], 'token')}, {stats['cached_tokens']} cached",
        ),
        Phase("first token", 0, first, "TTFT"),
    ]
    if stats["decode"]:
        pulled = min(first + ms["exposed"], end)
        rate = (tokens - 1) / (end - first) * 1e3 if end > first else 0.0
        size = f"{kv['bytes'] / 2**20:.1f} MiB"
        found += [
            Phase(
                "KV transfer",
                pulled - ms["transfer"],
                pulled,
                f"{size}, {kv['transport']}, {kv['strategy']}",
            ),
            Phase("decode", pulled, end, f"{rate:.1f} tokens/s, {stats['decode']}"),
        ]
    return [*found, Phase("whole answer", 0, end, f"{_count(tokens, 'token')}")]


def timeline(stats: dict[str, Any]) -> Table:
    """Return a table with a bar for each phase."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(style="dim")
    total = max(stats["ms"]["e2e"], 1e-9)
    for phase in phases(stats):
        left = min(round(phase.begin / total * WIDTH), WIDTH - 1)
        length = max(round((phase.end - phase.begin) / total * WIDTH), 1)
        bar = (" " * left + "━" * length)[:WIDTH]
        table.add_row(phase.name, f"{phase.end - phase.begin:.1f} ms", bar, phase.note)
    return table


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
