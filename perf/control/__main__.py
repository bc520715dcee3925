"""The ratio controller beside fixed ratios, on real servers with emulated engines.

    python -m perf.control [--quick] [--repeats 3] [--part PART ...]

Every setting serves the same requests: see docs/control-benchmark.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from rich.console import Console

from perf import budgets
from perf.control import controlled as control
from perf.control import mixes, report, servers, traffic
from perf.control.points import CONTROLLER, Point, point
from perf.control.traffic import Traffic
from perf.record import RESULTS, Record
from perf.scheduling import client
from perf.scheduling.servers import gateways, serving

WAY_S = 0.005
"""Seconds to a gateway and back, by which the limit in a request is reduced."""
EVERY = range(2, mixes.INSTANCES - 1)
"""Prefills of the fixed ratios: at least two of each role."""
FULL = (
    traffic.stationary(20 * 60, (3, 4, 5)),
    traffic.tide(traffic.TIDE_SCALED_S, EVERY),
    traffic.step(5 * 60),
    traffic.square(10 * 60),
)
QUICK = (
    traffic.stationary(5 * 60, (4,)),
    traffic.tide(8 * 60, (mixes.best(1), 4, mixes.best(0))),
    traffic.step(4 * 60),
    traffic.square(3 * 60),
)
PARTS = tuple(one.name for one in FULL)
WIDTH = 170
console = Console()


def controlled(wanted: Traffic, repeat: int) -> Point:
    """Measure a traffic with the controller, from half of each role."""
    chains = wanted.chains(repeat)
    deployment = servers.deployment(mixes.INSTANCES // 2, control.section())
    with serving(deployment) as server, control.controlling(server) as controller:
        addresses = [gateway.grpc for gateway in gateways(server)]
        began = time.time() + client.LEAD_S
        with servers.measuring(server) as used:
            samples = client.run(chains, addresses, way_s=WAY_S)
        told = controller.events()
    began += traffic.SETTLE_S
    changes = control.changes(told, controller.clock, began)
    texts = control.texts(told, controller.clock, began)
    return point(wanted, CONTROLLER, repeat, samples, changes, texts, used)


def fixed(wanted: Traffic, prefills: int, repeat: int) -> Point:
    """Measure a traffic with a fixed ratio."""
    chains = wanted.chains(repeat)
    with serving(servers.deployment(prefills)) as server:
        addresses = [gateway.grpc for gateway in gateways(server)]
        with servers.measuring(server) as used:
            samples = client.run(chains, addresses, way_s=WAY_S)
    return point(wanted, mixes.ratio(prefills), repeat, samples, (), (), used)


def run(wanted: Sequence[Traffic], repeats: int) -> Iterator[Point]:
    """Yield the points; the settings take turns in each repeat, so that a busy machine does not
    meet only one of them."""
    for repeat in range(repeats):
        for one in wanted:
            with console.status(f"repeat {repeat + 1} of {repeats}: {one.name}, {CONTROLLER}"):
                yield controlled(one, repeat)
            for prefills in one.prefills:
                what = f"repeat {repeat + 1} of {repeats}: {one.name}, {mixes.ratio(prefills)}"
                with console.status(what):
                    yield fixed(one, prefills, repeat)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="short traffics, few ratios")] = False,
    repeats: Annotated[int, typer.Option(help="each with requests of its own", min=1)] = 1,
    part: Annotated[list[str] | None, typer.Option(help="only this part; may be repeated")] = None,
) -> None:
    """Compare the ratio controller with fixed ratios, on real servers with emulated engines."""
    unknown = set(part or ()) - set(PARTS)
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(PARTS)}")
    name = "control-quick" if quick else "control-part" if part else "control"
    record = Record(name)
    wanted = [one for one in (QUICK if quick else FULL) if not part or one.name in part]
    points = []
    for one in run(wanted, repeats):
        points.append(one)
        console.print(
            f"{one.traffic}, {one.setting}, repeat {one.repeat + 1}: {one.good:.1%} good, "
            f"{one.failed} failed, {one.used.servers:.2f} cores"
        )
    wide = Console(width=WIDTH)
    wide.print(report.table(points))
    limits = report.limits(points)
    wide.print(budgets.table(limits))
    console.print(report.plot(points, RESULTS / f"{name}.png"))
    conditions = {
        "scale": traffic.SCALE,
        "window_s": traffic.WINDOW_S,
        "rate": round(wanted[0].rate, 2),
        "predicted": {f"{w:g}": mixes.ratio(mixes.best(w)) for w in (0, 0.25, 0.5, 0.75, 1)},
        "repeats": repeats,
    }
    results = {"conditions": conditions, "budgets": limits, "points": points}
    console.print(record.write(results))


if __name__ == "__main__":
    typer.run(main)
