"""Node agents of the queue model: they make instances what is desired, and report them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from pdserve.control.assignment import Assignment
from pdserve.control.records import DesiredInstance, ObservedInstance, Phase

if TYPE_CHECKING:
    from tests.control_model.instances import Instance
    from tests.control_model.world import World

LOOK_S = 0.2
"""Time after which an agent notices another desired state."""


@dataclass
class Times:
    """How long things take."""

    switch_s: float = 1.0
    """Another assignment in a process that runs."""
    load_s: float = 20.0
    drain_s: float = 30.0
    repair_s: float = 4.0
    """Until a process that ended has been noticed; then it is loaded."""


@dataclass
class Agents:
    """The agents of all hosts."""

    world: World
    desired: dict[str, DesiredInstance]
    """Their view of the store; it stays while that is gone."""
    times: Times = field(default_factory=Times)
    gone: set[str] = field(default_factory=set)
    """Hosts whose agent is dead."""
    broken: set[str] = field(default_factory=set)
    """Instances whose process cannot be loaded."""
    stuck: set[str] = field(default_factory=set)
    """Instances that cannot take another role."""

    def __post_init__(self) -> None:
        self.world.on_drained = self.look

    def look(self, name: str) -> None:
        """Notice soon that something may have to be done with an instance."""
        self.world.at(self.world.now + LOOK_S, partial(self._reconcile, name))

    def kill(self, name: str) -> None:
        """End an instance's process; its agent starts it again."""
        one = self.world.instances[name]
        one.process, one.phase = "loading", Phase.UNASSIGNED
        one.busy_until = float("inf")
        self.world.changed()
        self.world.requeue(one)
        one.restart()
        one.epoch += 1
        self.world.at(self.world.now + self.times.repair_s, partial(self._load, one))
        self.world.changed()

    def observed(self, one: Instance) -> ObservedInstance:
        return ObservedInstance(
            host=one.host,
            server=one.host,
            address=one.host,
            kind=one.kind,
            state=one.process,
            epoch=str(one.epoch),
            assignment=one.assignment if one.process == "ready" else None,
            phase=one.phase,
            used=one.used,
            leases=len(one.leased),
            reason=one.reason,
        )

    def _reconcile(self, name: str) -> None:
        world, one, wanted = self.world, self.world.instances[name], self.desired.get(name)
        if wanted is None or one.host in self.gone or world.now < one.busy_until:
            return
        if one.process == "failed" and name in self.broken and wanted.state != "absent":
            return
        if one.process in ("absent", "failed"):
            one.process = "absent"
            if wanted.state != "absent":
                one.process = "loading"
                self._load(one)
            return
        self._accept(one, wanted)
        number = one.assignment.number if one.assignment else 0
        if one.phase in (Phase.DRAINED, Phase.UNASSIGNED):
            if wanted.state == "absent":
                self._busy(one, self.times.load_s / 4, self._unloaded)
            elif wanted.assignment.number > number and wanted.state == "serving":
                self._busy(one, self.times.switch_s, partial(self._assigned, wanted.assignment))
        world.changed()

    def _accept(self, one: Instance, wanted: DesiredInstance) -> None:
        """Let an instance drain, or serve again."""
        world, number = self.world, one.assignment.number if one.assignment else 0
        leaves = wanted.assignment.number > number or wanted.state != "serving"
        if one.phase is Phase.SERVING and leaves:
            one.phase = Phase.DRAINING
            world.changed()
            one.drain_until = world.now + self.times.drain_s
            world.at(one.drain_until, partial(self._hand_off, one, one.drain_until))
            world.empty(one)
        elif one.phase in (Phase.DRAINING, Phase.DRAINED) and not leaves:
            one.phase = Phase.SERVING
            world.changed()
            if wanted.assignment.group:
                world.dispatch(wanted.assignment.group)

    def _hand_off(self, one: Instance, until: float) -> None:
        """Let what is left of a drain go on elsewhere: its time is over."""
        if one.phase is Phase.DRAINING and one.drain_until == until:
            self.world.requeue(one)
            self.world.empty(one)

    def _busy(self, one: Instance, seconds: float, then: Callable[[Instance], None]) -> None:
        epoch = one.epoch
        one.busy_until = self.world.now + seconds

        def end() -> None:
            if one.epoch == epoch:
                one.busy_until = 0.0
                then(one)
                self._again(one)

        self.world.at(one.busy_until, end)

    def _again(self, one: Instance) -> None:
        """Go on with what is desired by now."""
        self._reconcile(one.name)
        self.world.changed()

    def _load(self, one: Instance) -> None:
        self._busy(one, self.times.load_s, self._loaded)

    def _loaded(self, one: Instance) -> None:
        if one.name in self.broken:
            one.process, one.reason = "failed", "the model cannot be loaded"
            one.failed_since = self.world.now
            return
        one.process, one.reason, one.failed_since = "ready", "", None
        one.phase = Phase.UNASSIGNED
        one.epoch += 1
        last = one.assignment
        if last is not None and last.role != "none":
            self._serve(one, last)

    def _unloaded(self, one: Instance) -> None:
        one.process, one.assignment, one.phase = "absent", None, Phase.UNASSIGNED

    def _assigned(self, assignment: Assignment, one: Instance) -> None:
        if one.name in self.stuck and one.assignment and assignment.role != one.assignment.role:
            return
        self._serve(one, assignment)

    def _serve(self, one: Instance, assignment: Assignment) -> None:
        one.assignment = assignment
        one.at = self.world.now
        one.phase = Phase.UNASSIGNED if assignment.role == "none" else Phase.SERVING
        self.world.changed()
        if assignment.group:
            self.world.dispatch(assignment.group)
