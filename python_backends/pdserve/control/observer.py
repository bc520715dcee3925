"""Makes the picture that decisions start from: the store, the file, the load and the probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pdserve.config import Deployment, Server
from pdserve.control.assignment import Role
from pdserve.control.cluster import Cluster, Group, Load, Member
from pdserve.control.stored import Stored


class Observer:
    """Remembers since when instances fail."""

    def __init__(self) -> None:
        self._failed: dict[str, float] = {}

    def cluster(
        self,
        now: float,
        deployment: Deployment,
        stored: Stored,
        loads: Mapping[str, Load],
        silent: Mapping[str, float],
    ) -> Cluster:
        """Return what is known now.

        Args:
            now: seconds since 1970.
            silent: since when no probe of an instance was answered, of those that are silent.
        """
        servers = {name: server.name for name, server in _servers(deployment)}
        watched = {server for agent in stored.agents.values() for server in agent.servers}
        failed = {name for name, seen in stored.observed.items() if seen.state == "failed"}
        self._failed = {name: self._failed.get(name, now) for name in failed}
        members = {
            name: Member(
                name=name,
                desired=stored.desired.get(name),
                observed=stored.observed.get(name),
                agent=server in watched,
                failed_since=self._failed.get(name),
                silent_since=silent.get(name),
                lent=stored.lent.get(name),
                drain=name in stored.drains,
            )
            for name, server in servers.items()
        }
        return Cluster(now, members, self._groups(deployment, stored, loads), stored.transactions)

    @staticmethod
    def _groups(
        deployment: Deployment, stored: Stored, loads: Mapping[str, Load]
    ) -> dict[str, Group]:
        limit_ms = deployment.gateway.ttft_limit_ms
        return {
            group.name: Group(
                name=group.name,
                scenario=scenario.name,
                share=stored.groups[group.name].share,
                limit_s=(scenario.ttft_limit_ms or limit_ms) / 1e3,
                decode_slots=deployment.decode.slots,
                load=loads.get(group.name),
                pin=stored.pins.get(group.name),
            )
            for scenario in deployment.served
            for group in scenario.groups
            if group.name in stored.groups
        }


def unattended(deployment: Deployment, stored: Stored) -> list[str]:
    """Return the instances whose agent is gone: whether they live is for probes to tell."""
    watched = {server for agent in stored.agents.values() for server in agent.servers}
    return [name for name, server in _servers(deployment) if server.name not in watched]


def members(stored: Stored) -> Iterator[tuple[str, str, Role, int]]:
    """Yield instance, group, role, and the number of the assignment that it says to have."""
    for name, one in stored.desired.items():
        seen = stored.observed.get(name)
        own = seen.assignment if seen is not None else None
        number = own.number if own is not None else one.assignment.number
        yield name, one.assignment.group, one.assignment.role, number


def _servers(deployment: Deployment) -> Iterator[tuple[str, Server]]:
    for server in deployment.servers:
        for name in (*server.prefill, *server.decode):
            yield name, server
