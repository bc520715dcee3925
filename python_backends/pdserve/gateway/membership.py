"""Which instance is in which group, as assignments and phases say that change while a gateway runs.

What is known of an instance comes from deployment.yaml (the first assignment), from the store
(what it should be), and from the instance itself (a reply, which needs no store). Of two
assignments that with the higher number counts. While an instance is not what it should be, or does
not serve, it is in no group, and is asked again and again (``asked``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import msgspec

from pdserve import config
from pdserve.control.assignment import FIRST, Assignment
from pdserve.control.records import DesiredGroup, DesiredInstance, Phase


class Known(NamedTuple):
    """The knowledge of one instance."""

    assignment: Assignment
    wanted: bool = True
    """False: it shall not serve."""
    phase: Phase | None = None
    """The phase that it has told last under this assignment; UNASSIGNED also if it still has
    another one; None: it has told nothing."""

    @property
    def serves(self) -> bool:
        return self.wanted and self.phase in (None, Phase.SERVING)

    @property
    def first(self) -> bool:
        """Tell whether it is as deployment.yaml says."""
        return self.assignment.number == FIRST and self.serves


class Membership:
    """A gateway's knowledge of the instances that are not as deployment.yaml says, by name."""

    def __init__(self) -> None:
        self.known: dict[str, Known] = {}
        self.groups: Mapping[str, DesiredGroup] = {}
        """Groups of the store."""

    def desired(
        self, instances: Mapping[str, DesiredInstance], groups: Mapping[str, DesiredGroup]
    ) -> bool:
        """Take what the store says; tell whether that changes something."""
        before = dict(self.known)
        for name, desired in instances.items():
            wanted, known = desired.state == "serving", self.known.get(name)
            number = FIRST if known is None else known.assignment.number
            if desired.assignment.number > number:
                self.known[name] = Known(desired.assignment, wanted)
            elif desired.assignment.number == number:
                known = known or Known(desired.assignment)
                self.known[name] = known._replace(wanted=wanted)
        changed = self.known != before or self.groups != groups
        self.groups = dict(groups)
        return changed

    def told(self, name: str, assignment: Assignment, phase: Phase) -> bool:
        """Take what an instance has said of itself; tell whether that changes something."""
        known = before = self.known.get(name)
        number = FIRST if known is None else known.assignment.number
        if assignment.number > number:
            known = Known(assignment, phase=phase)
        elif assignment.number == number:
            known = (known or Known(assignment))._replace(phase=phase)
        elif known is not None:
            known = known._replace(phase=Phase.UNASSIGNED)
        if known is None or known == before:
            return False
        self.known[name] = known
        return True

    @property
    def asked(self) -> Iterator[str]:
        """Yield the instances that shall serve and do not, which may change at any time."""
        return (name for name, one in self.known.items() if one.wanted and not one.serves)

    @property
    def numbers(self) -> dict[str, int]:
        """Return the numbers of the assignments that are not the first ones."""
        return {name: one.assignment.number for name, one in self.known.items()}


def effective(
    deployment: config.Deployment,
    known: Mapping[str, Known],
    groups: Mapping[str, DesiredGroup],
) -> config.Deployment:
    """Return the deployment with the roles and the groups that its instances have now.

    An instance whose assignment names no group that there is, or that does not serve, is in none.
    A group of the store that is not in deployment.yaml is added to its scenario, if there is that.
    """
    if all(one.first for one in known.values()) and not groups:
        return deployment
    moved = {name: one for name, one in known.items() if not one.first}
    servers = tuple(_server(server, moved) for server in deployment.servers)
    there = {name for server in servers for name in (*server.prefill, *server.decode)}
    joined = {name: one.assignment for name, one in moved.items() if one.serves and name in there}
    scenarios = tuple(
        _scenario(scenario, moved.keys(), joined, groups) for scenario in deployment.served
    )
    return msgspec.structs.replace(deployment, servers=servers, scenarios=scenarios)


def _server(server: config.Server, moved: Mapping[str, Known]) -> config.Server:
    """Return the server with its instances in the roles that they have now."""
    roles = {
        name: moved[name].assignment.role
        for name in (*server.prefill, *server.decode)
        if name in moved and moved[name].assignment.number != FIRST
    }

    def now(role: config.Role, first: tuple[str, ...]) -> tuple[str, ...]:
        stay = [name for name in first if name not in roles]
        return (*stay, *(name for name, one in roles.items() if one == role))

    prefill, decode = now("prefill", server.prefill), now("decode", server.decode)
    return msgspec.structs.replace(server, prefill=prefill, decode=decode)


def _scenario(
    scenario: config.Scenario,
    moved: Collection[str],
    joined: Mapping[str, Assignment],
    desired: Mapping[str, DesiredGroup],
) -> config.Scenario:
    names = {group.name for group in scenario.groups}
    added = [
        config.Group(name, (), (), one.share)
        for name, one in desired.items()
        if one.scenario == scenario.name and name not in names
    ]
    shares = {name: one.share for name, one in desired.items() if one.scenario == scenario.name}
    return msgspec.structs.replace(
        scenario,
        groups=tuple(
            msgspec.structs.replace(
                group,
                prefill=_members(group, "prefill", moved, joined),
                decode=_members(group, "decode", moved, joined),
                share=shares.get(group.name, group.share),
            )
            for group in (*scenario.groups, *added)
        ),
    )


def _members(
    group: config.Group,
    role: config.Role,
    moved: Collection[str],
    joined: Mapping[str, Assignment],
) -> tuple[str, ...]:
    stay = [name for name in getattr(group, role) if name not in moved]
    new = [name for name, one in joined.items() if (one.role, one.group) == (role, group.name)]
    return (*stay, *new)
