"""Whether a group's ratio is changed in this tick, and by which transaction.

Every reason to leave it as it is is a hold, and is told when it changes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from pdserve.control.assignment import Role
from pdserve.control.cluster import Cluster, Group, Member
from pdserve.control.holds import disturbed, unready
from pdserve.control.loss import loss
from pdserve.control.memory import GroupMemory
from pdserve.control.moves import turn
from pdserve.control.policy import Bounds, Policy
from pdserve.control.ratio import COMPLETIONS, PRESSED, Advice, Limits, Observation, advise
from pdserve.control.transaction import Kind, Transaction
from pdserve.control.window import WINDOW_S, Window, observation

PRESSED_WINDOW_S = 30.0
"""Length of the window, and of the cooldown, while requests wait long: what was before them tells
little of now."""
CALM_TICKS = 2
"""Ticks in a row that have to ask for the same direction; one is enough under pressure."""
STEP = 4
"""A transaction moves up to one of so many instances, rounded up."""
REVERSAL_S = 2 * WINDOW_S
"""Time after a change in which going back needs the gain of a calm group."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on the ratio of one group."""

    memory: GroupMemory
    transaction: Transaction | None = None
    hold: str = ""
    """Kind of the reason for which nothing is done; it does not contain numbers."""
    reason: str = ""
    advice: Advice | None = None
    seen: Observation | None = None


def rebalance(
    cluster: Cluster,
    group: Group,
    policy: Policy,
    memory: GroupMemory,
    new: bool,
    not_now: Collection[str] = (),
) -> Verdict:
    """Return the change of a group that no transaction changes now, or why there is none.

    Args:
        new: a sample has come since the last decision; without one nothing is confirmed again.
        not_now: members whose last change failed.
    """
    members = [one for one in cluster.of(group.name) if not _given_up(one, cluster, policy)]
    if hold := disturbed(group, members):
        return Verdict(replace(memory, wished=0), hold=hold[0], reason=hold[1])
    prefills = [one for one in members if one.role == "prefill"]
    decodes = [one for one in members if one.role == "decode"]
    able = [one for one in members if one.name not in not_now]
    shape = _Shape(prefills, decodes, able, _limits(able, policy.bounds_of(group.name)))
    if group.pin is not None:
        return _pinned(cluster, group, shape, memory)
    if policy.ratio == "never":
        return Verdict(memory, hold="never", reason="control.ratio is never")
    window, length_s = _window(memory, group)
    if hold := unready(cluster, memory, window, length_s):
        return Verdict(replace(memory, wished=0), hold=hold[0], reason=hold[1])
    if not new:
        return Verdict(memory)
    seen = observation(window, len(prefills), len(decodes), group.decode_slots, group.limit_s)
    return _by_load(cluster, group, policy, memory, shape, seen)


def _window(memory: GroupMemory, group: Group) -> tuple[Window, float]:
    """Return the window to decide by, and its length in seconds."""
    if memory.window.oldest_s > PRESSED * group.limit_s:
        recent = memory.window.recent(PRESSED_WINDOW_S)
        if recent.completed >= COMPLETIONS:
            return recent, PRESSED_WINDOW_S
    return memory.window, WINDOW_S


def _by_load(
    cluster: Cluster,
    group: Group,
    policy: Policy,
    memory: GroupMemory,
    shape: _Shape,
    seen: Observation,
) -> Verdict:
    """Return the change that the load asks for."""
    advice = advise(seen, shape.limits, _recent(cluster, memory))
    wish = _sign(advice.prefills - seen.prefills)
    wished = memory.wished + 1 if wish and wish == memory.wish else abs(wish)
    memory = replace(memory, wish=wish, wished=wished)
    verdict = Verdict(memory, None, "", advice.reason, advice, seen)
    if not wish:
        return replace(verdict, hold="best")
    needed = 1 if seen.pressed else CALM_TICKS
    if wished < needed:
        return replace(verdict, hold="confirm", reason=f"{advice.reason}; tick 1 of {needed}")
    if policy.ratio == "advise":
        return replace(verdict, hold="advise")
    transaction = _change(cluster, group, Kind.RATIO, shape, advice.prefills, advice.reason)
    return replace(verdict, transaction=transaction, memory=replace(memory, wished=0))


def _given_up(member: Member, cluster: Cluster, policy: Policy) -> bool:
    """Tell whether a member has been lost for so long that the group is balanced without it."""
    lost = loss(member, cluster.now, policy)
    return lost is not None and cluster.now - lost.since > WINDOW_S


@dataclass(frozen=True, slots=True)
class _Shape:
    """A group's members."""

    prefills: list[Member]
    decodes: list[Member]
    able: list[Member]
    """The members that may change now."""
    limits: Limits


def _pinned(cluster: Cluster, group: Group, shape: _Shape, memory: GroupMemory) -> Verdict:
    """Return the change to the ratio that an operator has set, or as near to it as possible."""
    pin, now = group.pin, (len(shape.prefills), len(shape.decodes))
    assert pin is not None
    choices = shape.limits.choices(*now)
    text = f"it is pinned to {pin.prefills}:{pin.decodes}"
    if pin.prefills + pin.decodes != sum(now) or pin.prefills not in choices:
        text += f", which its {sum(now)} members cannot have"
    nearest = min(max(pin.prefills, choices.start), choices.stop - 1) if choices else now[0]
    transaction = None
    if nearest != now[0]:
        transaction = _change(cluster, group, Kind.PIN, shape, nearest, text)
    return Verdict(replace(memory, wished=0), transaction, "pinned", text)


def _limits(able: list[Member], bounds: Bounds) -> Limits:
    """Return how many members can change."""
    return Limits(
        least_prefill=bounds.least_prefill,
        least_decode=bounds.least_decode,
        givers=sum(one.role == "prefill" and one.takes("decode") for one in able),
        takers=sum(one.role == "decode" and one.takes("prefill") for one in able),
    )


def _change(
    cluster: Cluster, group: Group, kind: Kind, shape: _Shape, target: int, reason: str
) -> Transaction:
    """Return the transaction towards so many prefills, which the group's limits allow.

    Those give who are empty first: who holds least.
    """
    now = len(shape.prefills), len(shape.decodes)
    given: Role = "decode" if target > now[0] else "prefill"
    taken: Role = "prefill" if target > now[0] else "decode"
    able = (one for one in shape.able if one.role == given and one.takes(taken))
    count = min(abs(target - now[0]), math.ceil(sum(now) / STEP))
    givers = sorted(able, key=lambda one: (one.held, one.name))[:count]
    text = f"{now[0]}:{now[1]} to {target}:{sum(now) - target}: {reason}"[:1024]
    moves = tuple(turn(one, taken, cluster.now) for one in givers)
    return Transaction(kind, group.name, moves, cluster.now, text)


def _recent(cluster: Cluster, memory: GroupMemory) -> int:
    """Return the direction of the last change if it is not long ago, else 0."""
    at = memory.changed_at
    return memory.direction if at is not None and cluster.now - at < REVERSAL_S else 0


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
