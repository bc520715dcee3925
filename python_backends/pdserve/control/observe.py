"""What a controller remembers after another look at its groups."""

from __future__ import annotations

from dataclasses import replace

from pdserve.control.cluster import Cluster, Group
from pdserve.control.memory import GroupMemory, Memory
from pdserve.control.ratio import COMPLETIONS
from pdserve.control.transaction import Kind
from pdserve.control.window import Window, take
from pdserve.control.work import Work, decode_rate, prefill_rate

COLD_S = 15.0
"""Time after its assignment in which an instance's work tells nothing: its caches are empty, and
its first steps take longer."""


def observe(cluster: Cluster, memory: Memory) -> Memory:
    """Return the memory with what this moment adds to it."""
    since = {}
    for name, member in cluster.members.items():
        if member.serving:
            number, at = memory.serving_since.get(name, (0, 0.0))
            since[name] = (number, at) if number == member.number else (member.number, cluster.now)
    memory = replace(
        memory,
        serving_since=since,
        not_before={
            name: until for name, until in memory.not_before.items() if until > cluster.now
        },
    )
    groups = {name: _group(cluster, group, memory) for name, group in cluster.groups.items()}
    return replace(memory, groups=groups)


def _group(cluster: Cluster, group: Group, memory: Memory) -> GroupMemory:
    known = memory.of(group.name)
    busy = cluster.busy(group.name)
    if busy is not None:
        known = replace(known, changed_at=cluster.now, wished=0)
        if busy.kind is Kind.RATIO:
            more = any(move.to.assignment.role == "prefill" for move in busy.moves)
            known = replace(known, direction=1 if more else -1)
    if group.load is None:
        return known
    serving = [member for member in cluster.of(group.name) if member.serving]
    cold = {
        member.name
        for member in serving
        if cluster.now - memory.serving_since[member.name][1] < COLD_S
    }
    roles = {member.name: member.role for member in serving}
    window = take(known.window, group.load, roles, cold, busy is None)
    return replace(known, window=window, rates=_rates(window, group) or known.rates)


def _rates(window: Window, group: Group) -> tuple[float, float] | None:
    prefill = sum((tick.prefill for tick in window.ticks), start=Work())
    decode = sum((tick.decode for tick in window.ticks), start=Work())
    if min(prefill.completed, decode.completed) < COMPLETIONS:
        return None
    rates = prefill_rate(prefill), decode_rate(decode, group.decode_slots)
    return None if rates[0] is None or rates[1] is None else (rates[0], rates[1])
