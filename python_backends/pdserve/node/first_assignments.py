"""The assignments that deployment.yaml gives, before there is any other."""

from __future__ import annotations

from pdserve.config import Deployment
from pdserve.config.names import ROLES
from pdserve.control.assignment import FIRST, Assignment


def first_assignments(deployment: Deployment) -> dict[str, Assignment]:
    """Return the first assignment of each instance.

    Its group is the one that has it; empty, if several have it, or none.
    """
    groups: dict[str, list[str]] = {}
    for scenario in deployment.served:
        for group in scenario.groups:
            for name in (*group.prefill, *group.decode):
                groups.setdefault(name, []).append(group.name)
    found = {}
    for role in ROLES:
        for name in deployment.instances(role):
            members = groups.get(name, [])
            found[name] = Assignment(FIRST, role, members[0] if len(members) == 1 else "")
    return found
