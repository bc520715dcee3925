"""Compares the two channels to an instance, BLS and gRPC, side by side.

    python -m perf.channels [--quick]

There is one server for each channel, and both run all the time; the measurements take turns. These
are the numbers of ``docs/channels.md``.
"""

from __future__ import annotations

import contextlib
import statistics
from typing import Annotated, Literal

import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from perf import overhead, processes
from perf.answers import summarize
from perf.client import Load, Measured, run
from perf.record import Record
from perf.serving import MeasuredServer, deployment, serving

CHANNELS: tuple[Literal["grpc", "bls"], ...] = ("grpc", "bls")
console = Console()


class Row(Struct):
    """One value for each channel: medians of the repeats."""

    what: str
    grpc: float
    bls: float


def _load(server: MeasuredServer, streams: int, requests: int, tokens: int, seed: int) -> Measured:
    return run(
        Load(
            address=server.grpc,
            model="pdserve",
            streams=streams,
            requests=requests,
            prompt_tokens=overhead.PROMPT_TOKENS,
            output_tokens=tokens,
            stream=True,
            seed=seed,
            watch=processes.ids(server),
        )
    )


def instant(server: MeasuredServer, requests: int, seed: int) -> dict[str, float]:
    """Measure with engines that do not wait."""
    one = overhead.ttft(server, requests, seed)
    costs = {stream: overhead.cost(server, requests, stream, seed) for stream in (True, False)}
    many = _load(server, 32, max(requests // 32, 1), 16, seed)
    summary = summarize(many.answers)
    cpu = sum(many.server_cpu_s.values()) / len(many.answers)
    return {
        "1 stream: TTFT p50 ms": one.ttft_ms.p50,
        "1 stream: TTFT p99 ms": one.ttft_ms.p99,
        "1 stream: E2E p50 ms": one.e2e_ms.p50,
        "8 streams: CPU ms per request": costs[True].total_ms,
        "8 at once, one response each: CPU ms per request": costs[False].total_ms,
        "32 streams: requests/s": summary.requests_per_s,
        "32 streams: responses/s": summary.responses_per_s,
        "32 streams: TTFT p50 ms": summary.ttft_ms.p50,
        "32 streams: CPU ms per request": cpu * 1e3,
    }


def ten_ms(server: MeasuredServer, tokens: int, seed: int) -> dict[str, float]:
    """Measure with engines that take 10 ms for a token."""
    values: dict[str, float] = {}
    for streams in (8, 64):
        measured = _load(server, streams, 2, tokens, seed)
        summary = summarize(measured.answers)
        assert summary.itl_ms is not None
        assert summary.gap_ms is not None
        cpu = sum(measured.server_cpu_s.values()) / summary.requests / tokens
        values |= {
            f"{streams} streams, 10 ms a token: TTFT p50 ms": summary.ttft_ms.p50,
            f"{streams} streams, 10 ms a token: ITL p50 ms": summary.itl_ms.p50,
            f"{streams} streams, 10 ms a token: gap p99 ms": summary.gap_ms.p99,
            f"{streams} streams, 10 ms a token: responses/s": summary.responses_per_s,
            f"{streams} streams, 10 ms a token: CPU ms per token": cpu * 1e3,
        }
    return values


def measure(repeats: int, *, quick: bool) -> list[Row]:
    rows: dict[str, dict[str, list[float]]] = {}
    for profile, requests in (("instant", 80 if quick else 400), ("token_10ms", 0)):
        with contextlib.ExitStack() as stack:
            servers = {
                channel: stack.enter_context(serving(deployment(profile, channel=channel)))
                for channel in CHANNELS
            }
            for server in servers.values():
                _load(server, 8, 10, 8, 0)  # warms up
            for repeat in range(repeats):
                for channel, server in servers.items():
                    with console.status(f"{profile}, {channel}: {repeat + 1} of {repeats}"):
                        values = (
                            instant(server, requests, repeat)
                            if requests
                            else ten_ms(server, 64 if quick else 256, repeat)
                        )
                    for what, value in values.items():
                        row = rows.setdefault(what, {name: [] for name in CHANNELS})
                        row[channel].append(value)
    return [
        Row(what, *(round(statistics.median(row[name]), 3) for name in CHANNELS))
        for what, row in rows.items()
    ]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="fewer requests, one repeat")] = False,
) -> None:
    """Compare the two channels to an instance, BLS and gRPC, side by side."""
    record = Record("channels-quick" if quick else "channels")
    rows = measure(1 if quick else 5, quick=quick)
    table = Table("", *CHANNELS)
    for row in rows:
        table.add_row(row.what, f"{row.grpc:.4g}", f"{row.bls:.4g}")
    console.print(table)
    console.print(record.write(rows))


if __name__ == "__main__":
    typer.run(main)
