"""Members that should serve and cannot, and those that are back: no group changes by it."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from pdserve.control.cluster import Cluster, Member
from pdserve.control.loss import Loss, loss
from pdserve.control.moves import draining
from pdserve.control.policy import Policy
from pdserve.control.records import DesiredInstance


@dataclass(frozen=True, slots=True)
class Mark:
    """Another desired state under the same assignment."""

    member: Member
    desired: DesiredInstance
    lost: Loss | None
    """Why it was declared lost; None: it was not."""


def marks(cluster: Cluster, policy: Policy) -> list[Mark]:
    """Return the members whose desired state becomes ``draining``, or ``serving`` again.

    A lost member, and one that an operator drains, keep their place: no gateway sends them
    anything, and they serve again once they are back, or the operator wants it. Members that a
    transaction moves are left to it.
    """
    moving = {
        move.instance
        for transaction in cluster.transactions.values()
        for move in transaction.moves
        if not move.step.over
    }
    found = []
    for name, member in sorted(cluster.members.items()):
        wanted = member.desired
        if wanted is None or not member.group or name in moving or wanted.state == "absent":
            continue
        lost = loss(member, cluster.now, policy)
        if lost is not None or member.drain:
            if wanted.state == "serving":
                found.append(Mark(member, draining(wanted), lost))
        elif wanted.state == "draining" and _answers(member):
            found.append(Mark(member, replace(wanted, state="serving"), None))
    return found


def _answers(member: Member) -> bool:
    """Tell whether its agent sees it ready: a lost member is not back before that."""
    return member.agent and member.observed is not None and member.observed.state == "ready"
