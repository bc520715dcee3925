"""The groups of a deployment as the control plane has them: desired, observed, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from rich.table import Table

from pdserve.config import Deployment
from pdserve.control import event_log
from pdserve.control.cluster import Cluster, Member
from pdserve.control.events import Event
from pdserve.control.observer import Observer
from pdserve.control.stored import Stored


def groups(deployment: Deployment, stored: Stored, now: float) -> dict[str, Any]:
    """Return ``groups`` and ``instances`` as plain data, each by name.

    Args:
        now: seconds since 1970.
    """
    cluster = Observer().cluster(now, deployment, stored, {}, {})
    last = {event.group: event for _, event in event_log.decoded(stored.events)}
    return {
        "groups": {name: _group(cluster, name, last) for name in cluster.groups},
        "instances": {name: _instance(member) for name, member in sorted(cluster.members.items())},
    }


def _group(cluster: Cluster, name: str, last: Mapping[str, Event]) -> dict[str, Any]:
    group, busy = cluster.groups[name], cluster.busy(name)
    found: dict[str, Any] = {"scenario": group.scenario, "share": group.share}
    for role in ("prefill", "decode"):
        members = cluster.of(name, role)
        found[role] = {
            "desired": len(members),
            "serving": sum(member.serving for member in members),
        }
    event = last.get(name)
    return found | {
        "pin": msgspec.to_builtins(group.pin),
        "change": msgspec.to_builtins(busy),
        "why": event.text if event else "",
        "event": msgspec.to_builtins(event),
    }


def _instance(member: Member) -> dict[str, Any]:
    return {
        "group": member.group,
        "role": member.role,
        "serving": member.serving,
        "agent": member.agent,
        "drain": member.drain,
        "desired": msgspec.to_builtins(member.desired),
        "observed": msgspec.to_builtins(member.observed),
        "lent": msgspec.to_builtins(member.lent),
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """Return a table of the groups, and one of the instances."""
    shown = Table("group", "scenario", "share", "desired", "serving", "pin", "change", "why")
    for name, one in found["groups"].items():
        pin, change = one["pin"], one["change"]
        shown.add_row(
            name,
            one["scenario"],
            f"{one['share']:g}",
            f"{one['prefill']['desired']}:{one['decode']['desired']}",
            f"{one['prefill']['serving']}:{one['decode']['serving']}",
            f"{pin['prefills']}:{pin['decodes']}" if pin else "-",
            _change(change),
            one["why"] or "-",
        )
    instances = Table(
        "instance", "group", "role", "number", "desired", "observed", "slots + leases"
    )
    for name, one in found["instances"].items():
        instances.add_row(name, one["group"] or "-", one["role"], *_states(one))
    return [shown, instances]


def _change(change: dict[str, Any] | None) -> str:
    if change is None:
        return "-"
    moves = ", ".join(f"{move['instance']} {move['step']}" for move in change["moves"])
    return f"{change['kind']}: {moves}"


def _states(one: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return number, desired state, observed state, and what it holds."""
    desired, seen = one["desired"], one["observed"]
    wanted = "-" if desired is None else desired["state"]
    if one["drain"]:
        wanted += " (an operator drains it)"
    if one["lent"]:
        wanted += f" (lent to {one['lent']['to']})"
    observed, held = "unknown", "-"
    if seen is not None:
        observed = seen["phase"] if seen["state"] == "ready" else seen["state"]
        held = f"{seen['used']} + {seen['leases']}"
        if seen["reason"]:
            observed += f": {seen['reason']}"
    if not one["agent"]:
        observed += " (its agent is gone)"
    number = "-" if desired is None else str(desired["assignment"]["number"])
    return number, wanted, observed, held
