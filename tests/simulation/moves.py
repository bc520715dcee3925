"""Instances that are drained and get other assignments in the middle of a world."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

from pdserve.control.assignment import ANY, Assignment
from pdserve.control.records import Phase
from pdserve.rpc.messages import Assign, Drain, Reassigned, Resume
from pdserve.transfer.producer.lease_manager import QUIET_S
from tests.simulation.faults import Fault
from tests.unit.inprocess import process

if TYPE_CHECKING:
    from tests.simulation.channels import Worker
    from tests.simulation.plan import Plan
    from tests.simulation.world import World

LOOK_S = 0.02
CALM_S = 60.0
"""Limit of a drain where nothing may be given up; longer than any request takes."""
BACK = "back"
"""The place of a fault's group where an instance only resumes."""


def draw(plan: Plan, until: float, rng: random.Random) -> list[Fault]:
    """Draw faults in which an instance is drained, and then joins a group of the layout."""
    groups = [group for scenario in plan.layouts[0] for group in scenario.groups]
    members = [some for group in groups for some in (group.prefill, group.decode) if len(some) > 1]
    names = [name for some in members for name in some]
    places = [*(group.name for group in groups), BACK]
    limits = (CALM_S,) if plan.calm else (0.0, 0.0, 0.01, 0.1, CALM_S)
    drawn = []
    for _ in range(rng.choice((1, 2, 4)) if names else 0):
        at, name = rng.uniform(0.0, until), rng.choice(names)
        drawn.append(Fault(at, "move", name, rng.choice(places), rng.choice(limits)))
    return drawn


class Moves:
    """Moves the instances of one world, one at a time, as a node agent does."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._one = asyncio.Lock()

    async def move(self, worker: Worker, group: str, within_s: float) -> None:
        """Drain an instance, whatever happens to it meanwhile, and let it serve again.

        Nothing is done if it is the last one of its role in its group.
        """
        async with self._one:
            role, here = worker.assignment.role, worker.assignment.group
            some = [one.assignment for one in self._world.workers]
            if sum((one.role, one.group) == (role, here) for one in some) < 2:
                return
            former = worker.assignment
            to = here if group == BACK else group
            wanted = Assignment(former.number + 1, former.role, to)
            said: list[Any] = []
            bounds, now = self._world.invariants.bounds, self._world.loop.time
            began, number = now(), former.number
            limit = within_s + QUIET_S + 2 * bounds.forward + bounds.orphan + 2.0
            while True:
                await asyncio.sleep(LOOK_S)
                life = worker.life
                if life is None or not life.process.runs:
                    began = now()  # a new life knows nothing of its drain
                    continue
                phase, one = life.assigned.phase, process(worker.name)
                if worker.assignment == wanted:
                    break
                if phase is Phase.SERVING:
                    said.append(Drain("drain", one, number, within_s))
                    began = now()
                elif phase is Phase.DRAINED and group == BACK:
                    self._send(worker, Resume("resume", one, number))
                    return
                elif phase is Phase.DRAINED:
                    said.append(Assign("assign", one, number, wanted))
                elif now() > began + limit:
                    told = f"{worker.name} drains for {now() - began:.3f} s"
                    self._world.invariants.expect(False, told)
                    return
                else:
                    continue
                self._send(worker, said[-1])
            for replayed in said:
                reply = self._send(worker, replayed)
                same = isinstance(reply, Reassigned) and reply.assignment == wanted
                told = f"{worker.name} answers {reply} to a message of the past"
                self._world.invariants.expect(same, told)

    def _send(self, worker: Worker, message: Any) -> Any:
        life, replies = worker.life, list[Any]()
        assert life is not None
        handle = life.assigned.handle
        life.process.run(handle, ANY, message, "agent", lambda reply, _: replies.append(reply))
        return replies[0]
