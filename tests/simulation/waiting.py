"""No instance is idle while a request waits for it, and no request waits for too many others."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from pdserve.control.records import Phase
from pdserve.instances.prefill import PrefillInstance
from pdserve.scheduling.request import State
from pdserve.scheduling.suspicion import admits
from tests.simulation.bounds import Bounds
from tests.unit.inprocess import prefill_lines

if TYPE_CHECKING:
    from collections.abc import Callable

    from pdserve.config import Role
    from pdserve.scheduling.forwarding import Forwarding
    from pdserve.scheduling.instance import Instance
    from pdserve.scheduling.request import Request
    from pdserve.scheduling.scheduler import Scheduler
    from pdserve.scheduling.wait_queue import Order
    from tests.simulation.clients import Client
    from tests.simulation.gateways import Gateway
    from tests.simulation.world import World

PAGE = 4096
LEVEL_S = 10.0
"""A level of priority is worth this many seconds of waiting."""


class Waiting:
    """Checks of the requests that wait in one world."""

    def __init__(self, world: World, bounds: Bounds, expect: Callable[[bool, str], None]) -> None:
        self._world = world
        self._plan = world.plan
        self._bounds = bounds
        self._expect = expect
        self._idle: dict[tuple[Forwarding[Any], str], float] = {}
        """The time since which an instance could take the first request of a wait queue."""
        self._overtaken: Counter[Client] = Counter()
        self._passed_over: Counter[Scheduler] = Counter()
        """The number of requests of others that were taken, while some of its own waited, since a
        prefill last took one of its own."""

    # ------------------------------------------------------------ nothing is idle

    def look(self, gateway: Gateway) -> None:
        """Check that no instance is idle. This is called at every instant."""
        for scheduler in gateway.schedulers:
            for line in (*prefill_lines(scheduler), scheduler.decodes):
                if line._queue._standing:
                    self._could_go(gateway, scheduler, line)
                elif self._idle:
                    for instance in line.instances:
                        self._idle.pop((line, instance.name), None)

    def _could_go(self, gateway: Gateway, scheduler: Scheduler, line: Forwarding[Any]) -> None:
        now = self._world.loop.time()
        for instance in line.instances:
            key = line, instance.name
            idle = self._is_idle(gateway, scheduler, line, instance)
            head = self._head(scheduler, line) if idle else None
            if head is None or not self._fits(gateway, scheduler, instance, head):
                self._idle.pop(key, None)
            elif (idle_s := now - self._idle.setdefault(key, now)) > self._bounds.idle:
                waits = f"request {head.id} waits at {gateway.name}"
                self._expect(False, f"{instance.name} is idle for {idle_s:.4f} s while {waits}")

    def _head(self, scheduler: Scheduler, line: Forwarding[Any]) -> Request | None:
        """Return the request whose turn it is. Others wait for it: else large ones would starve."""
        standing = self._standing(line)
        if not standing:
            return None
        order = min(standing)
        state = State.PREFILLED if line is scheduler.decodes else State.WAITING
        waiting = (request for _, request in self._open(scheduler, state))
        return next((request for request in waiting if request.order == order), None)

    @staticmethod
    def _standing(line: Forwarding[Any]) -> list[Order]:
        return [
            order
            for order, _, place in line._queue._standing
            if place._turn is not None and not place._turn.done()
        ]

    def _open(self, scheduler: Scheduler, state: State) -> list[tuple[Client, Request]]:
        return [
            (client, client.request)
            for client in self._world.clients
            if client.scheduler is scheduler
            and client.request
            and client.open
            and client.request.state is state
        ]

    def _is_idle(
        self, gateway: Gateway, scheduler: Scheduler, line: Forwarding[Any], instance: Instance
    ) -> bool:
        """Return whether an instance would take a request, and the gateway could know it."""
        now, wire = self._world.loop.time(), gateway.wires[instance.name]
        life = wire.worker.life
        if (
            life is None
            or not life.process.runs
            or life.assigned.phase is not Phase.SERVING
            or life.assigned.assignment.number != wire.number
            or instance.left
            or instance.load.offers
            or now < instance.breaker.reopens
            or instance.name in scheduler._kv_links.table.avoided
            or now < wire.cut_until + self._bounds.message
        ):
            return False
        if (
            instance in line.candidates.busy
            and wire.connection
            and wire.connection.refused != "slots"
        ):
            return False  # it had no room for another request, which waits until there is more
        one = life.instance
        if isinstance(one, PrefillInstance):
            # A request that was refused for lack of room waits until there is more, and so do those
            # behind it.
            return one._exports._refused_with < 0 and one._slots.free() > 0
        return len(one._admission.open) < self._plan.decode.slots

    def _fits(
        self, gateway: Gateway, scheduler: Scheduler, instance: Instance, request: Request
    ) -> bool:
        life = gateway.wires[instance.name].worker.life
        assert life is not None
        one = life.instance
        role: Role = "prefill" if isinstance(one, PrefillInstance) else "decode"
        if not admits(instance, request, role, self._world.loop.time()):
            return False
        if isinstance(one, PrefillInstance):
            nbytes = one._exports.nbytes(len(request.so_far) // 4)
            return one._exports.leases.arena._can_make_room(-(-nbytes // PAGE) * PAGE)
        pool, prefill = one._blocks.pool, gateway.instances[request.prefill]
        room = (pool.free_blocks + pool.cached_blocks) * pool.block_size
        if room < request.prompt_tokens + request.max_tokens + 1:
            return False
        linked = scheduler._kv_links.decodes(prefill.name)
        if linked and instance not in linked:
            return False
        return scheduler._decode_stage._cost(request, prefill, instance) is not None

    # ----------------------------------------------------------- nobody starves

    def accepted(self, client: Client) -> None:
        """Count the requests and the schedulers that a prefill passes over with this request."""
        if not self._plan.fair:
            return
        assert client.request is not None
        assert client.scheduler is not None
        at_once = self._plan.prefills * self._plan.prefill.slots
        for one, request in self._waits(client.scheduler):
            if client.request.arrived > request.arrived and _due(client.request) > _due(request):
                self._overtaken[one] += 1
                times = self._overtaken[one]
                self._expect(
                    times <= 2 * at_once, f"request {one.asked.number} is overtaken {times} times"
                )
        self._passed_over[client.scheduler] = 0
        for gateway in filter(None, self._world.gateways):
            for other in gateway.schedulers:
                if other is not client.scheduler:
                    self._pass_over(gateway, other, at_once)

    def _pass_over(self, gateway: Gateway, other: Scheduler, at_once: int) -> None:
        if not self._waits(other):
            self._passed_over[other] = 0
            return
        self._passed_over[other] += 1
        times = self._passed_over[other]
        most = at_once * self._plan.contenders + self._plan.prefills
        self._expect(times <= most, f"{gateway.name} is passed over {times} times")

    def _waits(self, scheduler: Scheduler) -> list[tuple[Client, Request]]:
        standing = set(self._standing(scheduler.prefills))
        waiting = self._open(scheduler, State.WAITING)
        return [(one, request) for one, request in waiting if request.order in standing]


def _due(request: Request) -> float:
    """Return the time by which requests are ordered: the earliest goes first.

    The rule is not the scheduler's, which `mechanisms` replaces.
    """
    return request.deadline - LEVEL_S * request.priority
