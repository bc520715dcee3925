"""Measures instances that change roles under load, and beside them one that is loaded anew.

    python -m perf.role_switch [--instances 8 --gateways 2 --switches 50 --engine torch]

Flexible instances, half of them prefills at first, serve requests of every gateway without a gap,
while one after another is given the other role, by sealed messages alone. For each switch: the
seconds from the moment at which slots and leases are zero until every gateway has had a request
served by it in its new role, and the memory of its process meanwhile. In the same run and under the
same load a prefill that is not flexible becomes a decode, and back, by being unloaded, replaced in
the repository and loaded. Every answer is compared with the reference.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from pdserve.config import Role
from pdserve.node.role_switch import NotSwitched
from perf import budgets
from perf.budgets import Budget
from perf.record import Record
from perf.role_switch import reference, site
from perf.role_switch.loading import load_anew
from perf.role_switch.memory import Memory
from perf.role_switch.site import FIXED, Engine, Site
from perf.role_switch.traffic import Traffic

SERVED_S = {"emulated": 1.0, "torch": 3.0}
"""Bound from empty to a request served in the new role through every gateway."""
WITHIN_S = 60.0
"""Longest wait for such a request."""
CLIENTS = 6
"""At each gateway: more than it has prefills, so that each newcomer is needed."""
GROWN_MIB = 16.0
OVER_MIB = 96.0
"""Half the arena; the probe of a new link takes 64 MiB for a moment."""
WARM_S = 3.0
console = Console()


class Switch(Struct, frozen=True):
    """One change of a role, with times in seconds."""

    instance: str
    role: Role
    drain_s: float
    """Until it held nothing; the times below count from there."""
    assigned_s: float
    """Until the new assignment was verified."""
    served_s: list[float | None]
    """Until a request of each gateway was served in the new role."""
    memory: Memory


class Load(Struct, frozen=True):
    """One change of a role by loading."""

    role: Role
    served_s: list[float | None]


class Result(Struct, frozen=True):
    engine: Engine
    switches: list[Switch]
    not_switched: list[str]
    loads: list[Load]
    requests: int
    errors: list[str]
    wrong: int
    """Number of answers with another token than the reference."""

    @property
    def slowest_s(self) -> float:
        """Return the longest time from empty to served through every gateway; infinity: never."""
        times = [one for switch in self.switches for one in switch.served_s]
        return max((float("inf") if one is None else one for one in times), default=0.0)

    @property
    def grown_mib(self) -> float:
        """Return the largest growth of a process between two switches to the same role."""
        grown = [0.0]
        for name in {one.instance for one in self.switches}:
            for role in ("prefill", "decode"):
                sizes = [
                    one.memory.after
                    for one in self.switches
                    if (one.instance, one.role) == (name, role)
                ]
                # The first time in a role, its code and its buffers come.
                grown += [sizes[-1] - sizes[1]] if len(sizes) > 2 else []
        return max(grown)

    @property
    def over_mib(self) -> float:
        """Return the most memory that a process had during a switch beyond before and after."""
        memories = [one.memory for one in self.switches]
        return max((one.peak - max(one.before, one.after) for one in memories), default=0.0)

    def budgets(self) -> list[Budget]:
        bound = SERVED_S[self.engine]
        return [
            Budget("empty to served by every gateway", self.slowest_s, "s", "at most", bound),
            Budget("requests lost", len(self.errors), "", "at most", 0),
            Budget("wrong answers", self.wrong, "", "at most", 0),
            Budget("switches given up", len(self.not_switched), "", "at most", 0),
            Budget("growth of a process", self.grown_mib, "MiB", "at most", GROWN_MIB),
            Budget("beyond one role's memory", self.over_mib, "MiB", "at most", OVER_MIB),
        ]


async def measure(engine: Engine, made: Site, switches: int, loads: int) -> Result:
    """Switch instances of running servers under load."""
    expected = reference.answers(made.servers[0].deployment)
    addresses = [server.grpc for server in made.servers if server.spec.gateway]
    traffic = Traffic(addresses, expected, CLIENTS)
    done: list[Switch] = []
    failed: list[str] = []
    loaded: list[Load] = []
    try:
        await asyncio.sleep(WARM_S)
        for number in range(switches):
            name, role = _next(made)
            try:
                done.append(await _switch(made, traffic, name, role))
                console.print(
                    f"{number + 1}: {name} is a {role}, served: {_shown(done[-1].served_s)}"
                )
            except NotSwitched as error:
                failed.append(str(error))
                console.print(f"{number + 1}: {error}")
        for number in range(loads):
            role = "decode" if number % 2 == 0 else "prefill"
            empty_at = await load_anew(made, role)
            served = await traffic.served(FIXED, role, empty_at, WITHIN_S)
            loaded.append(Load(role, served))
            console.print(f"{FIXED} was loaded as a {role}, served: {_shown(served)}")
    finally:
        await traffic.close()
        await made.close()
    return Result(
        engine,
        done,
        failed,
        loaded,
        len(traffic.answers),
        [answer.error for answer in traffic.answers if answer.error],
        sum(not answer.right for answer in traffic.answers if not answer.error),
    )


def _next(made: Site) -> tuple[str, Role]:
    """Return the instance that is switched next, and its new role, which fewer have now."""
    prefills = sum(role == "prefill" for role in made.roles.values())
    role: Role = "prefill" if 2 * prefills <= len(made.roles) else "decode"
    candidates = [name for name, now in made.roles.items() if now != role]
    # The one that has been switched the least.
    return min(candidates, key=lambda name: made.numbers.get(name, 0)), role


async def _switch(made: Site, traffic: Traffic, name: str, role: Role) -> Switch:
    memory: list[Memory] = []
    began = asyncio.get_running_loop().time()
    async with made.own_memory(name).watched(memory):
        switched = await made.switch(name, role)
        empty_at = began + switched.drain_s
        served = await traffic.served(name, role, empty_at, WITHIN_S)
    assigned_s = switched.unlink_s + switched.assign_s
    return Switch(name, role, switched.drain_s, assigned_s, served, memory[0])


def show(result: Result) -> None:
    """Print the times of both ways, and the budgets."""
    table = Table("seconds from empty", "number", "shortest", "median", "longest")
    rows = {
        "in place: assignment verified": [one.assigned_s for one in result.switches],
        "in place: served by every gateway": [_last(one.served_s) for one in result.switches],
        "loaded anew: served by every gateway": [_last(one.served_s) for one in result.loads],
    }
    for what, found in rows.items():
        times = sorted(found)
        if times:
            shown = (times[0], times[len(times) // 2], times[-1])
            table.add_row(what, f"{len(times)}", *(f"{one:.2f}" for one in shown))
    console.print(table)
    for line in (*result.not_switched, *result.errors[:5]):
        console.print(line, style="red")
    console.print(budgets.table(result.budgets()))


def _shown(served_s: list[float | None]) -> str:
    return ", ".join("never" if one is None else f"{one:.2f} s" for one in served_s)


def _last(served_s: list[float | None]) -> float:
    return max(float("inf") if one is None else one for one in served_s)


def run(engine: Engine, instances: int, gateways: int, switches: int, loads: int) -> Result:
    """Start the servers, measure, and stop them."""
    with site.folder() as folder:
        wanted = site.deployment(engine, instances, gateways, folder, fixed=loads > 0)
        with Site.of(wanted, folder) as made:
            return asyncio.run(measure(engine, made, switches, loads))


def main(
    instances: Annotated[int, typer.Option(help="flexible instances", min=4)] = 8,
    gateways: Annotated[int, typer.Option(help="servers, each with a gateway", min=1)] = 2,
    switches: Annotated[int, typer.Option(min=1)] = 50,
    engine: Annotated[str, typer.Option(help="emulated or torch")] = "emulated",
    loads: Annotated[int, typer.Option(help="changes by loading, to compare", min=0)] = 4,
) -> None:
    """Measure instances that change roles under load, and one that is loaded anew."""
    if engine not in ("emulated", "torch"):
        raise typer.BadParameter(f"--engine {engine}; allowed: emulated, torch")
    record = Record(f"role-switch-{engine}")
    result = run("torch" if engine == "torch" else "emulated", instances, gateways, switches, loads)
    show(result)
    console.print(record.write({"budgets": result.budgets(), "result": result}))


if __name__ == "__main__":
    typer.run(main)
