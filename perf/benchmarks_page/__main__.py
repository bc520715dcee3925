"""Write docs/benchmarks.md, and the headline figures of README.md, from ``perf/results``.

    python -m perf.benchmarks_page [--check]

The text of the page is ``template.md``: a line ``{{name}}`` in it is replaced by a table of
`TABLES`, and ``{{conditions name}}`` by where and when that file of ``perf/results`` was measured.
README.md has the figures between two comments.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pdctl.paths import ROOT
from perf.benchmarks_page import (
    endurance,
    engine,
    headline,
    request_path,
    role_switch,
    scheduling,
    transfer,
)
from perf.benchmarks_page.result import Result

PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
TEMPLATE = Path(__file__).parent / "template.md"
BEGIN, END = "<!-- figures: python -m perf.benchmarks_page -->", "<!-- end of figures -->"
COMMAND = "python -m perf.benchmarks_page"
TABLES: dict[str, Callable[[], str]] = {
    "overhead": request_path.overhead,
    "cpu": request_path.cpu,
    "baselines": request_path.baselines,
    "load": request_path.load,
    "ensemble": request_path.ensemble,
    "channels": request_path.channels,
    "prefill": engine.prefill,
    "decode step": engine.decode_step,
    "memory": engine.memory,
    "transfer times": transfer.times,
    "transfer comparisons": transfer.comparisons,
    "strategies": transfer.strategies,
    "choices": transfer.choices,
    "exposure": transfer.exposure,
    "arrivals": transfer.arrivals,
    "poisson": scheduling.poisson,
    "poisson targets": scheduling.poisson_targets,
    "users": scheduling.users,
    "paper": scheduling.paper,
    "traces": scheduling.traces,
    "tides": scheduling.tides,
    "gateways": scheduling.gateways,
    "costs": scheduling.costs,
    "group costs": scheduling.group_costs,
    "role switch": role_switch.role_switch,
    "soak": endurance.soak,
    "repairs": endurance.repairs,
    "gateway faults": endurance.gateways,
    "soak with faults": endurance.soak_with_faults,
}


def page(template: str) -> str:
    """Return the template with its tables.

    Raises:
        KeyError: it names an unknown table.
    """

    def filled(match: re.Match[str]) -> str:
        name = match[1]
        if name.startswith("conditions "):
            return Result(name.removeprefix("conditions ")).conditions()
        return TABLES[name]()

    return re.sub(r"^\{\{(.+)\}\}$", filled, template, flags=re.MULTILINE)


def with_figures(readme: str) -> str:
    """Return README.md with the current figures.

    Raises:
        ValueError: README.md has no place for them.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{headline.figures()}\n{END}{after}"


def main(
    check: Annotated[
        bool, typer.Option("--check", help="write nothing; exit status 1 if a file is stale")
    ] = False,
) -> None:
    """Write docs/benchmarks.md, and the headline figures of README.md, from perf/results."""
    made = {PAGE: page(TEMPLATE.read_text()), README: with_figures(README.read_text())}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if check:
            print(
                f"{path.relative_to(ROOT)} is not what perf/results say; `{COMMAND}` writes it",
                file=sys.stderr,
            )
        else:
            path.write_text(made[path])
            print(path.relative_to(ROOT))
    if check and stale:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
