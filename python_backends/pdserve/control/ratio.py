"""The ratio of prefills and decodes in a group: equation (1) of P/D-Serve, in integers.

The paper (arXiv 2408.08147) balances the two roles where n_p b_p / T_p = n_d b_d / T_d. Numbers of
instances are integers, so the ratio with the highest throughput is looked for instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pdserve.control.work import Work, decode_rate, prefill_rate

LEAST = 2
"""Smallest number of instances of a role: with one, a failure stops the group."""
COMPLETIONS = 100
"""Completions of a role below which its rate is not known well enough."""
CALM_GAIN, PRESSED_GAIN = 0.08, 0.03
"""Smallest gain for which a change is worth its cost: when no request waits long, and when the
oldest has waited for ``PRESSED`` of its limit."""
SIGMAS = 2.0
"""A calm group also needs a gain of so many standard deviations of the measured rates."""
PRESSED = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers of prefills that a group can have."""

    least_prefill: int = LEAST
    least_decode: int = LEAST
    givers: int | None = None
    """Prefills that can become decodes; None: all."""
    takers: int | None = None
    """Decodes that can become prefills; None: all."""

    def choices(self, prefills: int, decodes: int) -> range:
        """Return the numbers of prefills to choose among; none: the group keeps what it has."""
        every = prefills + decodes
        low = prefills - (prefills if self.givers is None else self.givers)
        high = prefills + (decodes if self.takers is None else self.takers)
        return range(max(low, self.least_prefill), min(high, every - self.least_decode) + 1)


@dataclass(frozen=True, slots=True)
class Observation:
    """The state and the work of a group in one window."""

    prefills: int
    decodes: int
    decode_slots: int
    """Slots of one decode."""
    prefill_work: Work
    """The work of all prefills together."""
    decode_work: Work
    """The work of all decodes together."""
    waiting: float
    """Mean number of requests that waited at gateways for a prefill."""
    leased: float
    """Mean number of KV caches, and of requests at gateways, that waited for a decode."""
    oldest_s: float
    """Longest time for which a request had waited at the end of the window."""
    limit_s: float
    """TTFT limit of its scenario."""
    noise: float = 0.0
    """Standard deviation of the ratio of both roles' rates, as a part of it."""

    @property
    def pressed(self) -> bool:
        return self.oldest_s > PRESSED * self.limit_s


@dataclass(frozen=True, slots=True)
class Advice:
    """The numbers of prefills and decodes that a group should have, and why."""

    prefills: int
    decodes: int
    reason: str
    gain: float = 0.0
    """Increase of the throughput by the change; 0.1 is 10 %."""
    rates: tuple[float, float] | None = None
    """Requests per second of a prefill and of a decode; None: not known."""


def throughput(prefills: int, decodes: int, prefill_rate: float, decode_rate: float) -> float:
    """Return the requests per second of a group: what its slower role can do.

    Args:
        prefill_rate: requests per second of one prefill.
        decode_rate: requests per second of one decode.
    """
    return min(prefills * prefill_rate, decodes * decode_rate)


def best(
    prefills: int,
    decodes: int,
    prefill_rate: float,
    decode_rate: float,
    limits: Limits = Limits(),
) -> int:
    """Return the number of prefills with which the same instances have the highest throughput.

    Among equals it is the number nearest to that of now. A group too small for a choice keeps it.
    """
    every = prefills + decodes
    return max(
        limits.choices(prefills, decodes),
        key=lambda n: (throughput(n, every - n, prefill_rate, decode_rate), -abs(n - prefills)),
        default=prefills,
    )


def advise(seen: Observation, limits: Limits = Limits(), last: int = 0) -> Advice:
    """Return the ratio that the group should have; it is the present one wherever doubt remains.

    Args:
        last: direction of its last change, if that is not long ago: 1 if it got more prefills, -1
            if fewer. Going back needs the gain of a calm group.
    """
    now = seen.prefills, seen.decodes
    for role, work in (("prefill", seen.prefill_work), ("decode", seen.decode_work)):
        if work.completed < COMPLETIONS:
            few = f"{work.completed:.0f} requests of {COMPLETIONS} that are needed"
            return Advice(*now, f"the {role}s have completed {few}")
    rates = prefill_rate(seen.prefill_work), decode_rate(seen.decode_work, seen.decode_slots)
    if rates[0] is None or rates[1] is None:
        return Advice(*now, "the instances do not tell how long they computed")
    known = rates[0], rates[1]
    prefills = best(*now, *known, limits)
    if prefills == seen.prefills:
        return Advice(*now, "no other ratio has a higher throughput", rates=known)
    decodes = sum(now) - prefills
    present = throughput(*now, *known)
    gain = throughput(prefills, decodes, *known) / present - 1 if present else math.inf
    back = (prefills - seen.prefills) * last < 0
    needed = PRESSED_GAIN if seen.pressed and not back else calm_gain(seen.noise)
    if gain < needed:
        few = f"{prefills}:{decodes} would gain {gain:.1%}, of {needed:.0%} needed"
        return Advice(*now, few, gain, known)
    if (against := _evidence_against(seen, prefills)) is not None:
        return Advice(*now, against, gain, known)
    return Advice(prefills, decodes, f"{gain:.0%} more requests per second", gain, known)


def calm_gain(noise: float) -> float:
    """Return the gain that a group needs for a change while no request waits long."""
    return max(CALM_GAIN, SIGMAS * noise)


def _evidence_against(seen: Observation, prefills: int) -> str | None:
    """Say that what waits speaks against the direction; None: it does not.

    A line at the gateways alone is evidence of nothing: prefills' slots are held until KV caches
    have left, so that a lack of decodes shows there, too. KV caches that wait are: only a lack of
    decodes leaves them. One for each decode is on its way and does not wait.
    """
    backed_up = seen.leased > seen.decodes
    lined_up = seen.waiting > seen.prefills
    if backed_up if prefills > seen.prefills else lined_up and not backed_up:
        return f"{seen.waiting:.1f} requests wait for a prefill, {seen.leased:.1f} for a decode"
    return None
