"""Every trial that has to hold for each seed; docs/control-plane.md has the numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

from tests.control_model import shapes
from tests.control_model.agents import Times
from tests.control_model.outcomes import Outcome, outcome
from tests.control_model.requests import Load
from tests.control_model.runs import Run, go, make

Trial = Callable[[int], Outcome]
SWITCHES_S = (1.0, 5.0, 20.0)
HOUR_S = 3600.0
MAY_CHANGE = 6
"""Changes in an hour of stationary load that no seed exceeds; their mean is far below."""


def start(load: Load, seed: int, prefills: int | None = None, **more: object) -> Run:
    """Return a run at the best ratio, with a switch of 1, 5 or 20 s by its seed."""
    times = Times(switch_s=SWITCHES_S[seed % 3])
    best = load.mix(0).best(load.instances) if prefills is None else prefills
    return make(load, best, seed, times=times, **more)  # type: ignore[arg-type]


def golden(seed: int, instances: int = 13) -> Outcome:
    """The paper's example, from any ratio."""
    load = shapes.papers(instances, 1200)
    first = random.Random(seed).randrange(2, instances - 1)
    run = go(start(load, seed, first), load)
    found = outcome(f"golden {instances}", seed, run, load.seconds / HOUR_S)
    best = load.mix(0).best(instances)
    found.extra["prefills"] = run.prefills
    found.expect(abs(run.prefills - best) <= 1, f"{run.prefills} prefills, not {best}")
    return found


def stationary(seed: int) -> Outcome:
    """At the best ratio nothing is to be gained."""
    load = shapes.constant(0.5, HOUR_S)
    run = go(start(load, seed), load)
    fixed = go(start(load, seed), load, act=False)
    found = outcome("stationary", seed, run, 1)
    found.expect(run.result.slo >= 0.98 * fixed.result.slo, "the best fixed ratio is better")
    found.expect(len(run.changes) <= MAY_CHANGE, f"{len(run.changes)} changes")
    return found


def boundary(seed: int) -> Outcome:
    """Two ratios are equally good, and the work scatters twice as much."""
    load = shapes.constant(math.log2(10 / 6) / 2, HOUR_S, cv=2.0)
    run = go(start(load, seed), load)
    fixed = go(start(load, seed), load, act=False)
    found = outcome("boundary", seed, run, 1)
    found.expect(run.result.slo >= 0.98 * fixed.result.slo, "the best fixed ratio is better")
    found.expect(len(run.changes) <= MAY_CHANGE, f"{len(run.changes)} changes")
    return found


def stepped(seed: int) -> Outcome:
    """The best ratio moves by two instances at once."""
    load = shapes.step(1800, 600, 0.25, 0.75)
    run = start(load, seed)
    slo = _watch(run, load, 600 + 2 * 60)
    found = outcome("step", seed, go(run, load), 0.5)
    found.extra["after two windows"] = slo()
    found.expect(slo() >= 90, f"{slo():.1f} % within the SLO two windows after the step")
    found.expect(1 <= len(run.changes) <= 4, f"{len(run.changes)} changes")
    return found


def ramp(seed: int) -> Outcome:
    load = shapes.ramp(60.0 * (5, 10, 15, 20, 30)[seed % 5])
    run = go(start(load, seed), load)
    found = outcome("ramp", seed, run, load.seconds / HOUR_S)
    found.expect(run.result.slo >= 85, f"{run.result.slo:.1f} % within the SLO")
    return found


def square(seed: int) -> Outcome:
    """Waves between the mixes A and B of 10, 20 and 60 minutes."""
    minutes = (10, 20, 60)[seed % 3]
    load = shapes.square(60.0 * minutes, HOUR_S, 0.0, 1.0)
    run = go(start(load, seed), load)
    fixed = go(start(load, seed, load.instances // 2), load, act=False)
    found = outcome(f"square {minutes} min", seed, run, 1)
    found.extra["half and half"] = fixed.result.slo
    if minutes >= 20:
        found.expect(run.result.slo > fixed.result.slo, "half and half is better")
    return found


def short_square(seed: int) -> Outcome:
    """A wave shorter than twice the loop's delay: whoever chases it is always too late."""
    load = shapes.square(60.0, HOUR_S / 2, 0.3, 0.7)
    run = go(start(load, seed, load.instances // 2), load)
    found = outcome("square 1 min", seed, run, 0.5)
    found.expect(len(run.changes) <= MAY_CHANGE / 2, f"{len(run.changes)} changes")
    return found


def day(seed: int) -> Outcome:
    load = shapes.day()
    run = go(start(load, seed), load)
    found = outcome("day of 4 h", seed, run, load.seconds / HOUR_S)
    found.expect(run.result.slo >= 95, f"{run.result.slo:.1f} % within the SLO")
    return found


def burst(seed: int) -> Outcome:
    """What is over before a change would be is no reason for one."""
    load = shapes.bursts(HOUR_S / 2, 15 + seed % 15)
    run = go(start(load, seed), load)
    found = outcome("bursts", seed, run, 0.5)
    found.expect(len(run.changes) <= MAY_CHANGE / 2, f"{len(run.changes)} changes")
    return found


def mix_shift(seed: int) -> Outcome:
    """The rate does not tell that answers have become longer."""
    load = shapes.longer_answers(1800, 600)
    run = start(load, seed)
    slo = _watch(run, load, 600 + 4 * 60)
    found = outcome("mix shift", seed, go(run, load), 0.5)
    found.extra["after four windows"] = slo()
    found.expect(slo() >= 90, f"{slo():.1f} % within the SLO four windows after the shift")
    return found


def _watch(run: Run, load: Load, since: float) -> Callable[[], float]:
    """Return a function for the SLO, in percent, of what ended after this time."""
    before: list[tuple[int, int]] = []
    result = run.result

    def note() -> None:
        before.append((result.good, result.total))

    run.world.at(since, note)
    return lambda: 100 * (result.good - before[0][0]) / max(1, result.total - before[0][1])


TRIALS: dict[str, Trial] = {
    "golden 13": golden,
    "golden 12": partial(golden, instances=12),
    "stationary": stationary,
    "boundary": boundary,
    "step": stepped,
    "ramp": ramp,
    "square": square,
    "short square": short_square,
    "day": day,
    "bursts": burst,
    "mix shift": mix_shift,
}
