"""A lost member is replaced: exactly one other instance is touched."""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from pdserve.control.assignment import Role
from pdserve.control.cluster import Cluster, Member
from pdserve.control.loss import Loss, loss
from pdserve.control.moves import begin, turn
from pdserve.control.policy import Policy
from pdserve.control.records import DesiredInstance
from pdserve.control.transaction import Kind, Transaction

RETRY_S = 300.0
"""A spare that could not be had is not tried again for this time."""


def losses(cluster: Cluster, group: str, policy: Policy) -> list[tuple[Member, Loss]]:
    """Return the lost members of a group, those of the role with fewest left first."""
    left = {role: len(serving(cluster, group, role)) for role in ("prefill", "decode", "none")}
    found = [
        (member, lost)
        for member in cluster.of(group)
        if (lost := loss(member, cluster.now, policy)) is not None
    ]
    return sorted(found, key=lambda one: (left[one[0].role], one[0].name))


def serving(cluster: Cluster, group: str, role: Role) -> list[Member]:
    return [member for member in cluster.of(group, role) if member.serving]


def spare(
    cluster: Cluster, lost: Member, policy: Policy, not_now: Collection[str]
) -> Member | None:
    """Return the instance that takes a lost member's place; None: there is none.

    A loaded one comes first; among equals one on a host that has the fewest members of the group,
    so that the next failure of a host costs least.

    Args:
        not_now: spares that could not be had lately, and those that are taken already.
    """
    hosts = [
        member.observed.host
        for member in cluster.of(lost.group)
        if member.observed is not None and member is not lost
    ]
    free = [
        member
        for name, member in sorted(cluster.members.items())
        if name not in not_now and _free(member, lost.role)
    ]
    ready = [member for member in free if _loaded(member)]
    left = spare_budget(cluster, policy)
    if not ready and left is not None and left < 1:
        return None
    return min(
        ready or free,
        key=lambda one: hosts.count(one.observed.host) if one.observed else 0,
        default=None,
    )


def spare_budget(cluster: Cluster, policy: Policy) -> int | None:
    """Return how many more instances may be loaded; None: any number.

    An instance counts until it is seen to be absent: only a completed shrink is credited. One that
    is lost holds nothing: its process has ended, or its host is gone.
    """
    if policy.budget is None:
        return None
    loaded = 0
    for member in cluster.members.values():
        wanted, seen = member.desired, member.observed
        wants = wanted is not None and wanted.state != "absent"
        has = seen is not None and seen.state in ("loading", "ready")
        loaded += (wants or has) and loss(member, cluster.now, policy) is None
    return policy.budget - loaded


def substitute(cluster: Cluster, lost: Member, why: Loss, taken: Member) -> Transaction:
    """Return the transaction by which a spare takes the place of a lost member."""
    assert lost.desired is not None
    place = replace(lost.desired.assignment, number=taken.number + 1)
    return Transaction(
        kind=Kind.SUBSTITUTE,
        group=lost.group,
        moves=(begin(taken, DesiredInstance(place), cluster.now),),
        began=cluster.now,
        reason=f"{lost.name} is lost: {why.reason}"[:1024],
        lost=lost.name,
        failed=min(why.since, cluster.now),
        declared=cluster.now,
    )


def rescue(cluster: Cluster, group: str, lost: Member) -> Transaction | None:
    """Return the transaction by which the other role gives a member to one that is empty.

    None: the role is not empty, or there is nobody who can change and be spared.
    """
    if lost.role == "none" or serving(cluster, group, lost.role):
        return None
    other: Role = "decode" if lost.role == "prefill" else "prefill"
    have = serving(cluster, group, other)
    able = [member for member in have if member.takes(lost.role) and member.desired is not None]
    if len(have) < 2 or not able:
        return None
    giver = min(able, key=lambda one: (one.held, one.name))
    return Transaction(
        kind=Kind.RESCUE,
        group=group,
        moves=(turn(giver, lost.role, cluster.now),),
        began=cluster.now,
        reason=f"no {lost.role} serves, and there is no spare",
    )


def _free(member: Member, role: Role) -> bool:
    """Tell whether it is a spare that can have this role."""
    wanted, seen = member.desired, member.observed
    if wanted is None or seen is None or member.group or member.lent or member.drain:
        return False
    return member.agent and member.takes(role) and (_loaded(member) or member.says(wanted))


def _loaded(member: Member) -> bool:
    return member.desired is not None and member.desired.state == "serving" and member.serving
