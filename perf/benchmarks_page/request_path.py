"""Tables of the cost of a request on its path: overhead, load, ensemble and channels.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from perf.benchmarks_page.markdown import number, table
from perf.benchmarks_page.result import Result, against_target

MODELS = {
    "pdserve": "P/D-Serve: 2 prefills, 2 decodes",
    "aggregated": "one process that prefills and decodes",
    "serial_bls": "one request at a time (TensorRT-LLM's BLS example)",
}
QUANTITIES = {
    "TTFT p50 ms": "TTFT, median, ms",
    "TTFT p99 ms": "TTFT, 99th percentile, ms",
    "E2E p50 ms": "whole answer, median, ms",
    "ITL p50 ms": "time from token to token, median, ms",
    "gap p99 ms": "time between two responses of a stream, 99th percentile, ms",
    "CPU ms per request": "CPU time of all server processes, ms a request",
    "CPU ms per token": "CPU time of all server processes, ms a token",
    "requests/s": "requests a second",
    "responses/s": "responses a second",
}


def overhead() -> str:
    result = Result("overhead")
    names = {
        "TTFT added, 1 stream, median": "time to first token, one request at a time, median",
        "CPU per request, streaming": "CPU time of a request, 8 at a time, streamed",
        "CPU per request, one response": "CPU time of a request, 8 at a time, not streamed",
        "64 streams, 10 ms a token: tokens delivered": (
            "64 streams at 10 ms a token: tokens that arrive in time, from the first one on"
        ),
        "64 streams: the same, prefills included": (
            "the same, from sending the first request to the last response"
        ),
        "64 streams, 10 ms a token: gap, p99": (
            "64 streams at 10 ms a token: time between two responses of a stream, 99th percentile"
        ),
        "8 streams against serial BLS": (
            "8 streams at 10 ms a token: tokens a second, against one request at a time"
        ),
        "8 streams against aggregated": (
            "8 streams at 10 ms a token: tokens a second, against one process that does both"
        ),
    }
    return against_target([(plain, result.budget(what)) for what, plain in names.items()])


def cpu() -> str:
    """Return the table of milliseconds of each process of the server, medians of the runs."""
    runs = Result("overhead").results["measured"]["cost"]
    streamed = [run["process_ms"] for run in runs if run["stream"]]
    single = [run["process_ms"] for run in runs if not run["stream"]]

    def middle(some: list[dict[str, float]], name: str) -> float:
        return statistics.median(one[name] for one in some)

    names = sorted(streamed[0], key=lambda name: -middle(streamed, name))
    rows = [
        (f"`{name}`", number(middle(streamed, name)), number(middle(single, name)))
        for name in names
        if middle(streamed, name) >= 0.01
    ]
    return table(("process", "streamed, ms", "one response, ms"), rows)


def baselines() -> str:
    return _levels(Result("overhead").results["measured"]["baselines"])


def load() -> str:
    return _levels(Result("load").results["levels"])


def ensemble() -> str:
    models = {one["model"]: one for one in Result("ensemble").results["models"]}

    def row(what: str, values: Callable[[dict[str, Any]], list[float]]) -> tuple[str, ...]:
        ours, theirs = (statistics.median(values(models[name])) for name in ("pdserve", "ensemble"))
        return (what, number(ours), number(theirs), f"{theirs / ours:.2f} x")

    def cpu(stream: bool) -> Callable[[dict[str, Any]], list[float]]:
        return lambda one: [run["total_ms"] for run in one["cost"] if run["stream"] is stream]

    rows = [
        row(
            "time to first token, one request at a time, median, ms",
            lambda one: [run["ttft_ms"]["p50"] for run in one["ttft"]],
        ),
        row("CPU time of a request, 8 at a time, streamed, ms", cpu(stream=True)),
        row("CPU time of a request, 8 at a time, not streamed, ms", cpu(stream=False)),
    ]
    return table(("what", "`pdserve`", "`ensemble`", "ratio"), rows)


def _levels(levels: list[dict[str, Any]]) -> str:
    rows = []
    for level in levels:
        summary = level["summary"]
        ttft, itl = summary["ttft_ms"], summary["itl_ms"]
        rows.append(
            (
                MODELS[level["model"]],
                number(summary["tokens_per_s"]),
                f"{number(ttft['p50'])} / {number(ttft['p99'])}",
                f"{number(itl['p50'])} / {number(itl['p99'])}",
            )
        )
    head = ("server", "tokens a second", "TTFT, median / p99, ms", "ITL, median / p99, ms")
    return table(head, rows)


def channels() -> str:
    rows = []
    for row in Result("channels").results:
        load, quantity = row["what"].split(": ")
        rows.append((load, QUANTITIES[quantity], number(row["grpc"]), number(row["bls"])))
    return table(("load", "measured", "gRPC", "BLS"), rows)
