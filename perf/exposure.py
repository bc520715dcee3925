"""Measures how much of a transfer is hidden behind the prefill: whole against auto, on a slow
network.

    python -m perf.exposure [--quick]

A prefill and a decode on two hosts (network namespaces, which need root) are joined by 1 Gbit/s,
with a gateway on a third; emulated compute, real KV bytes. `auto` is the default, and layered here,
as the link is slow and the prompts are long. `exposed` is the part of a pull after the last layer
had been computed, as the decode reports it; the client sees it as the time from the first token to
the second.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from tests.clients import connected, stream, wait_linked
from tests.hosts import network
from tests.hosts.servers import running_on

from pdserve import config
from perf import budgets
from perf.budgets import Budget
from perf.record import Record
from perf.serving import MODEL, PROFILES

RATE_MBIT = 1000
LENGTHS = (1000, 2000, 4000)
console = Console()


class Timed(Struct):
    """Times for one prompt length: medians in milliseconds."""

    tokens: int
    strategy: str
    mib: float
    prefill: float
    transfer: float
    exposed: float
    second_token: float
    """Time from the first token to the second, at the client."""


def _deployment(strategy: Literal["whole", "auto"], key: Path) -> config.Deployment:
    servers = (
        config.Server(name="gateway"),
        config.Server(name="left", gateway=False, prefill=("prefill_0",)),
        config.Server(name="right", gateway=False, decode=("decode_0",)),
    )
    return config.Deployment(
        model=str(MODEL),
        servers=servers,
        engine=config.Engine(kind="emulated", profile=str(PROFILES / "prefill_1ms.yaml")),
        prefill=config.Prefill(arena_mib=1024),
        decode=config.Decode(blocks=4096),
        transfer=config.Transfer(transports=("nixl",), strategy=strategy, key_file=str(key)),
    )


async def _ask(
    client: object, ids: list[int], expected: str
) -> tuple[float, dict[str, float], float]:
    parts = [
        part async for part in stream(client, "scheduler", input_ids=ids, max_tokens=6, stream=True)
    ]
    stats = parts[-1].stats
    assert stats is not None
    assert stats["kv"]["strategy"] == expected, stats
    return stats["kv"]["bytes"] / 2**20, stats["ms"], (parts[1].at - parts[0].at) * 1e3


async def _measure(server: object, strategy: str, repeats: int) -> list[Timed]:
    rng = np.random.default_rng(0)
    expected = "layered" if strategy == "auto" else strategy
    found = []
    async with connected(server) as client:  # type: ignore[arg-type]
        for tokens in LENGTHS:
            # The first request also pays for one-time setup.
            answers = [
                await _ask(client, rng.integers(100, 40_000, tokens).tolist(), expected)
                for _ in range(repeats + 1)
            ][1:]

            def middle(values: list[float]) -> float:
                return round(statistics.median(values), 1)

            found.append(
                Timed(
                    tokens=tokens,
                    strategy=strategy,
                    mib=middle([mib for mib, _, _ in answers]),
                    prefill=middle([ms["prefill"] for _, ms, _ in answers]),
                    transfer=middle([ms["transfer"] for _, ms, _ in answers]),
                    exposed=middle([ms["exposed"] for _, ms, _ in answers]),
                    second_token=middle([second for _, _, second in answers]),
                )
            )
    return found


def main(quick: Annotated[bool, typer.Option("--quick", help="few turns")] = False) -> None:
    """Measure how much of a transfer is hidden behind the prefill, on a slow network."""
    reason = network.available()
    if reason:
        raise typer.BadParameter(f"not possible here: {reason}")
    record = Record("exposure-quick" if quick else "exposure")
    rows: list[Timed] = []
    with network.hosts(["left", "right"], RATE_MBIT) as made:
        for strategy in ("whole", "auto"):
            with tempfile.TemporaryDirectory(prefix="pdserve-perf-") as folder:
                deployment = _deployment(strategy, Path(folder) / "kv.key")
                placement = {"left": "left", "right": "right"}
                with running_on(made, deployment, placement, Path(folder)) as server:
                    wait_linked(server)
                    rows += asyncio.run(_measure(server, strategy, 2 if quick else 7))
    table = Table("tokens", "strategy", "MiB", "prefill", "transfer", "exposed", "second token")
    for row in rows:
        times = (row.mib, row.prefill, row.transfer, row.exposed, row.second_token)
        table.add_row(str(row.tokens), row.strategy, *(f"{value:g}" for value in times))
    console.print(table)
    limits = []
    for whole, layered in zip(rows[: len(LENGTHS)], rows[len(LENGTHS) :], strict=True):
        hidden = round(100 * (1 - layered.exposed / whole.exposed), 1)
        second = round(layered.second_token / whole.second_token, 3)
        what = f"{whole.tokens} tokens"
        limits += [
            Budget(f"{what}: of the transfer hidden", hidden, "%", "at least", 70),
            Budget(f"{what}: time to the second token, of whole", second, "x", "at most", None),
        ]
    console.print(budgets.table(limits))
    console.print(record.write({"budgets": limits, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
