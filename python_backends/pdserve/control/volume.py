"""Whether a group is needed, by equation (2) of the paper: I_t = n_p b_p / T_p.

The requests that arrive for a scenario in a second are compared with what its groups can serve: the
smaller of what their prefills and what their decodes can.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.control.cluster import Cluster, Group
from pdserve.control.memory import Memory
from pdserve.control.ratio import throughput

OUT_LOAD, IN_LOAD = 0.6, 0.85
"""A group goes if the others would then be used by less than the first part of their capacity, and
comes back when they are used by more than the second. Between the two lies the step that one group
makes when there are three or more."""
OUT_S, IN_S = 300.0, 30.0
"""Time for which that has to hold: going is cheap to put off, coming back is not."""


@dataclass(frozen=True, slots=True)
class Volume:
    """The instances that a scenario needs, and those that it has."""

    arrivals: float
    """Requests per second."""
    capacity: float
    """Requests per second of the groups that serve, without the one in question."""

    @property
    def load(self) -> float:
        return self.arrivals / self.capacity if self.capacity > 0 else float("inf")


def volume(cluster: Cluster, group: Group, memory: Memory) -> Volume | None:
    """Return the volume of a group's scenario without the group; None: something is unknown.

    Rates are those that were measured last: at night too few requests complete to measure them.
    """
    others = [
        one
        for one in cluster.groups.values()
        if one.scenario == group.scenario and one.name != group.name and one.share > 0
    ]
    arrivals = capacity = 0.0
    for one in [*others, group]:
        known = memory.of(one.name)
        if one.share > 0:
            if known.window.unknown or not known.window.ticks:
                return None
            arrivals += known.window.arrivals
        if one is not group:
            if known.rates is None:
                return None
            serving = [member for member in cluster.of(one.name) if member.serving]
            prefills = sum(member.role == "prefill" for member in serving)
            capacity += throughput(prefills, len(serving) - prefills, *known.rates)
    return Volume(arrivals, capacity)


def wanted_out(found: Volume, is_out: bool) -> bool:
    """Tell whether the group should be out, by this moment alone."""
    return found.load < (IN_LOAD if is_out else OUT_LOAD)
