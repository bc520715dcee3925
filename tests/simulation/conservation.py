"""Slots, ranges, leases, blocks and calls are conserved, and none is kept for nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdserve.instances.prefill import TICK_S, PrefillInstance
from pdserve.kvcache.arena import State
from pdserve.transfer.producer.lease_manager import QUIET_S
from tests.simulation.bounds import EPS_S, PAUSE_S, Bounds
from tests.unit.inprocess import prefill_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pdserve.instances.decode import DecodeInstance
    from tests.simulation.channels import Life
    from tests.simulation.gateways import Gateway
    from tests.simulation.world import World

IN_USE = (State.ALLOCATED, State.LEASED, State.IN_TRANSFER, State.QUARANTINED)
TASKS = {"prefill": 3, "decode": 2}
"""The number of tasks of an instance that does nothing."""


class Conservation:
    """Checks that one world conserves its resources."""

    def __init__(self, world: World, bounds: Bounds, expect: Callable[[bool, str], None]) -> None:
        self._world = world
        self._plan = world.plan
        self._bounds = bounds
        self._expect = expect
        self._seen: dict[PrefillInstance | DecodeInstance, tuple[int, ...]] = {}
        self._orphans: dict[tuple[Life, str], float] = {}
        """The time since which no gateway wants a call that an instance holds something for."""

    # ---------------------------------------------------------- at every instant

    def prefill(self, prefill: PrefillInstance) -> None:
        """Check the slots, ranges and leases of an instance."""
        held, exports = prefill._slots.held, prefill._exports
        manager, leases = exports.leases, exports.holder.leases
        quarantined, arena = len(manager.quarantined), manager.arena
        seen = len(held), quarantined, len(leases), len(arena._evictor), arena._free_list.free
        if self._seen.get(prefill) == seen:
            return
        self._seen[prefill] = seen
        name, counts = prefill._name, arena.counts()
        self._expect(len(held) <= self._plan.prefill.slots, f"{name} holds {len(held)} requests")
        pending = len(prefill._computation.pending)
        self._expect(pending <= self._plan.prefill.batch, f"in {name} {pending} prompts wait")
        used = sum(counts[state][0] for state in IN_USE)
        self._expect(
            used == len(held) + quarantined,
            f"{name}: {used} ranges for {len(held)} requests and {quarantined} in quarantine",
        )
        total = sum(size for _, size in counts.values())
        self._expect(total == arena.capacity, f"{name}: {total} bytes in all")
        leased = sum(one.leased.slot is not None for one in held.values()) + quarantined
        self._expect(len(leases) == leased, f"{name}: {len(leases)} leases for {leased} ranges")
        free, slots = len(leases._free), leases._region.slots
        self._expect(len(leases) + free == slots, f"{name}: {free} lease slots free of {slots}")

    def decode(self, decode: DecodeInstance) -> None:
        """Check the slots and blocks of an instance."""
        opened, running, pool = decode._admission.open, decode._batch.calls, decode._blocks.pool
        kept = pool._evictor.kept
        seen = len(opened), len(running), len(kept), len(pool._evictor.evictable), pool.free_blocks
        if self._seen.get(decode) == seen:
            return
        self._seen[decode] = seen
        name = decode._name
        self._expect(len(opened) <= self._plan.decode.slots, f"{name} holds {len(opened)} requests")
        self._expect(running.keys() <= opened.keys(), f"{name} goes on with what has ended")
        tables = sum(not parked for parked in kept.values())
        self._expect(tables == len(opened), f"{name}: {tables} tables for {len(opened)} requests")
        rows = sum(table.capacity for table in kept)
        used = pool.used_blocks * pool.block_size
        self._expect(rows == used, f"{name}: {used} rows used, {rows} by somebody")

    # -------------------------------------------------------------- every 10 ms

    def look(self) -> None:
        """Check that nothing outlives its lease or quarantine, and nothing is held for nobody."""
        owners = {
            call
            for gateway in self._world.gateways
            if gateway is not None
            for wire in gateway.channels
            for call in wire.calls._replies
        }
        for life in self._world.workers.lives:
            if life.process.runs:
                self._owned(life, owners)
                if isinstance(life.instance, PrefillInstance):
                    self._leased(life, life.instance)

    def _owned(self, life: Life, owners: set[str]) -> None:
        instance, now = life.instance, self._world.loop.time()
        held: Iterable[str]
        if isinstance(instance, PrefillInstance):
            held, waiting = instance._slots.held, instance._slots.watches._waiting
        else:
            held, waiting = instance._admission.open, instance._admission.watches._waiting
        for call in (*held, *(one.id for one in waiting)):
            if call in owners:
                self._orphans.pop((life, call), None)
                continue
            since = max(self._orphans.setdefault((life, call), now), life.process.since)
            if now - since > self._bounds.orphan + PAUSE_S:
                self._expect(False, f"{instance._name} holds {call} for nobody since {since:.3f}")

    def _leased(self, life: Life, prefill: PrefillInstance) -> None:
        now, since = self._world.loop.time(), life.process.since
        grace = TICK_S + PAUSE_S + EPS_S
        for one in prefill._slots.held.values():
            limit = one.leased.range.until
            if one.computing:
                limit = one.deadline + self._bounds.forward
            elif one.leased.range.state is State.IN_TRANSFER:
                limit = one.leased.heard_at + QUIET_S
            if now > max(limit, since) + grace:
                what = f"{prefill._name}: {one.leased.range} {one.leased.range.state.value}"
                self._expect(False, f"{what} outlives its end by {now - limit:.3f} s")
        for leased in prefill._exports.leases.quarantined:
            if now > max(leased.heard_at + QUIET_S, since) + grace:
                self._expect(False, f"{prefill._name}: {leased.range} stays in quarantine")

    # ---------------------------------------------------------- when all is over

    def left(self) -> dict[str, object]:
        """Return what is still held after all requests have ended; empty: nothing."""
        counts: dict[str, object] = {}
        for gateway in self._world.gateways:
            if gateway is not None:
                counts |= self._at_gateway(gateway)
        for life in self._world.workers.lives:
            counts |= self._at_worker(life)
        return {what: count for what, count in counts.items() if count}

    def _at_gateway(self, gateway: Gateway) -> dict[str, object]:
        name = gateway.name
        counts: dict[str, object] = {}
        for number, scheduler in enumerate(gateway.members):
            where = f"{name}, scheduler {number}"
            for line in (*prefill_lines(scheduler), scheduler.decodes):
                counts |= {
                    f"{where}: waiting for a {line._role}": len(line),
                    f"{where}: watches for a {line._role}": len(line._watching),
                    f"{where}: timer for a {line._role}": line._timer,
                    f"{where}: waiting for room in a {line._role}": len(line._lookers),
                }
        for group, scheduler in gateway.groups.items():
            refused = list(scheduler._kv_links.table._refused.known)
            counts[f"{name}: pairs without a link in group {group}"] = refused
        for one in gateway.instances.values():
            counts |= {
                f"{name}: calls to {one.name}": one.load.open,
                f"{name}: offers to {one.name}": one.load.offers,
                f"{name}: tokens at {one.name}": one.load.tokens,
                f"{name}: promised of {one.name}": one.room.slots or one.room.blocks,
                f"{name}: suspect at {one.name}": one.suspect,
            }
        tasks = [repr(task.get_coro()) for task in gateway.process.tasks]
        lasting = "KVLinks", "repeat", "Assignments"
        others = [task for task in tasks if not any(one in task for one in lasting)]
        return counts | {f"{name}: tasks": others}

    def _at_worker(self, life: Life) -> dict[str, object]:
        one = life.instance
        counts: dict[str, object] = {
            "threads": len(life.process.threads),
        }
        if isinstance(one, PrefillInstance):
            counts |= {
                "watches": len(one._slots.watches),
                "slots": list(one._slots.held),
                "pending": len(one._computation.pending),
                "leases": len(one._exports.holder.leases),
                "quarantined": len(one._exports.leases.quarantined),
                "ranges": len(one._exports.leases.arena._evictor.kept),
                "tasks": len(life.process.tasks) - TASKS["prefill"],
            }
        else:
            counts |= {
                "watches": len(one._admission.watches),
                "open": list(one._admission.open),
                "running": len(one._batch.calls),
                "blocks": one._blocks.pool.used_blocks,
                "pulls": len(one._kv_imports),
                "prompts": len(one._local_prefill),
                "tasks": len(life.process.tasks) - TASKS["decode"],
            }
        return {f"{one._name}: {what}": count for what, count in counts.items()}
