"""One sample of the load of every group, from the metrics pages of the servers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from pdserve.config import Deployment
from pdserve.control.assignment import Role
from pdserve.control.cluster import Counters, Line, Load
from pdserve.control.work import Work

COMMON = {"busy_s": "pdserve_busy_seconds_total", "slot_s": "pdserve_slot_seconds_total"}
"""Counters of both roles, by the fields of ``Work``."""
COUNTERS: dict[Role, dict[str, str]] = {
    "prefill": COMMON | {"completed": "pdserve_prefill_seconds_count"},
    "decode": COMMON
    | {
        "completed": "pdserve_decode_seconds_count",
        "steps": "pdserve_steps_total",
        "sequences": "pdserve_step_sequences_total",
        "sequences_squared": "pdserve_step_sequences_squared_total",
        "sequence_s": "pdserve_step_sequence_seconds_total",
    },
    "none": {},
}
LOCAL = "pdserve_local_prefill_seconds_sum"
"""Seconds in which a decode computed prompts itself: they are no work of a decode."""
LEASES, WAITING = "pdserve_kv_leases", "pdserve_waiting_requests"
OLDEST, ROUTED = "pdserve_oldest_waiting_seconds", "pdserve_routed_requests_total"

_NAMES = {LOCAL, LEASES, WAITING, OLDEST, ROUTED}.union(
    *(one.values() for one in COUNTERS.values())
)
_LINE = re.compile(rf"^({'|'.join(sorted(_NAMES))})\{{([^}}]*)\}} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Page:
    """The series of one server that a load is made of.

    Args:
        text: its page, as Prometheus reads it. A value that is no number is left out.
    """

    def __init__(self, text: str) -> None:
        self.instances: dict[str, dict[str, float]] = defaultdict(dict)
        self._groups: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for name, inside, number in _LINE.findall(text):
            labels = dict(_LABEL.findall(inside))
            try:
                value = float(number)
            except ValueError:
                continue
            if (group := labels.get("group")) is not None:
                self._groups[group][name, labels.get("role", "")].append(value)
            elif labels.get("state", "leased") == "leased":
                self.instances[labels.get("instance", "")][name] = value

    def counters(self, instance: str, role: Role, number: int) -> Counters:
        """Return what an instance has counted; a counter appears with its first count."""
        values = self.instances.get(instance, {})
        work = Work(**{field: values.get(name, 0.0) for field, name in COUNTERS[role].items()})
        if role == "decode":
            work = replace(work, busy_s=max(0.0, work.busy_s - values.get(LOCAL, 0.0)))
        return Counters(number, work, values.get(LEASES, 0.0))

    def line(self, group: str) -> Line:
        """Return what waits at this server's gateways for a group."""
        series = self._groups.get(group, {})
        oldest = (*series.get((OLDEST, "prefill"), ()), *series.get((OLDEST, "decode"), ()))
        return Line(
            waiting=sum(series.get((WAITING, "prefill"), ())),
            waiting_decode=sum(series.get((WAITING, "decode"), ())),
            oldest_s=max(oldest, default=0.0),
            routed=sum(series.get((ROUTED, ""), ())),
        )


def loads(
    deployment: Deployment,
    pages: Mapping[str, Page | None],
    members: Iterable[tuple[str, str, Role, int]],
    at: float,
) -> dict[str, Load]:
    """Return the load of every group.

    Args:
        pages: by server; None: it did not answer, and what it would tell is unknown.
        members: instance, group, role and number of the assignment that it says to have.
        at: seconds since 1970 at which the pages were read.
    """
    servers = {
        name: server.name
        for server in deployment.servers
        for name in (*server.prefill, *server.decode)
    }
    instances: dict[str, dict[str, Counters | None]] = defaultdict(dict)
    for name, group, role, number in members:
        page = pages.get(servers.get(name, ""))
        instances[group][name] = None if page is None else page.counters(name, role, number)
    gateways = [server.name for server in deployment.servers if server.gateway]
    found = {}
    for scenario in deployment.served:
        for one in scenario.groups:
            lines = {
                name: page.line(one.name) if (page := pages.get(name)) else None
                for name in gateways
            }
            found[one.name] = Load(at, instances.get(one.name, {}), lines)
    return found
