"""The state that a deployment begins with, as its file has it."""

from __future__ import annotations

from pdserve.config import ROLES, Deployment
from pdserve.control.assignment import FIRST, Assignment
from pdserve.control.reconciling import First
from pdserve.control.records import DesiredGroup


def assignments(deployment: Deployment) -> dict[str, Assignment]:
    """Return the first assignment of every instance.

    A spare has no group, and no role either if it can have both.
    """
    homes = {
        name: group.name
        for scenario in deployment.served
        for group in scenario.groups
        for name in (*group.prefill, *group.decode)
    }
    found = {}
    for role in ROLES:
        for name in deployment.instances(role):
            group = homes.get(name, "")
            unassigned = not group and name in deployment.flexible
            found[name] = Assignment(FIRST, "none" if unassigned else role, group)
    return found


def first(deployment: Deployment) -> First:
    """Return the first state of groups and instances."""
    groups = {
        group.name: DesiredGroup(scenario.name, group.share)
        for scenario in deployment.served
        for group in scenario.groups
    }
    return First(groups, assignments(deployment))
