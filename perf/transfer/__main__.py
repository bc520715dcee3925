"""Measures KV cache transfers between processes, by every strategy, over every link.

    python -m perf.transfer [--quick] [--link LINK ...]

There are two processes for each link and layout: one holds KV caches like a prefill, the other
takes them over like a decode, and in turns also copies, pulls and scatters the same bytes, and has
NIXL do it without this package. The received bytes are compared with the sent ones, outside the
measured time.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from tests.hosts import network

from perf import budgets
from perf.record import RESULTS, Record
from perf.transfer import report
from perf.transfer.holding import Holding
from perf.transfer.layouts import LAYOUTS
from perf.transfer.measuring import Point, Spec

POINTS_S = 1800.0
"""Longest time of one layout over one link, in seconds."""
SMALL, ALL = [1, 16], [1, 16, 64, 256, 1024]
BLOCKS = [8, 16, 32, 64, 128]
console = Console()
WIDTH = 150
"""Width of the table of all points, in characters."""


@dataclass(frozen=True)
class Link:
    """A link between two processes, or two hosts."""

    transport: str
    environment: dict[str, str]
    sizes_mib: list[int]
    apart: bool = False
    rate_mbit: float | None = None
    handshakes: int = 20_000


LINKS = {
    "shm": Link("shm", {}, ALL),
    "cma": Link("nixl", {}, ALL),
    "tcp": Link("nixl", {"UCX_TLS": "tcp"}, ALL[:4]),
    "hosts": Link("nixl", {}, ALL[:4], apart=True),
    "hosts, 1 Gbit/s": Link("nixl", {}, SMALL, apart=True, rate_mbit=1000, handshakes=6_000),
}


@contextlib.contextmanager
def _places(link: Link) -> Iterator[tuple[list[str], list[str], str]]:
    """Give the beginnings of the commands of holder and receiver, and the holder's address."""
    if not link.apart:
        yield [], [], "127.0.0.1"
        return
    with network.hosts(["holder", "receiver"], link.rate_mbit) as made:
        yield made.command("holder", []), made.command("receiver", []), made.address("holder")


def measure(name: str, link: Link, layout: str, quick: bool) -> list[Point]:
    """Measure every size and block of a layout over a link."""
    sizes = link.sizes_mib[:2] if quick else link.sizes_mib
    spec = Spec(
        link=name,
        transport=link.transport,
        layout=layout,
        sizes_mib=sizes,
        blocks=[16, 32] if quick else BLOCKS,
        handshakes=link.handshakes,
        repeats=2 if quick else 5,
    )
    # Whole blocks of the largest size, in rows of all layouts.
    nbytes = (max(sizes) << 20) + (16 << 20)
    environment = os.environ | link.environment
    with _places(link) as (there, here, address):
        holder = Holding(there, environment, address, link.transport, nbytes, layout)
        try:
            text = msgspec.json.encode(spec).decode()
            module = [sys.executable, "-m", "perf.transfer.measuring"]
            done = subprocess.run(
                [*here, *module, address, str(holder.port), text],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=POINTS_S,
            )
        finally:
            holder.close()
    return [msgspec.json.decode(line, type=Point) for line in done.stdout.splitlines()]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="small payloads, few turns")] = False,
    link: Annotated[list[str] | None, typer.Option(help="only this one; may be repeated")] = None,
) -> None:
    """Measure KV cache transfers between processes, by every strategy, over every link."""
    unknown = set(link or ()) - set(LINKS)
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(LINKS)}")
    name = "transfer-quick" if quick else "transfer"
    record = Record(name)
    reason = network.available()
    points: list[Point] = []
    for key, one in LINKS.items():
        if link and key not in link:
            continue
        if one.apart and reason:
            console.print(f"{key}: left out; {reason}")
            continue
        for layout in LAYOUTS:
            began = time.monotonic()
            with console.status(f"{key}, {layout}"):
                points += measure(key, one, layout, quick)
            console.print(f"{key}, {layout}: {time.monotonic() - began:.0f} s")
    Console(width=WIDTH).print(report.table(points))
    limits = report.limits(points)
    console.print(budgets.table(limits))
    console.print(report.remarks(points))
    console.print(report.plot(points, RESULTS / f"{name}.png"))
    console.print(record.write({"budgets": limits, "points": points}))


if __name__ == "__main__":
    typer.run(main)
