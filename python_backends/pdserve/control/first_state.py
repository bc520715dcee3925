"""The state that a deployment begins with, as its file has it."""

from __future__ import annotations

from pdserve.config import ROLES, Deployment
from pdserve.control.assignment import FIRST, Assignment
from pdserve.control.reconciling import First
from pdserve.control.records import DesiredGroup


def assignments(deployment: Deployment) -> dict[str, Assignment]:
    """Return the first assignment of every instance.

    Its group is the one that has it; a spare has none, and no role either if it can have both. An
    instance that several groups share has none, too, and keeps its role.
    """
    homes: dict[str, list[str]] = {}
    for scenario in deployment.served:
        for group in scenario.groups:
            for name in (*group.prefill, *group.decode):
                homes.setdefault(name, []).append(group.name)
    found = {}
    for role in ROLES:
        for name in deployment.instances(role):
            own = homes.get(name, [])
            unassigned = not own and name in deployment.flexible
            in_group = own[0] if len(own) == 1 else ""
            found[name] = Assignment(FIRST, "none" if unassigned else role, in_group)
    return found


def first(deployment: Deployment) -> First:
    """Return the first state of groups and instances."""
    groups = {
        group.name: DesiredGroup(scenario.name, group.share)
        for scenario in deployment.served
        for group in scenario.groups
    }
    return First(groups, assignments(deployment))
