"""Checks of what holds in a world at every instant, and when all is over."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from pdserve.control.records import Phase
from pdserve.instances.prefill import PrefillInstance
from pdserve.observability import catalogue
from pdserve.rpc.messages import DecodeRequest, PrefillRequest
from pdserve.scheduling.circuit_breaker import FIRST_S
from pdserve.scheduling.request import FINAL, Request, State
from tests.simulation.bounds import EPS_S, PAUSE_S, Bounds
from tests.simulation.clients import brief
from tests.simulation.conservation import Conservation
from tests.simulation.deployments import Deployments
from tests.simulation.endings import wrong
from tests.simulation.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pdserve.observability.metrics import Counter
    from pdserve.rpc import messages
    from tests.simulation.channels import Life, Wire
    from tests.simulation.clients import Client
    from tests.simulation.gateways import Gateway
    from tests.simulation.world import World


class Broken(AssertionError):
    """An invariant was broken."""


class Invariants:
    """Invariants that are checked whenever time passes; what is broken is raised as `Broken`."""

    def __init__(self, world: World) -> None:
        self.bounds = Bounds(world.plan)
        self.steps = 0
        self._world = world
        self.deployments = Deployments(world.plan, self.expect)
        self._conservation = Conservation(world, self.bounds, self.expect)
        self._waiting = Waiting(world, self.bounds, self.expect)
        self._broken = ""
        self._look_at = 0.0
        self._progress: dict[Client, tuple[tuple[State, int, int], float]] = {}
        self.shared: defaultdict[tuple[Gateway, str], list[str]] = defaultdict(list)
        """The workers whose connection broke while a request was open on it, by request."""
        self._ended: dict[Gateway, int] = {}
        self._failed_at: dict[tuple[Gateway, str], float] = {}
        self._offered: dict[tuple[Gateway, str], tuple[tuple[str, str], str]] = {}
        """The pair that a request was offered to last, and the attempt in which it was."""

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note what is broken unless it holds; the next step raises it.

        This may be called where an exception would be taken for a failure of the code under test.
        """
        if not holds:
            self._broken = self._broken or otherwise

    def step(self) -> None:
        """Check this instant. Raises: Broken."""
        self.steps += 1
        now = self._world.loop.time()
        for life in self._world.workers.lives:
            if life.process.runs:
                if isinstance(life.instance, PrefillInstance):
                    self._conservation.prefill(life.instance)
                else:
                    self._conservation.decode(life.instance)
        for gateway in self._world.gateways:
            if gateway is not None and gateway.process.runs:
                self._waiting.look(gateway)
        if now >= self._look_at:
            self._look_at = now + PAUSE_S
            self._conservation.look()
            for client in self._world.clients:
                if client.open and client.request and client.gateway.process.runs:
                    self._in_time(client, client.request, now)
        if self._broken:
            raise Broken(self._broken)

    # ------------------------------------------------------ nothing outlives its deadline

    def _in_time(self, client: Client, request: Request, now: float) -> None:
        bounds, plan = self.bounds, self._world.plan
        process = client.gateway.process
        seen = request.state, request.output_tokens, request.attempts
        if self._progress.get(client, (None, 0.0))[0] != seen:
            self._progress[client] = seen, now
        since = max(self._progress[client][1], process.since)
        # Two chunks may be there already for a client that reads slowly.
        slack = 2 * client.asked.reads_s + PAUSE_S + EPS_S
        if now > max(request.ends_by, process.since) + slack:
            self.expect(False, f"outlives its time limit: {brief(request)}")
        limit = max(request.deadline, process.since)
        follows = 0.0 if plan.calm else bounds.asking
        match request.state:
            case State.WAITING:
                latest = limit
            case State.PREFILLING:
                latest = limit + bounds.forward + 2 * bounds.message + bounds.stall + follows
            case State.PREFILLED:
                latest = since + plan.prefill.kept_s + bounds.asking
            case State.DECODING if not request.output:
                latest = limit + bounds.local + 2 * bounds.message + bounds.stall
            case _:
                latest = since + 2 * plan.gateway.stall_s
        if now > latest + slack:
            self.expect(False, f"outlives its deadline by {now - latest:.3f} s: {brief(request)}")

    # --------------------------------------------------------------------- events

    def sent(self, gateway: Gateway, wire: Wire, request: messages.Request) -> None:
        """Check a message to a worker: an instance or a pair that has just failed is left alone."""
        worker = wire.worker.name
        asks = f"{gateway.name} asks {worker}"
        self.expect(not wire.closed, f"{asks} over a closed channel")
        if not isinstance(request, PrefillRequest | DecodeRequest):
            return
        number, attempt = request.id.split("-")[1:3]
        client = gateway.clients[number]
        assert client.request is not None
        assert client.scheduler is not None
        members = gateway.members[client.scheduler]
        self.expect(worker in members, f"{asks}, which is not in group {client.request.group}")
        if isinstance(request, DecodeRequest) and request.handle:
            pair = client.request.prefill, worker
            if self._offered.get((gateway, number)) == (pair, attempt):
                return  # it waited until this pair was connected, and now continues
            self._offered[gateway, number] = pair, attempt
            failed_at = gateway.parted_at.get((client.scheduler, *pair), -math.inf)
            self._is_well(failed_at, f"{gateway.name} asks {pair}")
        if not gateway.instances[worker].breaker.closed:
            self._is_well(self._failed_at.get((gateway, worker), -math.inf), asks)

    def _is_well(self, failed_at: float, asks: str) -> None:
        if self._world.loop.time() < failed_at + FIRST_S - EPS_S:
            self.expect(False, f"{asks}, which has failed at {failed_at:.4f}")

    def broke(self, gateway: Gateway, wire: Wire, calls: Sequence[str]) -> None:
        """Note the calls that were open on a connection when it broke or was closed."""
        worker, now = wire.worker.name, self._world.loop.time()
        ours = tuple(one._calls.gateway for one in gateway.members)
        offers = [call for call in calls if call.startswith(ours)]
        if wire.closed:
            self.expect(not offers, f"{gateway.name} closes its channel to {worker}: {offers}")
            return
        for call in offers:
            self.shared[gateway, call.split("-")[1]].append(worker)
        there = gateway.instances.get(worker)
        if offers and there is not None and there.breaker.reopens <= now:
            self._failed_at[gateway, worker] = now

    def begun(self, life: Life) -> None:
        """Check from now on that a new prefill begins to compute no prompt after its limit."""
        self._under_its_assignment(life)
        prefill = life.instance
        if not isinstance(prefill, PrefillInstance):
            return
        computation, loop = prefill._computation, self._world.loop
        next_batch = computation._next_batch

        def batch() -> Any:
            held, sources = next_batch()
            for one in held:
                late = loop.time() - one.deadline
                self.expect(late < EPS_S, f"{prefill._name} begins {late:.4f} s after the limit")
            return held, sources

        computation._next_batch = batch  # type: ignore[method-assign]

    def _under_its_assignment(self, life: Life) -> None:
        """Check from now on that an instance takes no request for another assignment."""
        instance: Any = life.instance
        submit = instance.submit

        def checked(request: Any, send: Any) -> None:
            one = life.assigned
            told = f"{instance._name} with {one.assignment} takes a request for {life.number}"
            self.expect(life.number == one.assignment.number, told)
            told = f"{instance._name} takes a request while it is {one.phase.value}"
            self.expect(one.phase is Phase.SERVING, told)
            submit(request, send)

        instance.submit = checked

    def accepted(self, client: Client) -> None:
        """Note that a prefill has taken a client's request."""
        self._waiting.accepted(client)

    def heard(self, client: Client) -> None:
        heard, said = client.heard, client.brief
        self.expect(client.open, f"goes on after its end: {said}")
        if heard != client.expected[: len(heard)]:
            self.expect(False, f"hears {heard} instead of {client.expected}: {said}")

    def ended(self, client: Client) -> None:
        self._ended[client.gateway] = self._ended.get(client.gateway, 0) + 1
        problem = wrong(client, self._world)
        if problem:
            self.expect(False, f"{problem}: {client.error!r}: {client.brief}")

    # -------------------------------------------------------------- when all is over

    def left(self) -> dict[str, object]:
        """Return what is still held after all requests have ended; empty: nothing."""
        gone = [self.deployments.left(one) for one in self._world.gateways if one is not None]
        return {
            what: count
            for counts in (self._conservation.left(), *gone)
            for what, count in counts.items()
            if count
        }

    def finally_(self) -> None:
        """Check that every request has ended once, and is counted once. Raises: Broken."""
        for client in self._world.clients:
            if not client.gateway.process.alive:
                continue
            state = client.request and client.request.state
            if client.ended_in is not state or (state and state not in FINAL):
                raise Broken(f"it ended {client.ended_in}, and went on: {client.brief}")
        for gateway in self._world.gateways:
            assert gateway is not None
            counted = _total(gateway, catalogue.REQUESTS)
            if counted != self._ended.get(gateway, 0):
                raise Broken(f"{gateway.name} has counted {counted}, not {self._ended[gateway]}")
            self._within_budget(gateway)

    def _within_budget(self, gateway: Gateway) -> None:
        at_once, each = self._world.plan.retries
        for scheduler, retried in gateway.retried.items():
            allowed = at_once + each * gateway.begun[scheduler]
            if retried > allowed:
                raise Broken(f"{gateway.name} has tried {retried} again; {allowed:.1f} are allowed")
        told = sum(
            _total(gateway, catalogue.RETRIES, phase=phase, reason="error")
            for phase in ("prefill", "decode")
        )
        if told != gateway.retried.total():
            raise Broken(f"{gateway.name} has counted {told} of {gateway.retried.total()} retries")


def _total(gateway: Gateway, counter: Counter[...], **labels: str) -> float:
    return sum(
        count
        for (metric, values), count in gateway.metrics._counts.items()
        if metric is counter
        and labels.items() <= dict(zip(counter.label_names, values, strict=True)).items()
    )
