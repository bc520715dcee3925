"""Trials in which something breaks while a group is being changed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from msgspec import Struct

from pdserve.control.cluster import Counters, Line
from pdserve.control.cluster import Load as Sample
from pdserve.control.policy import Policy
from pdserve.control.records import DESIRED_INSTANCES, TRANSACTIONS, DesiredInstance
from pdserve.control.transaction import Step, Transaction
from pdserve.control.work import Work
from tests.control_model import shapes
from tests.control_model.outcomes import Outcome, outcome
from tests.control_model.requests import Load
from tests.control_model.runs import Run, go
from tests.control_model.trials import MAY_CHANGE, Trial, start

SECONDS = 1200.0
STEP_AT = 200.0


def _stepping(seed: int, **more: object) -> tuple[Load, Run]:
    """Return a load whose best ratio moves by two instances, so that there is a change."""
    load = shapes.step(SECONDS, STEP_AT, 0.25, 0.75)
    return load, start(load, seed, **more)


def _when(run: Run, step: Step, do: Callable[[str], None]) -> None:
    """Do something once, to the first instance whose move comes to this step."""
    done: list[str] = []

    def look(writes: dict[str, Struct | None]) -> bool:
        for record in writes.values():
            if isinstance(record, Transaction) and not done:
                for move in record.moves:
                    if move.step is step and not done:
                        done.append(move.instance)
                        run.world.at(run.world.now + 0.5, partial(do, move.instance))
        return True

    run.controller.on_write = look


def _end(name: str, seed: int, load: Load, run: Run) -> Outcome:
    return outcome(name, seed, go(run, load), load.seconds / 3600)


def killed_donor(seed: int, step: Step) -> Outcome:
    """A donor's process ends while it drains, or while it takes its other role."""
    load, run = _stepping(seed)
    killed: list[str] = []

    def kill(name: str) -> None:
        killed.append(name)
        run.agents.kill(name)

    _when(run, step, kill)
    found = _end(f"donor killed, {step.value}", seed, load, run)
    found.expect(bool(killed), "nobody was killed")
    return found


def killed_controller(seed: int) -> Outcome:
    """The controller ends after one of the writes of a change, and another one goes on."""
    load, run = _stepping(seed)
    left = [1 + seed % 5]

    def count(writes: dict[str, Struct | None]) -> bool:
        if any(key.startswith(TRANSACTIONS) for key in writes):
            left[0] -= 1
            if left[0] == 0:
                run.world.at(run.world.now, partial(run.controller.kill, 5.0 + seed % 20))
        return True

    run.controller.on_write = count
    return _end("controller killed", seed, load, run)


def stopped_store(seed: int) -> Outcome:
    """For 10 s nothing can be written or read; agents and gateways keep their last view."""
    load, run = _stepping(seed)
    run.world.at(STEP_AT + 40 + seed % 60, partial(_stop, run))
    return _end("store stopped", seed, load, run)


def _stop(run: Run) -> None:
    run.controller.down_until = run.world.now + 10


def failing_load(seed: int) -> Outcome:
    """An instance cannot take another role: it goes back to its own, and others change."""
    load, run = _stepping(seed)

    def block(name: str) -> None:
        run.agents.stuck.add(name)

    _when(run, Step.DRAIN, block)
    found = _end("role not taken", seed, load, run)
    returned = [one for one in run.controller.events if one.text.startswith("change to return")]
    found.expect(bool(returned), "nobody went back")
    return found


def at_the_budget(seed: int) -> Outcome:
    """A member is lost, and the only spare is one too many to be loaded at once."""
    load = shapes.constant(0.5, SECONDS)
    run = start(load, seed, absent=1, policy=Policy(budget=11, load_s=60.0, drain_s=30.0))
    run.world.at(300, partial(_break, run, "i00"))
    found = _end("budget", seed, load, run)
    loaded = [one for one in run.world.instances.values() if one.process == "ready"]
    found.expect(len(loaded) == 11, f"{len(loaded)} are loaded")
    found.expect(any(one.what == "short" for one in run.controller.events), "it was not told")
    return found


