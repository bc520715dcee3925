"""Every budget in one table: engine, overhead, load with the baselines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from perf import budgets, overhead
from perf.budgets import Budget
from perf.record import RESULTS

console = Console()


def engine(*, quick: bool) -> list[Budget]:
    """The torch engine against transformers, in a process of its own, as torch wants the cores."""
    effort = ("--rounds", "1", "--patience", "15") if quick else ()
    subprocess.run([sys.executable, "-m", "perf.engine", *effort], check=True)
    rows = json.loads(Path(RESULTS / "engine.json").read_text())["budgets"]
    return [
        Budget(f"torch: {row['what']}", row["measured"], "x", "at least", row["at_least"])
        for row in rows
    ]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="a few minutes, for CI")] = False,
) -> None:
    """Every budget in one table; each part writes its own file in perf/results."""
    measured = [*engine(quick=quick), *overhead.run(quick=quick)]
    console.print(budgets.table(measured))


if __name__ == "__main__":
    typer.run(main)
