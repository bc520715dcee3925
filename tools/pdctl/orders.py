"""What an operator asks of the controller: keys that the leader reads and never writes.

Desired state has one writer, the leader. An order is a key of its own, under ``pins/`` or
``drains/``, which holds until it is deleted. So an order cannot race with a decision: whichever
comes first, the next turn of whoever leads then sees the order.
"""

from __future__ import annotations

import re
import time

from pdserve.config import Deployment, GroupBounds
from pdserve.control import records
from pdserve.control.records import DrainOrder, Pin
from pdserve.control.store.protocol import Delete, Put
from pdserve.control.stored import Stored
from pdserve.errors import DeploymentError

_RATIO = re.compile(r"([0-9]{1,6}):([0-9]{1,6})")


def pin(deployment: Deployment, stored: Stored, group: str, ratio: str) -> Put:
    """Return the order that a group has this ratio, such as ``7:6``, whatever its load.

    Raises:
        DeploymentError: it cannot have it; the message names what it can have.
    """
    _known("group", group, [one.name for served in deployment.served for one in served.groups])
    found = _RATIO.fullmatch(ratio)
    if found is None:
        raise DeploymentError(f"ratio {ratio!r}: allowed is PREFILLS:DECODES, such as 7:6")
    wanted = {"prefill": int(found[1]), "decode": int(found[2])}
    names = [name for name, one in stored.desired.items() if one.assignment.group == group]
    if sum(wanted.values()) != len(names):
        raise DeploymentError(
            f"ratio {ratio}: {sum(wanted.values())} instances; group {group} has {len(names)}"
        )
    control = deployment.control
    bounds = (control.groups if control else {}).get(group, GroupBounds())
    for role, count in wanted.items():
        least = bounds.least("prefill" if role == "prefill" else "decode", len(names) // 2)
        seen = (stored.observed.get(name) for name in names)
        fixed = sum(one is not None and one.kind == role for one in seen)
        if count < max(least, fixed):
            raise DeploymentError(
                f"ratio {ratio}: {count} {role}s; allowed: at least {max(least, fixed)} (the bound "
                f"is {least}, and {fixed} of group {group} have this role for ever)"
            )
    order = Pin(wanted["prefill"], wanted["decode"])
    return Put(records.PINS + group, records.encode(order))


def unpin(stored: Stored, group: str) -> Delete:
    """Return the order that a group has no pin any more. Raises DeploymentError: it has none."""
    _known("pinned group", group, list(stored.pins))
    return Delete(records.PINS + group)


def drain(deployment: Deployment, instance: str) -> Put:
    """Return the order that an instance serves no request until it is undone.

    Raises:
        DeploymentError: there is no such instance.
    """
    names = [*deployment.instances("prefill"), *deployment.instances("decode")]
    _known("instance", instance, names)
    return Put(records.DRAINS + instance, records.encode(DrainOrder(time.time())))


def undrain(stored: Stored, instance: str) -> Delete:
    """Return the order that an instance serves again. Raises DeploymentError: none drains it."""
    _known("drained instance", instance, list(stored.drains))
    return Delete(records.DRAINS + instance)


def _known(what: str, name: str, names: list[str]) -> None:
    if name not in names:
        there_are = ", ".join(sorted(names)) or "none"
        raise DeploymentError(f"there is no {what} {name!r}; there are: {there_are}")
