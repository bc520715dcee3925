"""The ratio of prefills and decodes in a group: equation (1) of P/D-Serve, in integers.

The paper (arXiv 2408.08147) balances the two roles where n_p b_p / T_p = n_d b_d / T_d. Numbers of
instances are integers, so the ratio with the highest throughput is looked for instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.control.work import Work, decode_rate, prefill_rate

LEAST = 2
"""Smallest number of instances of a role: with one, a failure stops the group."""
COMPLETIONS = 100
"""Completions of a role below which its rate is not known well enough."""
CALM_GAIN, PRESSED_GAIN = 0.08, 0.03
"""Smallest gain for which a change is worth its cost: when no request waits long, and when the
oldest has waited for ``PRESSED`` of its limit."""
PRESSED = 0.5


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
    """Mean number of KV caches that waited in prefills for a decode."""
    oldest_s: float
    """Longest time for which a request had waited at the end of the window."""
    limit_s: float
    """TTFT limit of its scenario."""


@dataclass(frozen=True, slots=True)
class Advice:
    """The numbers of prefills and decodes that a group should have, and why."""

    prefills: int
    decodes: int
    reason: str
    gain: float = 0.0
    """Increase of the throughput by the change; 0.1 is 10 %."""


def throughput(prefills: int, decodes: int, prefill_rate: float, decode_rate: float) -> float:
    """Return the requests per second of a group: what its slower role can do.

    Args:
        prefill_rate: requests per second of one prefill.
        decode_rate: requests per second of one decode.
    """
    return min(prefills * prefill_rate, decodes * decode_rate)


def best(prefills: int, decodes: int, prefill_rate: float, decode_rate: float) -> int:
    """Return the number of prefills with which the same instances have the highest throughput.

    Among equals it is the number nearest to that of now. A group too small for a choice keeps it.
    """
    every = prefills + decodes
    return max(
        range(LEAST, every - LEAST + 1),
        key=lambda n: (throughput(n, every - n, prefill_rate, decode_rate), -abs(n - prefills)),
        default=prefills,
    )


def advise(seen: Observation) -> Advice:
    """Return the ratio that the group should have; it is the present one wherever doubt remains."""
    now = seen.prefills, seen.decodes
    for role, work in (("prefill", seen.prefill_work), ("decode", seen.decode_work)):
        if work.completed < COMPLETIONS:
            few = f"{work.completed:.0f} requests of {COMPLETIONS} that are needed"
            return Advice(*now, f"the {role}s have completed {few}")
    rates = prefill_rate(seen.prefill_work), decode_rate(seen.decode_work, seen.decode_slots)
    if rates[0] is None or rates[1] is None:
        return Advice(*now, "the instances do not tell how long they computed")
    known = rates[0], rates[1]
    prefills = best(*now, *known)
    decodes = sum(now) - prefills
    gain = throughput(prefills, decodes, *known) / throughput(*now, *known) - 1
    if prefills == seen.prefills:
        return Advice(*now, "no other ratio has a higher throughput")
    pressed = seen.oldest_s > PRESSED * seen.limit_s
    needed = PRESSED_GAIN if pressed else CALM_GAIN
    if gain < needed:
        return Advice(*now, f"{prefills}:{decodes} would gain {gain:.1%}, of {needed:.0%} needed")
    if (against := _evidence_against(seen, prefills)) is not None:
        return Advice(*now, against)
    return Advice(prefills, decodes, f"{gain:.0%} more requests per second", gain)


def _evidence_against(seen: Observation, prefills: int) -> str | None:
    """Say that more waits for the role that would shrink than for the other; None: it does not.

    A full prefill alone is no evidence: its slots are held until KV caches have left, so that a
    lack of decodes shows there, too. One for each instance is on its way and does not wait.
    """
    growing, shrinking, instances = seen.waiting, seen.leased, seen.decodes
    if prefills < seen.prefills:
        growing, shrinking, instances = shrinking, growing, seen.prefills
    if shrinking <= max(growing, instances):
        return None
    return f"{seen.waiting:.1f} requests wait for a prefill, {seen.leased:.1f} for a decode"
