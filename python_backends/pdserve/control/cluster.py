"""What a controller knows at one moment: the input of every decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.control.assignment import Role
from pdserve.control.records import DesiredInstance, Lent, ObservedInstance, Phase, Pin
from pdserve.control.transaction import Transaction
from pdserve.control.work import Work


@dataclass(frozen=True, slots=True)
class Counters:
    """The counts of an instance since its process started, for the role that it has now."""

    number: int
    """Number of the assignment under which it counts."""
    work: Work
    leased: float = 0.0
    """Number of its KV caches that no decode has taken yet (a gauge of prefills)."""


@dataclass(frozen=True, slots=True)
class Line:
    """The requests that wait at one gateway for one group."""

    waiting: float
    """Requests that wait for a prefill."""
    waiting_decode: float
    """Requests that wait for a decode."""
    oldest_s: float
    """Longest time for which one of them has waited."""
    routed: float
    """Requests that it has sent to this group since its process started."""


@dataclass(frozen=True, slots=True)
class Load:
    """One sample of the servers' metrics for one group. None: unknown, which is never idle."""

    at: float
    """When it was taken, in seconds by the same clock as ``Cluster.now``."""
    instances: Mapping[str, Counters | None]
    """The counters of each member; None: its server did not answer."""
    gateways: Mapping[str, Line | None]
    """The line at each gateway that routes to this group; None: it did not answer."""


@dataclass(frozen=True, slots=True)
class Member:
    """An instance: one of a group, a spare, or one that is lent to a pool."""

    name: str
    desired: DesiredInstance | None
    """None: an agent has reported an instance of which nothing is desired yet."""
    observed: ObservedInstance | None
    """The last report, also while its agent is gone; None: nothing ever."""
    agent: bool = True
    """Its host's agent is alive."""
    failed_since: float | None = None
    """Since when its agent reports that repairs did not help; None: it does not."""
    silent_since: float | None = None
    """Since when no probe was answered, neither one of the controller nor one of a gateway: the
    later of both times. None: one of the two is answered, or has not been made."""
    lent: Lent | None = None
    drain: bool = False
    """An operator drains it: there is a key ``drains/NAME``."""

    @property
    def group(self) -> str:
        """Return the group that it is assigned to; empty: none."""
        return self.desired.assignment.group if self.desired else ""

    @property
    def role(self) -> Role:
        """Return the role that it is assigned to."""
        return self.desired.assignment.role if self.desired else "none"

    @property
    def number(self) -> int:
        """Return the highest number of an assignment that it may have; 0: it has none."""
        desired = self.desired.assignment.number if self.desired else 0
        own = self.observed.assignment if self.observed else None
        return max(desired, own.number if own else 0)

    @property
    def held(self) -> int:
        """Return the slots and leases that it holds."""
        return self.observed.used + self.observed.leases if self.observed else 0

    def takes(self, role: Role) -> bool:
        """Tell whether it can have this role."""
        return self.observed is not None and self.observed.kind in ("flexible", role)

    def says(self, wanted: DesiredInstance) -> bool:
        """Tell whether it is what this asks for, by what its agent has seen of it."""
        seen = self.observed
        if seen is None or not self.agent:
            return False
        if wanted.state == "absent":
            return seen.state == "absent"
        if seen.state != "ready" or seen.assignment is None:
            return False
        phase = Phase.UNASSIGNED if wanted.assignment.role == "none" else Phase.SERVING
        if wanted.state == "draining":
            phase = Phase.DRAINED
        return seen.assignment == wanted.assignment and seen.phase is phase

    @property
    def serving(self) -> bool:
        """Tell whether it serves its group, as desired."""
        wanted = self.desired
        return wanted is not None and wanted.state == "serving" and self.says(wanted)


@dataclass(frozen=True, slots=True)
class Group:
    """A group of a scenario; its members are those whose assignment names it."""

    name: str
    scenario: str
    share: float = 1.0
    """Weight of its share of the scenario's requests; 0: it is out."""
    limit_s: float = 60.0
    """TTFT limit of its scenario."""
    decode_slots: int = 64
    """Slots of one decode."""
    load: Load | None = None
    pin: Pin | None = None
    rollout: bool = False
    """Another version of the model is being brought in."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A deployment at one moment."""

    now: float
    """Seconds since 1970."""
    members: Mapping[str, Member]
    groups: Mapping[str, Group]
    transactions: Mapping[str, Transaction] = field(default_factory=dict)
    """The stored transaction of each group that has one."""

    def of(self, group: str, role: Role | None = None) -> list[Member]:
        """Return the members of a group, or those of one role, in the order of their names."""
        return [
            member
            for _, member in sorted(self.members.items())
            if member.group == group and (role is None or member.role == role)
        ]

    def busy(self, group: str) -> Transaction | None:
        """Return the transaction that changes this group, if there is one."""
        found = self.transactions.get(group)
        if found is not None:
            return found
        return next((one for one in self.transactions.values() if one.other == group), None)
