"""Runs of the queue model: a load, a deployment, faults, and what came of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pdserve.control.assignment import Assignment
from pdserve.control.events import Event
from pdserve.control.policy import Policy
from pdserve.control.records import (
    DESIRED_GROUPS,
    DESIRED_INSTANCES,
    DesiredGroup,
    DesiredInstance,
    Phase,
)
from tests.control_model.agents import Agents, Times
from tests.control_model.control import Controller
from tests.control_model.instances import Instance
from tests.control_model.requests import Load, Request, arrivals
from tests.control_model.world import Result, World

GROUP = "chat"
TTFT_S, TPOT_S = 12.0, 0.050
"""Limits of both latencies. A step with a full batch takes 36 ms."""
TAIL_S = 120.0
"""Time after the last arrival in which what is left ends."""


@dataclass
class Run:
    """One run."""

    world: World
    agents: Agents
    controller: Controller
    changes: list[tuple[float, int]] = field(default_factory=list)
    """Each transaction that changed the ratio: when it began, and the change of prefills."""

    @property
    def result(self) -> Result:
        return self.world.result

    @property
    def prefills(self) -> int:
        return len(self.world.members(GROUP, "prefill"))

    @property
    def decodes(self) -> int:
        return len(self.world.members(GROUP, "decode"))

    def reversals(self, within_s: float = 120.0) -> int:
        """Return the number of changes that went back less than this time after the one before."""
        pairs = zip(self.changes, self.changes[1:], strict=False)
        return sum(b[0] - a[0] <= within_s and a[1] * b[1] < 0 for a, b in pairs)


def make(
    load: Load,
    prefills: int,
    seed: int,
    *,
    policy: Policy | None = None,
    times: Times | None = None,
    spares: int = 0,
    absent: int = 0,
) -> Run:
    """Return a run that has not begun: one group of flexible instances, each on its own host.

    Args:
        spares: instances that are loaded and idle.
        absent: instances that are not loaded.
    """
    times = times or Times()
    policy = policy or Policy(drain_s=times.drain_s, load_s=2 * times.load_s + 10)
    count = load.instances
    instances = [
        Instance(f"i{n:02d}", f"host{n:02d}", "flexible") for n in range(count + spares + absent)
    ]
    world = World(instances, [GROUP], TTFT_S, TPOT_S)
    agents = Agents(world, {}, times)
    controller = Controller(world, agents, policy, TTFT_S)
    controller.store[DESIRED_GROUPS + GROUP] = DesiredGroup("chat")
    for n, one in enumerate(instances):
        group = GROUP if n < count else ""
        role = "none" if n >= count else "prefill" if n < prefills else "decode"
        state = "serving" if n < count + spares else "absent"
        wanted = DesiredInstance(Assignment(1, role, group), state)
        controller.store[DESIRED_INSTANCES + one.name] = wanted
        agents.desired[one.name] = wanted
        if state == "absent":
            one.process = "absent"
        else:
            one.assignment = wanted.assignment
            one.phase = Phase.SERVING if group else Phase.UNASSIGNED
    run = Run(world, agents, controller)
    feed(world, GROUP, arrivals(load, seed))
    return run


def feed(world: World, group: str, requests: Iterator[Request]) -> None:
    """Let requests arrive, one after the other."""

    def arrive(request: Request) -> None:
        world.arrive(group, request)
        following = next(requests, None)
        if following is not None:
            world.at(following.arrived, lambda: arrive(following))

    one = next(requests, None)
    if one is not None:
        world.at(one.arrived, lambda: arrive(one))


def go(run: Run, load: Load, *, act: bool = True) -> Run:
    """Let a run happen; without ``act`` there is no controller."""
    if act:
        run.controller.begin()
    run.world.run(load.seconds)
    run.world.run(load.seconds + TAIL_S)
    run.changes = changes(run.controller.events)
    return run


def changes(events: list[Event]) -> list[tuple[float, int]]:
    """Return the transactions that changed a ratio."""
    found = []
    for event in events:
        if event.what == "begin" and event.text.startswith("ratio"):
            more = event.numbers["target_prefills"] > event.numbers["prefills"]
            found.append((event.at, len(event.instances) if more else -len(event.instances)))
    return found
