"""Load test with perf_analyzer: TTFT, ITL, E2E and throughput of models of a running server.

    python -m perf.load --concurrency 1:16:5
    python -m perf.load --rate 5:20:5 --output-tokens 64
    python -m perf.load --baselines          # starts a server of its own, see below

ITL is defined in ``perf.answers``. With ``--baselines`` the same load is put on pdserve and on the
two baselines of ``perf/baselines``, one after another in one server with emulated engines.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Annotated

import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from perf import perf_analyzer
from perf.answers import Summary, summarize
from perf.perf_analyzer import Kind, Workload
from perf.record import Record
from perf.serving import deployment, serving

INT32 = (1 << 31) - 1
"""The largest number that the tensors of a request hold."""
BASELINES = ("serial_bls", "aggregated")
PERCENTILES = ("p50", "p90", "p99")
console = Console()


class Level(Struct):
    """The results of one model under one level of load."""

    model: str
    level: str
    summary: Summary


def measure(
    address: str, models: Sequence[str], workload: Workload, kind: Kind, levels: Sequence[float]
) -> list[Level]:
    """Put the same load on each model; show progress on a terminal."""
    measured = []
    for model, level in itertools.product(models, levels):
        with console.status(f"{model}, {kind} {level:g}"):
            answers = perf_analyzer.run(address, model, workload, kind, level)
        unit = "/s" if kind == "request-rate" else ""
        measured.append(Level(model, f"{level:g}{unit}", summarize(answers)))
    return measured


def levels(text: str) -> list[float]:
    """Parse ``from:to:step`` like perf_analyzer, both ends included; ``from`` alone is one level.

    Raises:
        typer.BadParameter: the text has another form.
    """
    try:
        first, *rest = map(float, text.split(":"))
        last, step = rest or (first, 1.0)
        count = int((last - first) / step + 1e-9) + 1
    except (ValueError, ZeroDivisionError):
        first = count = 0
    if first <= 0 or count < 1:
        raise typer.BadParameter(f"{text!r}; from:to:step is allowed, all above 0, as in 1:9:4")
    return [first + n * step for n in range(count)]


def show(levels: Sequence[Level]) -> None:
    """Print four lines for each level."""
    table = Table("model", "load", "per second", "ms", *PERCENTILES)
    for level in levels:
        one = level.summary
        rates = (
            f"{one.requests_per_s:.1f} requests",
            f"{one.tokens_per_s:.0f} tokens",
            f"{one.responses_per_s:.0f} responses",
            "",
        )
        times = {"TTFT": one.ttft_ms, "ITL": one.itl_ms, "gap": one.gap_ms, "E2E": one.e2e_ms}
        for number, (name, value) in enumerate(times.items()):
            names = (level.model, level.level) if number == 0 else ("", "")
            cells = [f"{getattr(value, p):.1f}" if value else "-" for p in PERCENTILES]
            table.add_row(*names, rates[number], name, *cells, end_section=name == "E2E")
    console.print(table)


def main(
    address: Annotated[str, typer.Option(help="gRPC address of a running server")] = (
        "127.0.0.1:8001"
    ),
    model: Annotated[list[str] | None, typer.Option(help="[default: pdserve]")] = None,
    concurrency: Annotated[str, typer.Option(help="from:to:step")] = "1:9:4",
    rate: Annotated[str, typer.Option(help="requests per second, instead: from:to:step")] = "",
    requests: Annotated[int, typer.Option(help="at each level", min=1)] = 100,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=INT32)] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, max=INT32)] = 64,
    stream: bool = True,
    baselines: Annotated[bool, typer.Option("--baselines", help="compare with them")] = False,
    profile: Annotated[str, typer.Option(help="of perf/profiles, for --baselines")] = "token_10ms",
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="in perf/results/load.json, which git knows, not load-part.json"
        ),
    ] = False,
) -> None:
    """Load test with perf_analyzer: TTFT, ITL, E2E and throughput of models of a running server.

    With --baselines the same load is put on pdserve and on the two baselines of perf/baselines, one
    after another, in a separate server with emulated engines.
    """
    record = Record("load" if keep else "load-part")
    workload = Workload(
        requests, prompt_tokens, output_tokens, stream, seed=random.randrange(1 << 30)
    )
    kind: Kind = "request-rate" if rate else "concurrency"
    asked = levels(rate or concurrency)
    if baselines:
        with serving(deployment(profile), *BASELINES) as server:
            measured = measure(server.grpc, ("pdserve", *BASELINES), workload, kind, asked)
    else:
        measured = measure(address, model or ["pdserve"], workload, kind, asked)
    show(measured)
    console.print(record.write({"workload": workload, "levels": measured}))


if __name__ == "__main__":
    typer.run(main)
