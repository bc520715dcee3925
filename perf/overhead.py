"""Measures the overhead of the request path, with emulated engines, so that only the path is
measured.

    python -m perf.overhead [--quick]

Server and client share this machine's cores. The client is perf_analyzer (C++) for TTFT and for the
baselines; for the CPU time and for the 64 streams it is the small one of ``perf.client``, whose own
CPU time is in the results.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Annotated

import typer
from msgspec import Struct
from rich.console import Console

from perf import budgets, client, load, perf_analyzer, processes
from perf.answers import Summary, summarize
from perf.budgets import Budget
from perf.client import Load
from perf.load import BASELINES, Level
from perf.perf_analyzer import Workload
from perf.record import Record
from perf.serving import MeasuredServer, deployment, serving

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 16
CPU_STREAMS = 8
STREAMS = 64
TOKEN_MS = 10.0  # equal to that of perf/profiles/token_10ms.yaml
console = Console()


class Cost(Struct):
    """CPU milliseconds per request of each process, with requests in ``CPU_STREAMS`` streams."""

    stream: bool
    requests: int
    total_ms: float
    client_ms: float
    process_ms: dict[str, float]


class Streams(Struct):
    """Many streams that begin together, each of requests one after another."""

    streams: int
    offered_tokens_per_s: float
    delivered: float
    """Share of the offered tokens that a stream gets from its first response to its last."""
    delivered_overall: float
    """The same from sending the first request to the last response of all: prefill included."""
    client_cpu: float
    """CPU time of the client per second, in cores."""
    server_cpu: float
    summary: Summary


class Results(Struct):
    """All results; medians are over the repeats."""

    ttft: list[Summary]
    cost: list[Cost]
    streams: list[Streams]
    baselines: list[Level]

    @property
    def budgets(self) -> list[Budget]:
        def speedup(baseline: str) -> float:
            rates = {level.model: level.summary.tokens_per_s for level in self.baselines}
            return rates["pdserve"] / rates[baseline]

        def cpu(stream: bool) -> float:
            return median(one.total_ms for one in self.cost if one.stream is stream)

        ttft = median(one.ttft_ms.p50 for one in self.ttft)
        delivered = median(one.delivered * 100 for one in self.streams)
        overall = median(one.delivered_overall * 100 for one in self.streams)
        gap = median(one.summary.gap_ms.p99 for one in self.streams if one.summary.gap_ms)
        return [
            Budget("TTFT added, 1 stream, median", ttft, "ms", "at most", 4.0, 2.5),
            Budget("CPU per request, streaming", cpu(True), "ms", "at most", None, 2.6),
            Budget("CPU per request, one response", cpu(False), "ms", "at most", None, 2.6),
            Budget("64 streams, 10 ms a token: tokens delivered", delivered, "%", "at least", 95.0),
            Budget("64 streams: the same, prefills included", overall, "%", "at least", 95.0),
            Budget("64 streams, 10 ms a token: gap, p99", gap, "ms", "at most", 100.0),
            Budget("8 streams against serial BLS", speedup("serial_bls"), "x", "at least", 6.0),
            Budget("8 streams against aggregated", speedup("aggregated"), "x", "at least", None),
        ]


def median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


def ttft(server: MeasuredServer, requests: int, seed: int, model: str = "pdserve") -> Summary:
    """Measure one stream of requests, one after another."""
    workload = Workload(requests, PROMPT_TOKENS, OUTPUT_TOKENS, seed=seed)
    return summarize(perf_analyzer.run(server.grpc, model, workload, "concurrency", 1))


def cost(
    server: MeasuredServer, requests: int, stream: bool, seed: int, model: str = "pdserve"
) -> Cost:
    """Measure the CPU time of the server's processes, including those that idle."""
    measured = client.run(
        Load(
            address=server.grpc,
            model=model,
            streams=CPU_STREAMS,
            requests=requests // CPU_STREAMS,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
            stream=stream,
            seed=seed,
            watch=processes.ids(server),
        )
    )
    count = len(measured.answers)
    each = {name: s / count * 1e3 for name, s in measured.server_cpu_s.items()}
    return Cost(
        stream=stream,
        requests=count,
        total_ms=round(sum(each.values()), 3),
        client_ms=round(measured.client_cpu_s / count * 1e3, 3),
        process_ms={name: round(ms, 3) for name, ms in each.items()},
    )


