"""Instances, or whole groups, that go to a pool for a time and come back.

A group that goes is drained with hand-off like any member that leaves; its ratio is never changed
in the same transaction.
"""

from __future__ import annotations

from msgspec.structs import replace

from pdserve.control.assignment import Assignment
from pdserve.control.cluster import Cluster, Group, Member
from pdserve.control.loss import loss
from pdserve.control.moves import begin
from pdserve.control.policy import Bounds, Policy, Tide
from pdserve.control.records import DesiredInstance
from pdserve.control.substitution import spare_budget
from pdserve.control.transaction import Kind, Move, Step, Transaction


def due(tide: Tide, now: float) -> bool:
    """Tell whether its instances should be out by its windows."""
    return any(window.holds(now) for window in tide.windows)


def turn_of_tide(
    cluster: Cluster, tide: Tide, out: bool, policy: Policy, not_before: dict[str, float]
) -> Transaction | None:
    """Return what brings a tide's instances where they should be; None: they are there, or must
    stay where they are.

    Args:
        out: whether they should be out.
        not_before: instances that could not be moved, and when they are tried again.
    """
    group = cluster.groups.get(tide.group)
    if group is None:
        return None
    lent = [
        one
        for _, one in sorted(cluster.members.items())
        if one.lent is not None and (one.lent.home, one.lent.to) == (tide.group, tide.to)
    ]
    whole = tide.prefills is None and tide.decodes is None
    here = [one for one in cluster.of(group.name) if loss(one, cluster.now, policy) is None]
    if whole:
        going, coming = (here, []) if out else ([], lent)
    else:
        going, coming = _some(tide, out, here, lent, policy.bounds_of(group.name))
    most = policy.bounds_of(tide.to).most if tide.to in cluster.groups else None
    if most is not None:
        going = going[: max(0, most - len(cluster.of(tide.to)))]
    ready = [one for one in going if one.serving and not_before.get(one.name, 0) <= cluster.now]
    back = [one for one in coming if not_before.get(one.name, 0) <= cluster.now]
    back = _affordable(cluster, back, policy)
    if ready and (whole or len(here) == sum(one.serving for one in here)):
        return _go(cluster, tide, group, ready, whole)
    if back:
        return _return(cluster, tide, group, back, whole)
    return None


def _some(
    tide: Tide, out: bool, here: list[Member], lent: list[Member], bounds: Bounds
) -> tuple[list[Member], list[Member]]:
    """Return the members that go and those that come back, for a tide of some instances."""
    going: list[Member] = []
    coming: list[Member] = []
    for role, wanted, least in (
        ("prefill", tide.prefills or 0, bounds.least_prefill),
        ("decode", tide.decodes or 0, bounds.least_decode),
    ):
        away = [one for one in lent if one.lent is not None and one.lent.role == role]
        own = sorted(
            (one for one in here if one.role == role), key=lambda one: (one.held, one.name)
        )
        more = (wanted if out else 0) - len(away)
        going += own[: max(0, min(more, len(own) - least))]
        coming += away[: max(0, -more)]
    return going, coming


def _affordable(cluster: Cluster, coming: list[Member], policy: Policy) -> list[Member]:
    """Return those that may come back within the budget, the ones that are loaded first."""
    loaded = [one for one in coming if one.desired is not None and one.desired.state != "absent"]
    others = [one for one in coming if one not in loaded]
    left = spare_budget(cluster, policy)
    return loaded + (others if left is None else others[: max(0, left)])


def _go(
    cluster: Cluster, tide: Tide, group: Group, going: list[Member], whole: bool
) -> Transaction:
    moves = [begin(one, _away(cluster, tide, one), cluster.now) for one in going]
    if whole:
        moves = [replace(move, step=Step.UNPUBLISH) for move in moves]
    return _transaction(Kind.OUT, cluster, tide, group, moves, whole, group.share)


def _return(
    cluster: Cluster, tide: Tide, group: Group, coming: list[Member], whole: bool
) -> Transaction:
    moves = []
    share = 1.0
    for one in coming:
        assert one.lent is not None
        assert one.desired is not None
        key = one.desired.assignment.key
        home = Assignment(one.number + 1, one.lent.role, one.lent.home, key)
        moves.append(begin(one, DesiredInstance(home), cluster.now))
        share = one.lent.share or share
    return _transaction(Kind.IN, cluster, tide, group, moves, whole, share)


def _transaction(
    kind: Kind,
    cluster: Cluster,
    tide: Tide,
    group: Group,
    moves: list[Move],
    whole: bool,
    share: float,
) -> Transaction:
    names = group.name if whole else f"{len(moves)} of {group.name}"
    return Transaction(
        kind=kind,
        group=group.name,
        moves=tuple(moves),
        began=cluster.now,
        reason=f"{names} to {tide.to}" if kind is Kind.OUT else f"{names} back from {tide.to}",
        other=tide.to if tide.to in cluster.groups else "",
        pool=tide.to,
        whole=whole,
        share=share,
    )


def _away(cluster: Cluster, tide: Tide, one: Member) -> DesiredInstance:
    """Return what is desired of a member that has gone."""
    assert one.desired is not None
    was = one.desired.assignment
    if tide.to in cluster.groups:
        others = (there.desired for there in cluster.of(tide.to) if there.desired is not None)
        key = next((there.assignment.key for there in others), was.key)
        return DesiredInstance(Assignment(one.number + 1, was.role, tide.to, key))
    return DesiredInstance(Assignment(one.number + 1, "none", "", was.key), "absent")
