"""Gives one instance another assignment, perhaps with another role, by messages alone.

    INSPECT ──► DRAIN ──► UNLINK ──► ASSIGN ──► VERIFY ──► done
       │          │          │          │          │
       │          └──────────┴──────────┴──────────┴──► RESUME ──► NotSwitched
       └──► NotSwitched

    DRAIN    the instance accepts nothing more; until slots and leases are zero
    UNLINK   every decode that may have met a prefill closes its link, and says so
    ASSIGN   only now it gives back the memory of the former role, and takes that of the other
    VERIFY   an instance that has done nothing also answers fast: it is asked what it is
    RESUME   it serves again under its former assignment; decodes connect to it again

Each message has a time limit, and each is bound to the process and to its present assignment, so
that a switch that was given up changes nothing later. Nothing is kept between two switches: one
that was interrupted is begun anew, and a step that is done already takes no time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from pdserve.control.assignment import Assignment
from pdserve.control.records import Phase
from pdserve.errors import InstanceError, PDServeError
from pdserve.node.instance_calls import ASSIGN_S, REPLY_S, UNLINK_S, ask, new_id
from pdserve.rpc.client import Channel
from pdserve.rpc.messages import Assign, Drain, Inspect, Inspected, Resume, Unlink, Unlinked

SETTLE_S = 10.0
"""Seconds after the end of a drain in which what was given up is let go of; the longest is a KV
cache whose reader has fallen silent (`lease_manager.QUIET_S`)."""
LOOK_S = 0.02
"""Interval of the looks at what a draining instance still holds."""


class Step(Enum):
    INSPECT = "inspect"
    DRAIN = "drain"
    UNLINK = "unlink"
    ASSIGN = "assign"
    VERIFY = "verify"
    RESUME = "resume"


class NotSwitched(PDServeError):
    """The instance has kept its assignment, and serves under it if it could be reached.

    Args:
        silent: the decodes that have not said that they have closed their link.
    """

    def __init__(self, instance: str, step: Step, why: str, silent: Sequence[str] = ()) -> None:
        super().__init__(f"{instance} is not switched: {step.value}: {why}")
        self.step = step
        self.silent = tuple(silent)


@dataclass(frozen=True)
class Switched:
    """A switch that was done, with the seconds of its steps."""

    before: Inspected
    after: Inspected
    drain_s: float
    """Seconds until slots and leases were zero."""
    unlink_s: float
    assign_s: float
    """Seconds until the new assignment was verified."""


class RoleSwitch:
    """The switch of one instance; used once.

    Args:
        channel: returns a channel to an instance, whatever its assignment
            (`pdserve.control.assignment.ANY`).
        decodes: the decodes that may have a link to it: all that have been in its group.
        within_s: seconds after which what is left of a drain goes on elsewhere.
    """

    def __init__(
        self,
        instance: str,
        channel: Callable[[str], Channel],
        decodes: Sequence[str],
        within_s: float,
    ) -> None:
        self._name = instance
        self._channel = channel
        self._own = channel(instance)
        self._decodes = [name for name in decodes if name != instance]
        self._within_s = within_s
        self.step = Step.INSPECT

    async def run(self, wanted: Assignment) -> Switched:
        """Give the instance this assignment, whose number is higher than its present one.

        Raises:
            NotSwitched: it has not been done; the instance serves as before, if it answers.
        """
        loop = asyncio.get_running_loop()
        try:
            began = loop.time()
            before = await ask(self._own, Inspect(new_id()), Inspected, REPLY_S)
            if before.assignment == wanted:
                self._check(before, wanted)
                return Switched(before, before, 0.0, 0.0, 0.0)
            held = before
            if before.phase is not Phase.UNASSIGNED:
                held = await self._drain(before)
            drained = loop.time()
            self.step = Step.UNLINK
            await self._unlink(held)
            unlinked = loop.time()
            after = await self._assign(held, wanted)
            return Switched(
                before, after, drained - began, unlinked - drained, loop.time() - unlinked
            )
        except (NotSwitched, InstanceError) as error:
            failed, at = error, self.step
        if at is not Step.INSPECT:
            self.step = Step.RESUME
            with contextlib.suppress(InstanceError):  # it is lost, and no longer ours to repair
                await ask(
                    self._own,
                    Resume(new_id(), before.epoch, before.assignment.number),
                    Inspected,
                    REPLY_S,
                )
        if isinstance(failed, NotSwitched):
            raise failed
        raise NotSwitched(self._name, at, str(failed)) from failed

    async def _drain(self, present: Inspected) -> Inspected:
        self.step = Step.DRAIN
        number = present.assignment.number
        drain = Drain(new_id(), present.epoch, number, self._within_s)
        found = await ask(self._own, drain, Inspected, REPLY_S)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._within_s + SETTLE_S
        while found.phase is not Phase.DRAINED:
            if loop.time() > deadline or found.phase is not Phase.DRAINING:
                held = f"{found.phase.value}, {found.used} slots and {found.leases} leases are held"
                raise NotSwitched(self._name, self.step, held)
            await asyncio.sleep(LOOK_S)
            found = await ask(self._own, Inspect(new_id()), Inspected, REPLY_S)
            if (found.epoch, found.assignment.number) != (present.epoch, number):
                raise NotSwitched(self._name, self.step, "it has another process or assignment")
        return found

    async def _unlink(self, prefill: Inspected) -> None:
        """Have every decode close its link to the memory that is going to be given back."""
        if not prefill.memory:
            return
        number = prefill.assignment.number
        answers = await asyncio.gather(
            *(
                ask(
                    self._channel(decode),
                    Unlink(new_id(), self._name, prefill.memory, number),
                    Unlinked,
                    UNLINK_S,
                )
                for decode in self._decodes
            ),
            return_exceptions=True,
        )
        silent = {
            name: answer
            for name, answer in zip(self._decodes, answers, strict=True)
            if isinstance(answer, BaseException)
        }
        if silent:
            why = "; ".join(f"{name}: {error}" for name, error in silent.items())
            raise NotSwitched(self._name, self.step, f"linked still: {why}", [*silent])

    async def _assign(self, present: Inspected, wanted: Assignment) -> Inspected:
        self.step = Step.ASSIGN
        assign = Assign(new_id(), present.epoch, present.assignment.number, wanted)
        await ask(self._own, assign, Inspected, ASSIGN_S)
        self.step = Step.VERIFY
        found = await ask(self._own, Inspect(new_id()), Inspected, REPLY_S)
        self._check(found, wanted)
        return found

    def _check(self, found: Inspected, wanted: Assignment) -> None:
        serving = Phase.UNASSIGNED if wanted.role == "none" else Phase.SERVING
        if (found.assignment, found.phase) != (wanted, serving):
            why = f"it has {found.assignment}, and is {found.phase.value}"
            raise NotSwitched(self._name, self.step, why)
