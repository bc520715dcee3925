"""Measures what the ensemble costs beside pdserve, with emulated engines that take no time.

    python -m perf.ensemble [--quick]

Both are models of one server and get the same requests, one model after the other and again, so
that both see the same machine.
"""

from __future__ import annotations

from typing import Annotated

import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from perf.answers import Summary
from perf.overhead import Cost, cost, median, ttft
from perf.record import Record
from perf.serving import deployment, serving

MODELS = ("pdserve", "ensemble")
console = Console()


class Model(Struct):
    """The results of one model, one of each repeat."""

    model: str
    ttft: list[Summary]
    cost: list[Cost]

    @property
    def ttft_ms(self) -> float:
        return median(one.ttft_ms.p50 for one in self.ttft)

    def cpu_ms(self, *, stream: bool) -> float:
        """Return the CPU milliseconds of a request, of all processes of the server."""
        return median(one.total_ms for one in self.cost if one.stream is stream)


def measure(repeats: int, requests: int) -> list[Model]:
    found = [Model(name, [], []) for name in MODELS]
    with serving(deployment("instant")) as server:
        for one in found:
            ttft(server, 100, 0, one.model)  # warm-up
        for repeat in range(1, repeats + 1):
            for one in found:
                with console.status(f"{one.model}: {repeat} of {repeats}"):
                    one.ttft.append(ttft(server, requests, repeat, one.model))
                    one.cost += [
                        cost(server, requests, stream, repeat, one.model)
                        for stream in (True, False)
                    ]
    return found


def show(models: list[Model]) -> None:
    table = Table("model", "TTFT, one request at a time, ms", "CPU ms, streamed", "CPU ms, whole")
    for one in models:
        cpu = [f"{one.cpu_ms(stream=stream):.2f}" for stream in (True, False)]
        table.add_row(one.model, f"{one.ttft_ms:.2f}", *cpu)
    console.print(table)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="fewer requests, one repeat")] = False,
) -> None:
    """Measure what the ensemble costs beside pdserve, with emulated engines that take no time."""
    record = Record("ensemble-quick" if quick else "ensemble")
    models = measure(1, 80) if quick else measure(3, 200)
    show(models)
    console.print(record.write({"models": models}))


if __name__ == "__main__":
    typer.run(main)
