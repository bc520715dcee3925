"""Follows the assignments of a gateway's instances, with a store and without."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping

from pdserve import config
from pdserve.control.records import DesiredGroup, DesiredInstance
from pdserve.gateway.groups import Group, Groups
from pdserve.gateway.membership import Membership, effective
from pdserve.rpc.messages import Inspected, Reassigned
from pdserve.supervision import repeat

ASK_S = 0.2
"""Interval at which an instance that does not serve as it should is asked what it is."""
ASKED = 64
"""Maximum number of instances that are asked at once."""
TURN_S = 1.0
"""Interval at which one of the instances that serve is asked, in turn, where the control plane may
have given it another assignment."""
IDLE_S = 60.0
"""Interval of the looks where it cannot, while there is none to ask."""


class Assignments:
    """The groups of a gateway, as the assignments of its instances change.

    Args:
        changed: called in the event loop when the groups are to be taken anew.
    """

    def __init__(self, groups: Groups, changed: Callable[[], None]) -> None:
        self._groups = groups
        self._changed = changed
        self._membership = Membership()
        self._stale = False
        """True if the groups are not what the membership says yet."""
        self._asking = asyncio.Event()
        """Set when there is an instance to ask."""
        self._turn_at = 0.0
        """Time (``loop.time()``) of the next turn."""
        groups.told = self.told

    def take(self, deployment: config.Deployment) -> tuple[config.Deployment, dict[str, Group]]:
        """Change the groups to what a deployment and the assignments of its instances say.

        Returns:
            The deployment with those assignments, and its groups.
        """
        self._stale = False
        self._deployment = deployment
        membership = self._membership
        now = effective(deployment, membership.known, membership.groups)
        return now, self._groups.take(now, membership.numbers)

    def desired(
        self, instances: Mapping[str, DesiredInstance], groups: Mapping[str, DesiredGroup]
    ) -> None:
        """Take what the store says."""
        self._note(self._membership.desired(instances, groups))

    def told(self, instance: str, reply: Reassigned | Inspected) -> None:
        """Take what an instance has said of itself."""
        self._note(self._membership.told(instance, reply.assignment, reply.phase))

    def _note(self, changed: bool) -> None:
        if changed and not self._stale:
            self._stale = True
            self._asking.set()
            # In a moment: who has told it may be in the middle of a request's work.
            asyncio.get_running_loop().call_soon(self._changed)

    async def follow(self) -> None:
        """Ask the instances that do not serve as they should what they are, until cancelled.

        So a gateway without a store learns when one serves again, and under which assignment. The
        others are asked in turn.
        """
        await repeat("asking instances for their assignments", self._ask, self._asking)

    async def _ask(self) -> float:
        there = {
            **self._deployment.instances("prefill"),
            **self._deployment.instances("decode"),
        }
        asked = [name for name in self._membership.asked if name in there]
        some = list(itertools.islice(asked, ASKED))
        replies = await asyncio.gather(*(self._groups.inspect(name, there[name]) for name in some))
        for name, reply in zip(some, replies, strict=True):
            if reply is not None:
                self.told(name, reply)
        if self._deployment.control is None:
            return ASK_S if some else IDLE_S
        if (now := asyncio.get_running_loop().time()) >= self._turn_at:
            self._turn_at = now + TURN_S
            await self._groups.inspect_next()
        return ASK_S if some else TURN_S