def streams(server: MeasuredServer, output_tokens: int, seed: int) -> Streams:
    """Measure ``STREAMS`` streams at ``TOKEN_MS`` a token, two requests in each."""
    measured = client.run(
        Load(
            address=server.grpc,
            model="pdserve",
            streams=STREAMS,
            requests=2,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=output_tokens,
            stream=True,
            seed=seed,
            watch=processes.ids(server),
        )
    )
    summary = summarize(measured.answers)
    offered = STREAMS * 1e3 / TOKEN_MS
    itl_s = statistics.fmean(itl for answer in measured.answers for itl in answer.itl)
    seconds = summary.requests / summary.requests_per_s
    return Streams(
        streams=STREAMS,
        offered_tokens_per_s=offered,
        delivered=round(TOKEN_MS / 1e3 / itl_s, 4),
        delivered_overall=round(summary.tokens_per_s / offered, 4),
        client_cpu=round(measured.client_cpu_s / seconds, 3),
        server_cpu=round(sum(measured.server_cpu_s.values()) / seconds, 3),
        summary=summary,
    )


def measure(repeats: int, *, quick: bool) -> Results:
    """Measure two servers, one after another: one whose engines do not wait, and one that waits."""
    requests = 80 if quick else 400
    with serving(deployment("instant")) as server:
        ttft(server, 100, 0)  # warm-up
        ttfts, costs = [], []
        for repeat in range(1, repeats + 1):
            with console.status(f"overhead: {repeat} of {repeats}"):
                ttfts.append(ttft(server, requests, repeat))
                costs += [cost(server, requests, stream, repeat) for stream in (True, False)]
    with serving(deployment("token_10ms"), *BASELINES) as server:
        runs = []
        for repeat in range(repeats):
            with console.status(f"{STREAMS} streams: {repeat + 1} of {repeats}"):
                runs.append(streams(server, 128 if quick else 512, repeat))
        workload = Workload(16 if quick else 48, PROMPT_TOKENS, 64)
        baselines = load.measure(server.grpc, ("pdserve", *BASELINES), workload, "concurrency", [8])
    return Results(ttfts, costs, runs, baselines)


def show(results: Results) -> None:
    """Print the tables."""
    for stream in (True, False):
        some = [one for one in results.cost if one.stream is stream]
        names = sorted(some[0].process_ms, key=lambda name: -some[0].process_ms[name])
        parts = {name: statistics.median(one.process_ms[name] for one in some) for name in names}
        console.print(
            f"CPU ms per request, {'streaming' if stream else 'one response'}: "
            + ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items() if ms >= 0.01)
            + f"; client {statistics.median(one.client_ms for one in some):.2f}"
        )
    load.show(results.baselines)
    console.print(budgets.table(results.budgets))


def run(*, quick: bool) -> list[Budget]:
    """Measure, show, and write ``perf/results/overhead.json``."""
    record = Record("overhead-quick" if quick else "overhead")
    results = measure(1 if quick else 5, quick=quick)
    show(results)
    console.print(record.write({"budgets": results.budgets, "measured": results}))
    return results.budgets


def main(
    quick: Annotated[bool, typer.Option("--quick", help="fewer requests, one repeat")] = False,
) -> None:
    """Measure the overhead of the request path, with emulated engines, so that only the path is
    measured."""
    run(quick=quick)


if __name__ == "__main__":
    typer.run(main)
