"""Budgets: the limits of measured values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct
from rich.table import Table


class Budget(Struct):
    """One measured value and its limit."""

    what: str
    measured: float
    unit: str
    bound: Literal["at most", "at least"]
    limit: float | None
    """None: there is no target."""
    moonshot: float | None = None

    def met(self, limit: float | None) -> bool | None:
        if limit is None:
            return None
        return self.measured <= limit if self.bound == "at most" else self.measured >= limit


def table(budgets: Sequence[Budget]) -> Table:
    """Return a table of all budgets, with missed ones in red."""
    shown = Table("what", "measured", "budget", "moonshot")
    for one in budgets:
        shown.add_row(
            one.what,
            f"{one.measured:.4g} {one.unit}",
            _limit(one, one.limit, missed="red"),
            _limit(one, one.moonshot, missed="yellow"),
        )
    return shown


def _limit(one: Budget, limit: float | None, missed: str) -> str:
    met = one.met(limit)
    if met is None:
        return "-"
    verdict = "[green]met[/]" if met else f"[{missed}]missed[/]"
    return f"{one.bound} {limit:g}: {verdict}"
