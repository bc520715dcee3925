"""Checks of the section ``control`` against the rest of the deployment."""

from __future__ import annotations

from collections.abc import Iterator

from pdserve.config.control import QUIET_S, Control, GroupBounds
from pdserve.config.deployment import Deployment, Group
from pdserve.config.names import ROLES


def problems(deployment: Deployment, control: Control) -> Iterator[str]:
    """Yield the problems, in sentences that name the field, its value and what is allowed."""
    groups = {group.name: group for scenario in deployment.served for group in scenario.groups}
    for name in control.groups:
        if name not in groups:
            yield f"control.groups: there is no group {name}; there are: {', '.join(groups)}"
    for group in groups.values():
        yield from _outside(control, group)
    yield from _spares(deployment, control, groups)
    yield from _tides(control, groups)
    if control.budget is not None and control.budget < deployment.count:
        yield (
            f"control.budget: {control.budget}; the deployment loads {deployment.count} instances "
            "at first"
        )
    if deployment.drain_s <= deployment.least_drain_s:
        yield (
            f"control.drain_s: {deployment.drain_s:g}; allowed: more than "
            f"{deployment.least_drain_s:g}, the sum of prefill.lease_s "
            f"{deployment.prefill.kept_s:g} and the {QUIET_S:g} s after which a decode that reads "
            "is taken for dead: until then a KV cache may still be read"
        )
    for server in deployment.servers:
        if control.metrics_port in server.ports:
            yield f"control.metrics_port: {control.metrics_port} is a port of server {server.name}"


def _outside(control: Control, group: Group) -> Iterator[str]:
    """Yield how the first state of a group is outside of its bounds."""
    bounds = control.groups.get(group.name)
    if bounds is None:
        return
    where = f"control.groups.{group.name}"
    for role in ROLES:
        first = len(getattr(group, role))
        if first < (least := bounds.least(role, first)):
            yield f"{where}.least_{role}: {least}; the group has {first} at first"
    every = len(group.prefill) + len(group.decode)
    if bounds.most is not None and every > bounds.most:
        yield f"{where}.most: {bounds.most}; the group has {every} instances at first"


def _tides(control: Control, groups: dict[str, Group]) -> Iterator[str]:
    """Yield the tides that cannot be."""
    whole: set[str] = set()
    for number, tide in enumerate(control.tides):
        where = f"control.tides[{number}]"
        group = groups.get(tide.group)
        if group is None:
            yield f"{where}.group: there is no {tide.group}; there are: {', '.join(groups)}"
            continue
        if tide.to == tide.group:
            yield f"{where}.to: {tide.to} is the group itself; allowed: another group, or a pool"
        if tide.group in whole:
            yield f"{where}.group: the whole group {tide.group} goes by another tide already"
        if tide.whole:
            whole.add(tide.group)
        for role in ROLES:
            gone, first = getattr(tide, role) or 0, len(getattr(group, role))
            least = control.groups.get(group.name, GroupBounds()).least(role, first)
            if gone > first - least:
                yield f"{where}.{role}: {gone}; allowed: 0 to {first - least}, of {first} at first"


def _spares(deployment: Deployment, control: Control, groups: dict[str, Group]) -> Iterator[str]:
    """Yield the spares that are no instances, or are in a group."""
    instances = [name for role in ROLES for name in deployment.instances(role)]
    homes = {
        name: group.name for group in groups.values() for name in (*group.prefill, *group.decode)
    }
    for name in control.spares:
        if name not in instances:
            yield f"control.spares: there is no instance {name}; there are: {', '.join(instances)}"
        if name in homes:
            yield f"control.spares: {name} is in the group {homes[name]}; a spare is in none"
    for role in ROLES:
        names = deployment.instances(role)
        if names and all(name in control.spares for name in names):
            yield f"control.spares: every {role} is one; at least 1 must be in a group"
