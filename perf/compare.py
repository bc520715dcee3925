"""Compares this checkout with another one, both serving at the same time, in turn under load.

    python -m perf.compare ../before [--rounds 20]

Each checkout needs its own set-up (``make setup``). Both start a server with emulated engines that
do not wait, by their own code and their own environment. The same client, that of this checkout,
then measures one and the other in turn, and the first of the two changes with each round: a machine
whose clock changes slows both down. The ratio of a round is this checkout's value by the other's.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from msgspec import Struct
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pdctl.paths import ROOT
from perf import client
from perf.client import Load, Measured
from perf.overhead import CPU_STREAMS, OUTPUT_TOKENS, PROMPT_TOKENS
from perf.record import Record

# Runs in the other checkout too, whose perf package has these names since the commit 3bc7271.
SERVE = """
import json, sys
from perf import processes
from perf.serving import deployment, serving
with serving(deployment("instant")) as server:
    print(json.dumps([server.grpc, processes.ids(server)]), flush=True)
    sys.stdin.read()
"""
STOP_S = 60.0
CONFIDENCE = 0.95
MIN_ROUNDS = 6
"""With fewer rounds no interval of this confidence exists: 2 / 2**n is more than 0.05."""
console = Console()


class Side(NamedTuple):
    """One checkout's running server."""

    address: str
    watch: dict[str, int]


class Kind(NamedTuple):
    """One kind of load, and the value in milliseconds that is taken from its answers."""

    what: str
    streams: int
    requests: int
    stream: bool
    value: Callable[[Measured], float]


def ttft_ms(measured: Measured) -> float:
    return statistics.median(answer.ttft for answer in measured.answers) * 1e3


def cpu_ms(measured: Measured) -> float:
    """Return the CPU time of all of the server's processes per request."""
    return sum(measured.server_cpu_s.values()) / len(measured.answers) * 1e3


KINDS = (
    Kind("TTFT, 1 stream, median", 1, 60, True, ttft_ms),
    Kind("CPU per request, streaming", CPU_STREAMS, 30, True, cpu_ms),
    Kind("CPU per request, one response", CPU_STREAMS, 30, False, cpu_ms),
)


class Compared(Struct):
    """One value in both checkouts: a number of each for every round, in milliseconds."""

    what: str
    here: list[float]
    there: list[float]

    @property
    def ratios(self) -> list[float]:
        """Return the ratio of each round, the smallest first."""
        return sorted(a / b for a, b in zip(self.here, self.there, strict=True))

    @property
    def interval(self) -> tuple[float, float]:
        """Return the interval that holds the median of the ratios with 95 % confidence."""
        lowest = rank(len(self.here))
        return self.ratios[lowest], self.ratios[-1 - lowest]


def rank(count: int) -> int:
    """Return how many of the smallest and of the largest values the interval of a median omits.

    The number of values below the median is binomial with p = 1/2, whatever their distribution: the
    confidence interval of the sign test.
    """
    tail, omitted = 0.0, 0
    while True:
        tail += math.comb(count, omitted) / 2**count
        if 2 * tail > 1 - CONFIDENCE:
            return max(0, omitted - 1)
        omitted += 1


@contextlib.contextmanager
def standing(checkout: Path) -> Iterator[Side]:
    """Run the server of a checkout.

    Raises:
        typer.BadParameter: the checkout has no environment, or its server did not start.
    """
    python = checkout.resolve() / ".venv" / "bin" / "python"
    if not python.exists():
        raise typer.BadParameter(f"{checkout}: no .venv; run `make setup` there first")
    process = subprocess.Popen(
        [str(python), "-c", SERVE],
        cwd=checkout,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # it ends with the limit of `serving`, at the latest
        if not line:
            raise typer.BadParameter(f"{checkout}: its server did not start; see above")
        yield Side(*json.loads(line))
    finally:
        process.stdin.close()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(side: Side, kind: Kind, seed: int) -> float:
    """Put one load on one server."""
    load = Load(
        address=side.address,
        model="pdserve",
        streams=kind.streams,
        requests=kind.requests,
        prompt_tokens=PROMPT_TOKENS,
        output_tokens=OUTPUT_TOKENS,
        stream=kind.stream,
        seed=seed,
        watch=side.watch,
    )
    return kind.value(client.run(load))


def compare(sides: Sequence[Side], rounds: int) -> list[Compared]:
    """Measure every kind of load on both servers, round by round; the first round warms up."""
    results = [Compared(kind.what, [], []) for kind in KINDS]
    for number in track(range(rounds + 1), "rounds", console=console, transient=True):
        for kind, result in zip(KINDS, results, strict=True):
            found = {
                which: measure(sides[which], kind, number)
                for which in ((0, 1) if number % 2 else (1, 0))
            }
            if number:
                result.here.append(round(found[0], 4))
                result.there.append(round(found[1], 4))
    return results


def table(results: Sequence[Compared]) -> Table:
    shown = Table("what", "here", "there", "ratio", "95 % interval")
    for one in results:
        low, high = one.interval
        shown.add_row(
            one.what,
            f"{statistics.median(one.here):.3f} ms",
            f"{statistics.median(one.there):.3f} ms",
            f"{statistics.median(one.ratios):.3f}",
            f"{low:.3f} to {high:.3f}",
        )
    return shown


def main(
    checkout: Annotated[Path, typer.Argument(help="the other checkout, with its own .venv")],
    rounds: Annotated[int, typer.Option(help="measurements of each", min=MIN_ROUNDS)] = 20,
) -> None:
    """Compare TTFT and CPU time of this checkout with another one, side by side."""
    record = Record("compare-part")
    with standing(ROOT) as here, standing(checkout) as there:
        results = compare((here, there), rounds)
    console.print(table(results))
    console.print(record.write({"rounds": rounds, "measured": results}))


if __name__ == "__main__":
    typer.run(main)
