"""Scheduling policies side by side, on real servers with emulated engines.

    python -m perf.scheduling [--quick] [--part PART ...] [--traces FOLDER]

Every policy serves the same requests, and so does an ideal that is computed: see
docs/scheduling-benchmark.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import Progress
from tests.servers import Running

from perf import budgets
from perf.baselines.policies import PolicyName
from perf.record import RESULTS, Record
from perf.scheduling import client, crowd, loads, rejection, report, servers
from perf.scheduling.ideal import ideal
from perf.scheduling.loads import TOKENS, TRACES, Load
from perf.scheduling.points import Point, point
from perf.scheduling.samples import Sample
from perf.scheduling.servers import PREFILLS, Layout, Offers
from perf.scheduling.workload import PROMPT_TOKEN_S, Ask

UNLOADED, CROWD = 20, 400
PUBLISHED_S = 1.2
"""Seconds within which a gateway has published its counts to Triton."""
WIDTH = 170
console = Console()


class Unloaded(NamedTuple):
    """The latency that an otherwise idle server adds, in seconds."""

    added_s: float
    """Difference between its TTFT and the prefill's time."""
    way_s: float
    """The part of it between client and server, its 90th percentile."""


def unloaded(server: Running) -> Unloaded:
    chains = [[Ask(0.0, TOKENS, 10.0, seed) for seed in range(UNLOADED)]]
    samples = client.run(chains, [server.grpc])[UNLOADED // 4 :]
    found = statistics.median(sample.ttft or 0.0 for sample in samples)
    way_s = statistics.quantiles((sample.way_s for sample in samples), n=10)[-1]
    return Unloaded(found - TOKENS * PROMPT_TOKEN_S, way_s)


def measure(server: Running, load: Load, layout: Layout, policy: PolicyName, way_s: float) -> Point:
    """Measure one load under one policy."""
    before = Offers.of(server)
    addresses = [gateway.grpc for gateway in servers.gateways(server)]
    samples = client.run(load.chains, addresses, load.until, way_s)
    time.sleep(PUBLISHED_S)
    after = Offers.of(server)
    offers = Offers(after.made - before.made, after.rejected - before.rejected)
    return point(load, layout, policy, samples, offers)


def ideals(load: Load) -> Iterator[Point]:
    """Yield the ideal results: in each layout, in the order of arrival and in that of the
    limits."""
    for layout in load.layouts:
        for policy, by_limit in (("ideal", False), ("ideal by limit", True)):
            samples: list[Sample] = []
            if layout == "groups":
                for scenario in servers.SCENARIOS:
                    mine = [chain for chain in load.chains if chain[0].scenario == scenario]
                    samples += ideal(mine, PREFILLS // len(servers.SCENARIOS), by_limit=by_limit)
            else:
                samples = ideal(load.chains, PREFILLS, load.until, by_limit=by_limit)
            if layout == "gateways":
                for number, sample in enumerate(samples):
                    sample.gateway = number % servers.GATEWAYS
            yield point(load, layout, policy, samples, None)


def run(
    effort: loads.Effort, traces: Path | None, parts: Collection[str]
) -> tuple[Unloaded, list[budgets.Budget], list[Point]]:
    """Measure every load on every server that it is for; an unloaded server is measured first.

    Args:
        parts: only these parts; empty: all.
    """

    def wants(load: Load, layout: Layout, policy: PolicyName) -> bool:
        return layout in load.layouts and policy in load.policies

    places: list[tuple[Layout, PolicyName]] = [("pool", policy) for policy in effort.policies]
    places += [("groups", "on_demand"), ("gateways", "on_demand")]
    idle, wanted, points = Unloaded(0.0, 0.0), list[Load](), list[Point]()
    rejected: list[budgets.Budget] = []
    with Progress(console=console) as progress:
        bar = progress.add_task("starts", total=None)
        for layout, policy in places:
            if wanted and not any(wants(load, layout, policy) for load in wanted):
                continue
            progress.update(bar, description=f"{layout}, {policy}: starts")
            with servers.serving(servers.deployment(layout), policy) as server:
                if not wanted:
                    idle, rejected = unloaded(server), rejection.cost(server)
                    every = loads.all_of(effort, idle.added_s, traces)
                    wanted = [load for load in every if not parts or load.part in parts]
                    seconds = [one.seconds * len(one.layouts) * len(one.policies) for one in wanted]
                    progress.update(bar, total=sum(seconds))
                    points += [one for load in wanted for one in ideals(load)]
                for load in wanted:
                    if wants(load, layout, policy):
                        what = f"{layout}, {policy}: {load.part} {load.level}"
                        progress.update(bar, description=what)
                        points.append(measure(server, load, layout, policy, idle.way_s))
                        progress.advance(bar, load.seconds)
    return idle, rejected, points


def main(
    quick: Annotated[bool, typer.Option("--quick", help="two policies, few requests")] = False,
    part: Annotated[list[str] | None, typer.Option(help="only this part; may be repeated")] = None,
    traces: Annotated[
        Path | None,
        typer.Option(envvar="PDSERVE_TRACES", help=f"folder with {', '.join(TRACES.values())}"),
    ] = None,
) -> None:
    """Compare scheduling policies side by side, on real servers with emulated engines."""
    unknown = set(part or ()) - set(loads.PARTS)
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(loads.PARTS)}")
    name = "scheduling-quick" if quick else "scheduling-part" if part else "scheduling"
    missing = [file for file in TRACES.values() if traces and not (traces / file).exists()]
    if missing:
        raise typer.BadParameter(f"{', '.join(missing)}: not in {traces}")
    record = Record(name)
    if traces is None:
        console.print("public traces: left out; --traces or PDSERVE_TRACES names their folder")
    with console.status("many instances"):
        costs = crowd.costs(CROWD // 4 if quick else CROWD)
    idle, rejected, points = run(loads.QUICK if quick else loads.FULL, traces, part or ())
    wide = Console(width=WIDTH)
    wide.print(report.table(points))
    console.print(costs)
    limits = [*report.limits(points), *rejected, *crowd.limits(costs)]
    wide.print(budgets.table(limits))
    console.print(report.plot(points, RESULTS / f"{name}.png"))
    results = {
        "added_ms": round(idle.added_s * 1e3, 2),
        "way_ms": round(idle.way_s * 1e3, 2),
        "budgets": limits,
        "points": points,
        "crowd": costs,
    }
    console.print(record.write(results))


if __name__ == "__main__":
    typer.run(main)