def substituted(seed: int) -> Outcome:
    """A spare takes a lost member's place, and nobody else changes."""
    load = shapes.constant(0.5, SECONDS)
    run = start(load, seed, spares=1)
    name = f"i{random.Random(seed).randrange(12):02d}"
    touched: set[str] = set()

    def look(writes: dict[str, Struct | None]) -> bool:
        if run.world.now < 400:
            touched.update(key for key in writes if key.startswith(DESIRED_INSTANCES))
        return True

    run.controller.on_write = look
    run.world.at(300, partial(_break, run, name))
    run.world.at(600, partial(_mend, run, name))
    found = _end("substitution", seed, load, run)
    wanted = {DESIRED_INSTANCES + name, DESIRED_INSTANCES + "i12"}
    if not any(at < 400 for at, _ in run.changes):
        found.expect(touched == wanted, f"{touched} were touched")
    spare = run.controller.store[DESIRED_INSTANCES + name]
    assert isinstance(spare, DesiredInstance)
    found.expect(spare.assignment.group == "", "the failed one is no spare")
    return found


def emptied_role(seed: int) -> Outcome:
    """All decodes are lost at once, and come back: the group serves again by itself."""
    load = shapes.constant(0.5, SECONDS)
    run = start(load, seed)
    decodes = [name for name in run.world.instances if name >= "i06"]
    for name in decodes:
        run.world.at(300, partial(_break, run, name))
        run.world.at(400, partial(_mend, run, name))
    found = _end("role emptied", seed, load, run)
    found.expect(run.prefills >= 2 and run.decodes >= 2, f"{run.prefills}:{run.decodes}")
    return found


def _break(run: Run, name: str) -> None:
    """Let an instance end, and its repairs fail."""
    run.agents.broken.add(name)
    run.agents.kill(name)


def _mend(run: Run, name: str) -> None:
    run.agents.broken.discard(name)
    run.agents.look(name)


def lying_sensor(seed: int) -> Outcome:
    """A sensor lies for five minutes, at a load that gives no reason for a change."""
    load = shapes.constant(0.5, SECONDS)
    run = start(load, seed)
    kind = ("nan", "zero", "reset", "stale", "silent")[seed % 5]
    lies = {
        "nan": not_a_number,
        "zero": _frozen(),
        "reset": _reset,
        "stale": _stale,
        "silent": _no,
    }
    run.world.at(300, partial(_lie, run, lies[kind]))
    run.world.at(600, partial(_lie, run, lambda load: load))
    found = _end(f"sensor: {kind}", seed, load, run)
    during = [at for at, _ in run.changes if 300 <= at <= 600]
    found.expect(len(during) <= 1, f"{len(during)} changes while it lied")
    found.expect(len(run.changes) <= MAY_CHANGE / 2, f"{len(run.changes)} changes")
    return found


Lie = Callable[[Sample], Sample | None]


def not_a_number(load: Sample) -> Sample:
    return _counters(load, lambda one: replace(one, work=replace(one.work, completed=math.nan)))


def _reset(load: Sample) -> Sample:
    """Counters begin at zero every 15 s, as if processes ended and were started again."""
    kept = load.at % 15 < 5
    return _counters(load, lambda one: replace(one, work=one.work if kept else Work()))


def _no(load: Sample) -> Sample | None:
    return None


def _frozen() -> Lie:
    """Return a lie by which nothing is completed any more."""
    first: dict[str, Counters | None] = {}

    def lie(load: Sample) -> Sample:
        return replace(
            load, instances={n: first.setdefault(n, c) for n, c in load.instances.items()}
        )

    return lie


def _stale(load: Sample) -> Sample:
    """Gateways show a long line that does not change."""
    line = Line(waiting=50.0, waiting_decode=0.0, oldest_s=7.0, routed=1e3)
    return replace(load, gateways=dict.fromkeys(load.gateways, line))


def _counters(load: Sample, change: Callable[[Counters], Counters]) -> Sample:
    return replace(
        load, instances={name: one and change(one) for name, one in load.instances.items()}
    )


def _lie(run: Run, lie: Lie) -> None:
    run.controller.lie = lie


FAULTS: dict[str, Trial] = {
    "donor killed, drain": partial(killed_donor, step=Step.DRAIN),
    "donor killed, change": partial(killed_donor, step=Step.CHANGE),
    "controller killed": killed_controller,
    "store stopped": stopped_store,
    "role not taken": failing_load,
    "budget": at_the_budget,
    "substitution": substituted,
    "role emptied": emptied_role,
    "sensor": lying_sensor,
}
