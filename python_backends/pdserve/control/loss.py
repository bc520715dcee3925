"""When an instance is lost: its agent says so, or its agent is gone and nobody reaches it."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.control.cluster import Member
from pdserve.control.policy import Policy


@dataclass(frozen=True, slots=True)
class Loss:
    """An instance that is lost."""

    since: float
    """When it was first seen to fail."""
    reason: str


def loss(member: Member, now: float, policy: Policy) -> Loss | None:
    """Return why an instance is lost; None: it is not.

    An agent that is gone is no loss of its instances: the agent's lease ends with its process, and
    all leases end when a store was stopped for longer than they last.
    """
    seen = member.observed
    if member.agent and seen is not None and seen.state == "failed":
        since = now if member.failed_since is None else member.failed_since
        return Loss(since, f"its agent's repairs did not help: {seen.reason}"[:512])
    if not member.agent and member.silent_since is not None:
        silent_s = now - member.silent_since
        if silent_s >= policy.lost_s:
            why = f"its agent is gone, and no probe was answered for {silent_s:.0f} s"
            return Loss(member.silent_since, why)
    return None
