"""Measures the memory of several engine processes of one host, which share the mapped weights.

    python -m perf.memory [--each 2]

PSS counts a page that n processes share as 1/n in each, so the sum is the memory of the host that
they use.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from perf import client, processes
from perf.client import Load
from perf.processes import Usage
from perf.record import Record
from perf.serving import deployment, serving

console = Console()


def measure(each: int) -> dict[str, Usage]:
    """Measure a server with ``each`` prefills and decodes of the torch engine, after some
    requests."""
    with serving(deployment(None, each=each)) as server:
        client.run(Load(server.grpc, "pdserve", 4 * each, 2, 64, 8, stream=False))
        used = processes.usage(server)
    return {name: one for name, one in used.items() if name.startswith(("prefill_", "decode_"))}


def main(each: Annotated[int, typer.Option(help="prefills, and as many decodes")] = 2) -> None:
    """Measure the PSS of the engine processes of one host, and of a single pair."""
    record = Record("memory")
    measured = {n: measure(n) for n in sorted({1, each})}
    table = Table("engine processes", "PSS MiB of each", "PSS sum", "RSS sum")
    for used in measured.values():
        pss = [one.pss_kib / 1024 for one in used.values()]
        rss = sum(one.rss_kib for one in used.values()) / 1024
        table.add_row(
            str(len(pss)), " ".join(f"{one:.0f}" for one in pss), f"{sum(pss):.0f}", f"{rss:.0f}"
        )
    console.print(table)
    console.print(record.write({2 * n: used for n, used in measured.items()}))


if __name__ == "__main__":
    typer.run(main)
