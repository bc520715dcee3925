"""What a trial shows, and what holds after every one."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.control.decide import decide
from pdserve.control.memory import Memory
from pdserve.control.records import DESIRED_INSTANCES, DesiredInstance, Phase
from pdserve.control.transaction import Transaction
from tests.control_model.runs import GROUP, Run


@dataclass
class Outcome:
    """One trial with one seed."""

    trial: str
    seed: int
    slo: float
    """Share of requests within both limits, in percent; expired ones count as misses."""
    changes: int
    """Transactions that changed the ratio."""
    hours: float
    reversals: int
    failed: int
    broken: list[str] = field(default_factory=list)
    """What does not hold."""
    extra: dict[str, float] = field(default_factory=dict)

    def expect(self, holds: bool, text: str) -> None:
        if not holds:
            self.broken.append(text)


def outcome(trial: str, seed: int, run: Run, hours: float) -> Outcome:
    """Return what a run shows, with what holds after every run."""
    found = Outcome(
        trial,
        seed,
        run.result.slo,
        len(run.changes),
        hours,
        run.reversals(),
        run.result.failed,
    )
    found.expect(run.result.failed == 0, f"{run.result.failed} requests failed")
    left = sum(len(line.waiting) + len(line.ready) for line in run.world.lines.values()) + sum(
        one.used + len(one.leased) for one in run.world.instances.values()
    )
    found.expect(left == 0, f"{left} requests never ended")
    _settled(run, found)
    return found


def _settled(run: Run, found: Outcome) -> None:
    """Expect a state that a new controller would choose again."""
    controller = run.controller
    if not controller.events and not controller.memory.groups:
        return  # it ran without a controller
    open_ = [one for one in controller.store.values() if isinstance(one, Transaction)]
    found.expect(not open_, f"a transaction is not over: {open_}")
    for key, record in controller.store.items():
        if not isinstance(record, DesiredInstance) or record.assignment.group != GROUP:
            continue
        one = run.world.instances[key.removeprefix(DESIRED_INSTANCES)]
        serves = one.serving and one.assignment == record.assignment
        found.expect(
            serves or one.name in run.agents.broken or one.host in run.agents.gone,
            f"{one.name} does not serve as {record.assignment}: {one.process}, {one.phase}",
        )
        if serves:
            found.expect(one.phase is Phase.SERVING, f"{one.name} is {one.phase}")
    if not open_ and run.world.now > controller.down_until:
        writes = decide(controller.cluster(), controller.policy, Memory()).writes
        found.expect(not writes, f"a new controller would write {writes[:2]}")
