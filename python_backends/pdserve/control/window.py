"""What a group did in the last minute, from samples of its servers' metrics.

A sample that cannot be right is left out, and what is missing is unknown, never idle: a server that
did not answer, a counter that was reset or is no number, an instance that has another assignment
or is still cold, a gateway whose numbers stand still.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce

from pdserve.control.assignment import Role
from pdserve.control.cluster import Line, Load
from pdserve.control.ratio import Observation
from pdserve.control.work import Work

WINDOW_S = 60.0
"""Length of the window: the rule of two ticks and 60 s holds still on stationary load."""
EVIDENCE_S = 15.0
"""What waits is averaged over this time: the evidence for a direction has to be recent."""
FEWEST_TICKS = 4
"""Ticks below which the noise of a rate is not known."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The time between two samples."""

    at: float
    """Its end."""
    seconds: float
    prefill: Work
    """The work of all prefills together."""
    decode: Work
    waiting: float
    """Requests that waited at gateways for a prefill, at its end."""
    leased: float
    """KV caches, or requests at gateways, that waited for a decode, at its end."""
    oldest_s: float
    arrived: float
    """Requests that gateways sent to the group, those that wait included."""


@dataclass(frozen=True, slots=True)
class Window:
    """The ticks of the last `WINDOW_S` seconds, and the last sample."""

    ticks: tuple[Tick, ...] = ()
    last: Load | None = None
    unknown: tuple[str, ...] = ()
    """Gateways and instances of which the last sample knows nothing."""

    @property
    def seconds(self) -> float:
        """Return the time that its ticks cover."""
        return sum(tick.seconds for tick in self.ticks)

    @property
    def arrivals(self) -> float:
        """Return the requests per second that arrived; 0 if no time is covered."""
        return sum(tick.arrived for tick in self.ticks) / self.seconds if self.ticks else 0.0


def take(
    window: Window, load: Load, roles: Mapping[str, Role], cold: Collection[str], keep: bool
) -> Window:
    """Return the window with one more sample.

    Args:
        roles: the group's members that serve, with their roles.
        cold: those whose work tells nothing yet.
        keep: False: the group is being changed, so that this time tells nothing of it.
    """
    before = window.last
    if before is not None and load.at <= before.at:
        return window
    lines = {
        name: line if _moves(line, before.gateways.get(name) if before else None) else None
        for name, line in load.gateways.items()
    }
    unknown = [name for name, line in lines.items() if line is None]
    unknown += [name for name in roles if load.instances.get(name) is None]
    ticks = tuple(tick for tick in window.ticks if tick.at > load.at - WINDOW_S)
    if before is not None and keep and load.at - before.at <= WINDOW_S:
        ticks += (_tick(before, load, roles, cold, lines),)
    return Window(ticks, load, tuple(sorted(unknown)))


def observation(
    window: Window, prefills: int, decodes: int, decode_slots: int, limit_s: float
) -> Observation:
    """Return what the window says of a group with so many instances; at least one tick is there."""
    ticks = window.ticks
    recent = [tick for tick in ticks if tick.at > ticks[-1].at - EVIDENCE_S]
    return Observation(
        prefills=prefills,
        decodes=decodes,
        decode_slots=decode_slots,
        prefill_work=reduce(Work.__add__, (tick.prefill for tick in ticks), Work()),
        decode_work=reduce(Work.__add__, (tick.decode for tick in ticks), Work()),
        waiting=sum(tick.waiting for tick in recent) / len(recent),
        leased=sum(tick.leased for tick in recent) / len(recent),
        oldest_s=ticks[-1].oldest_s,
        limit_s=limit_s,
        noise=math.hypot(
            _noise([(tick.prefill.completed, tick.prefill.busy_s) for tick in ticks]),
            _noise([(tick.decode.completed, tick.decode.slot_s) for tick in ticks]),
        ),
    )


def _moves(line: Line | None, before: Line | None) -> bool:
    """Tell whether a gateway's numbers are known, and not those of a page that stands still.

    A request that waits becomes older, so no two pages with one are equal.
    """
    if line is None or not all(map(math.isfinite, (line.waiting, line.waiting_decode))):
        return False
    if not all(map(math.isfinite, (line.oldest_s, line.routed))):
        return False
    return line != before or line.oldest_s == 0


def _tick(
    before: Load,
    load: Load,
    roles: Mapping[str, Role],
    cold: Collection[str],
    lines: Mapping[str, Line | None],
) -> Tick:
    work = {"prefill": Work(), "decode": Work()}
    leased = 0.0
    for name, role in roles.items():
        now, then = load.instances.get(name), before.instances.get(name)
        if now is None or role == "none":
            continue
        if role == "prefill" and math.isfinite(now.leased):
            leased += now.leased
        if name in cold or then is None or then.number != now.number:
            continue
        done = now.work - then.work
        if done.plausible:
            work[role] += done
    known = {name: line for name, line in lines.items() if line is not None}
    arrived = 0.0
    for name, line in known.items():
        earlier = before.gateways.get(name)
        if earlier is not None and line.routed >= earlier.routed:
            arrived += line.routed - earlier.routed
    return Tick(
        at=load.at,
        seconds=load.at - before.at,
        prefill=work["prefill"],
        decode=work["decode"],
        waiting=sum(line.waiting for line in known.values()),
        leased=leased + sum(line.waiting_decode for line in known.values()),
        oldest_s=max((line.oldest_s for line in known.values()), default=0.0),
        arrived=arrived,
    )


def _noise(pairs: list[tuple[float, float]]) -> float:
    """Return the relative standard deviation of sum(x) / sum(y), a ratio estimator; inf: unknown.

    The variance of such an estimator from its k parts is k / (k - 1) times the sum of the squares
    of x - R y, by sum(x) squared (Cochran, Sampling Techniques, chapter 6).
    """
    count, x, y = len(pairs), sum(x for x, _ in pairs), sum(y for _, y in pairs)
    if count < FEWEST_TICKS or x <= 0 or y <= 0:
        return math.inf
    squares = sum((a - x / y * b) ** 2 for a, b in pairs)
    return math.sqrt(count / (count - 1) * squares) / x
