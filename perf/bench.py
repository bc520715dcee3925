"""Measures every budget in one table: engine, overhead, load with the baselines."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from perf import budgets, engine, overhead
from perf.serving import MODEL

console = Console()


def main(
    quick: Annotated[bool, typer.Option("--quick", help="a few minutes, for CI")] = False,
) -> None:
    """Measure every budget in one table; each part writes its own file in perf/results."""
    effort = (1, 15.0) if quick else (5, 120.0)
    measured = [*engine.run(str(MODEL), *effort, quick=quick), *overhead.run(quick=quick)]
    console.print(budgets.table(measured))


if __name__ == "__main__":
    typer.run(main)
