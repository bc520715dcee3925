"""The faults of a world: what goes wrong, and when."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tests.simulation.gateways import Gateway

if TYPE_CHECKING:
    import random

    from tests.simulation.channels import Life, Worker
    from tests.simulation.plan import Plan
    from tests.simulation.world import World

Kind = Literal[
    "kill",  # its connections break, and all that it had is gone; a new life follows
    "vanish",  # the same, but nobody is told: what is sent there is lost
    "stop",  # nothing moves, as by SIGSTOP; then all that has become due happens at once
    "cut",  # no message gets through for a while; then all of them do at once
    "reset",  # a connection breaks, and what was on its way is lost
    "part",  # a decode does not reach a prefill's memory
    "bad forward",
    "bad step",
    "bad join",  # what has arrived in a decode is not what it should be
    "leave",  # an instance leaves the group of a gateway, and joins it again
    "take",  # a gateway has other scenarios and groups for a while
    "move",  # an instance is drained, and gets another assignment
]


@dataclass(frozen=True)
class Fault:
    """A fault that happens `at` a moment to `one` process, or between two."""

    at: float
    kind: Kind
    one: str
    other: str = ""
    lasts: float = 0.0
    """The number of seconds until it is over."""

    def __str__(self) -> str:
        between = f" and {self.other}" if self.other else ""
        lasts = f" for {self.lasts:.3f} s" if self.lasts else ""
        return f"{self.kind} {self.one}{between}{lasts} at {self.at:.4f}"


def draw(plan: Plan, until: float, rng: random.Random) -> Fault:
    """Draw one fault of a plan that happens before `until`."""
    at = rng.uniform(0.0, until)
    prefill = f"prefill_{rng.randrange(plan.prefills)}"
    decode = f"decode_{rng.randrange(plan.decodes)}"
    gateway = f"gateway_{rng.randrange(plan.gateways)}"
    worker = rng.choice((prefill, decode))
    shortly, a_while = 10 ** rng.uniform(-3, -0.5), rng.uniform(0.2, 7.0)
    lasts = rng.choice((shortly, shortly, a_while))
    kinds = ("kill", "kill", "vanish", "stop", "stop", "cut", "reset", "gateway", "part", "engine")
    match rng.choice(kinds):
        case "kill":
            return Fault(at, "kill", worker, lasts=lasts)
        case "vanish":
            return Fault(at, "vanish", worker, lasts=lasts)
        case "stop":
            return Fault(at, "stop", rng.choice((worker, worker, gateway)), lasts=lasts)
        case "cut":
            return Fault(at, "cut", gateway, worker, lasts)
        case "reset":
            return Fault(at, "reset", gateway, worker)
        case "gateway" if plan.gateways > 1:
            return Fault(at, "kill", gateway, lasts=lasts)
        case "part":
            return Fault(at, "part", prefill, decode, lasts)
        case _:
            kind: Kind = rng.choice(("bad forward", "bad step", "bad join"))
            return Fault(at, kind, prefill if kind == "bad forward" else decode)


def leave(plan: Plan, until: float, rng: random.Random) -> Fault:
    """Draw a fault in which an instance leaves a group that has others of its role."""
    at, lasts = rng.uniform(0.0, until), 10 ** rng.uniform(-3, 0.5)
    roles = [
        (role, count)
        for role, count in (("prefill", plan.prefills), ("decode", plan.decodes))
        if count > 1
    ]
    role, count = rng.choice(roles)
    gateway = f"gateway_{rng.randrange(plan.gateways)}"
    return Fault(at, "leave", gateway, f"{role}_{rng.randrange(count)}", lasts)


def take(plan: Plan, layout: int, until: float, rng: random.Random) -> Fault:
    """Draw a fault in which a gateway serves by another layout for a while."""
    at, lasts = rng.uniform(0.0, until), 10 ** rng.uniform(-3, 0.5)
    return Fault(at, "take", f"gateway_{rng.randrange(plan.gateways)}", f"{layout}", lasts)


async def play(world: World, fault: Fault) -> None:
    """Cause a fault, and return when it is over. A process that is not there cannot fail."""
    worker = world.workers.get(fault.one)
    if worker is not None:
        await _to_worker(world, worker, fault)
        return
    gateway = world.gateways[int(fault.one.rpartition("_")[2])]
    if gateway is not None:
        await _to_gateway(world, gateway, fault)


def forgive(life: Life) -> None:
    """Cancel the failures that were caused in an engine but have not happened yet."""
    engine: Any = life.instance._engine
    engine.failures.clear()
    getattr(engine, "refusals", []).clear()


async def _to_worker(world: World, worker: Worker, fault: Fault) -> None:
    workers, life = world.workers, worker.life
    match fault.kind:
        case "move":
            await world.moves.move(worker, fault.other, fault.lasts)
        case "part":
            workers.part(fault.one, fault.other, fault.lasts)
            await asyncio.sleep(fault.lasts)
        case _ if life is None:
            return
        case "kill" | "vanish":
            silently = fault.kind == "vanish"
            await workers.kill(worker, silently)
            for gateway in world.gateways:
                for wire in gateway.to(worker.name) if gateway else ():
                    connection = wire.connection
                    if connection and connection.life is life and not silently:
                        connection.break_("connection reset")
            await asyncio.sleep(fault.lasts)
            workers.start(worker)
        case "stop":
            await _stop(life.process, fault.lasts)
        case _:
            engine: Any = life.instance._engine
            failures = engine.refusals if fault.kind == "bad join" else engine.failures
            failures.append(RuntimeError(fault.kind))


async def _to_gateway(world: World, gateway: Gateway, fault: Fault) -> None:
    match fault.kind:
        case "kill":
            world.gateways[gateway.number] = None
            for wire in gateway.channels:
                wire.lose()
            await gateway.process.end()
            await asyncio.sleep(fault.lasts)
            world.gateways[gateway.number] = Gateway(world, gateway.number)
        case "stop":
            await _stop(gateway.process, fault.lasts)
        case "leave":
            gateway.process.begin(gateway.leave(fault.other, fault.lasts))
            await asyncio.sleep(fault.lasts)
        case "take":
            gateway.process.begin(gateway.take(int(fault.other), fault.lasts))
            await asyncio.sleep(fault.lasts)
        case "cut":
            for wire in gateway.to(fault.other):
                wire.cut_until = world.loop.time() + fault.lasts
            await asyncio.sleep(fault.lasts)
        case _:
            for wire in gateway.to(fault.other):
                wire.lose()


async def _stop(process: Any, seconds: float) -> None:
    if process.runs:
        process.stop()
        await asyncio.sleep(seconds)
        if process.alive:
            process.go_on()
