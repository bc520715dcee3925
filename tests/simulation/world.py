"""A deployment in one event loop: gateways, workers, clients, and the faults between them.

The gateways' service with its scenarios and groups, schedulers, instances, arenas, pools, leases,
messages and their encoding are the real ones, and so is the shared memory. The rest is replaced:
the emulated engine waits instead of computing, messages travel by `channels` and bytes by `memory`,
and time, threads and processes are those of `loop`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from functools import partial
from typing import TYPE_CHECKING
from unittest import mock

from pdserve.gateway import service
from pdserve.rpc import messages
from pdserve.scheduling.kv_links import CONNECT_S, ROUND_S
from tests.simulation import faults, words
from tests.simulation.asking import Asked
from tests.simulation.channels import Weather
from tests.simulation.clients import Client, Told, brief
from tests.simulation.gateways import Gateway
from tests.simulation.invariants import Broken, Invariants
from tests.simulation.loop import Loop
from tests.simulation.moves import Moves
from tests.simulation.plan import Plan
from tests.simulation.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pdserve.rpc.messages import Reply, Request
    from tests.simulation.channels import Life, Wire
    from tests.simulation.faults import Fault

# Every request has ended by then, whatever goes wrong.
END_S = 120.0
LINKING_S = 0.4
LOOK_S = 0.05

# This matches the names of regions, and of calls that are not requests: they differ in each run.
_RANDOM = re.compile(r"-?\b[0-9a-f]{16}\b|\b[0-9a-f]{32}-?\b")


class World:
    """The world of one plan.

    Args:
        trace: a list that gets a line for each event; None: no event is noted.
    """

    def __init__(self, plan: Plan, loop: Loop, trace: list[str] | None = None) -> None:
        self.plan = plan
        self.loop = loop
        self.rng = random.Random(f"{plan.seed} world")
        weather = random.Random(f"{plan.seed} weather")
        self.weather = Weather(weather, plan.delay_s, plan.tail, 0.0)
        self.workers = Workers(plan, loop, self._begun)
        self.vocabulary = words.read()
        self.gateways: list[Gateway | None] = []
        self.clients: list[Client] = []
        self.invariants = Invariants(self)
        self.moves = Moves(self)
        self._trace = trace

    # --------------------------------------------- from its beginning to its end

    async def run(self) -> None:
        """Live through the plan. Raises: Broken."""
        for worker in self.workers:
            self.workers.start(worker)
        self.gateways = [Gateway(self, i) for i in range(self.plan.gateways)]
        self.loop.instant = self.invariants.step
        await asyncio.sleep(LINKING_S)
        self.weather.loss = self.plan.loss
        began = self.loop.time()
        trouble = [asyncio.create_task(self._trouble(began, one)) for one in self.plan.faults]
        for asked in self.plan.requests:
            await asyncio.sleep(began + asked.at - self.loop.time())
            self._ask(asked)
        await asyncio.gather(*trouble)
        await self._until_all_have_ended()
        await self._settle()
        # Everything that has failed is well again, and serves.
        await asyncio.sleep(max(self._reopens() - self.loop.time(), 0.0))
        probes = [self._ask(asked) for asked in self._probes()]
        await self._until_all_have_ended()
        await self._settle()
        for client in probes:
            if client is None or client.error is not None:
                raise Broken(f"all is well, but {client and client.error!r} was answered")
        self.invariants.finally_()
        await self._compare()

    async def close(self) -> None:
        """End every process. It is no error to call this twice."""
        for gateway in self.gateways:
            if gateway is not None:
                await gateway.process.end()
        for worker in self.workers:
            await self.workers.kill(worker, silently=True)

    async def _until_all_have_ended(self) -> None:
        end = self.loop.time() + END_S
        while waiting := [client for client in self.clients if client.open]:
            if self.loop.time() > end:
                raise Broken(f"has not ended: {waiting[0].brief}")
            await asyncio.sleep(LOOK_S)

    async def _settle(self) -> None:
        """Mend every fault, and wait until nothing is held any more. Raises: Broken."""
        self.weather.loss = self.weather.tail = 0.0
        for life in self.workers.lives:
            faults.forgive(life)
        for gateway in filter(None, self.gateways):
            for wire in gateway.channels:
                life = wire.connection and wire.connection.life
                if life and not life.process.alive:  # the worker has vanished
                    wire.lose()
        end = self.loop.time() + self.invariants.bounds.settles
        while left := self.invariants.left():
            if self.loop.time() > end:
                raise Broken(f"left behind: {left}")
            await asyncio.sleep(LOOK_S)

    async def _compare(self) -> None:
        """Wait until every gateway is like one that begins now. Raises: Broken."""
        fresh = Gateway(self, 0)
        end = self.loop.time() + CONNECT_S + 2 * ROUND_S
        for gateway in filter(None, self.gateways):
            while differs := self.invariants.deployments.differs(gateway, fresh):
                if self.loop.time() > end:
                    raise Broken(differs)
                await asyncio.sleep(LOOK_S)
        await fresh.process.end()

    def _reopens(self) -> float:
        """Return the time when no breaker of an instance or of a pair is open any more."""
        return max(
            breaker.reopens
            for gateway in self.gateways
            if gateway is not None
            for breaker in (
                *(instance.breaker for instance in gateway.instances.values()),
                *(
                    breaker
                    for scheduler in gateway.schedulers
                    for breaker in scheduler._decode_stage._pairs.known.values()
                ),
            )
        )

    # ------------------------------------------------------------------ clients

    def _ask(self, asked: Asked) -> Client | None:
        gateway = self.gateways[asked.gateway]
        if gateway is None:
            self.note(f"{asked.number} finds no gateway")
            return None
        client = Client(asked, gateway, self.workers.model, self.vocabulary)
        client.chunk = partial(self.invariants.heard, client)
        self.note(f"{asked.number} asks {gateway.name}")
        gateway.clients[str(asked.number)] = client
        self.clients.append(client)
        task = gateway.process.begin(client.ask())
        task.add_done_callback(partial(self._ended, client))
        if asked.cancels_after < END_S:
            when = self.loop.time() + asked.cancels_after
            gateway.process.call_at(when, task.cancel)
        return client

    def _ended(self, client: Client, task: asyncio.Task[None]) -> None:
        client.ended_at = self.loop.time()
        client.ended_in = client.request and client.request.state
        client.error = asyncio.CancelledError() if task.cancelled() else task.exception()
        ended_in = client.ended_in.name if client.ended_in else "unserved"
        self.note(f"{client.asked.number} ends {ended_in} {client.error!r}")
        if client.gateway.process.alive:  # else nobody hears of the end
            self.invariants.ended(client)

    def _probes(self) -> Iterator[Asked]:
        """Make one request for each group of each gateway."""
        prompt, number = self.plan.requests[0].prompt[: 4 * 20], itertools.count(1000)
        for gateway in range(self.plan.gateways):
            for scenario in self.plan.layouts[0]:
                fields = {"ttft_limit_ms": 20_000, "scenario": scenario.name}
                for _ in scenario.groups:
                    yield Asked(next(number), 0.0, gateway, prompt, 5, fields)

    # ----------------------------------------------------------------- events

    def begins(self, client: Client) -> None:
        """Note that a gateway has made a client's request, and chosen its group."""
        assert client.request is not None
        client.request.accepted = partial(self.invariants.accepted, client)
        assert client.scheduler is not None
        self.note(f"{client.asked.number} at {client.gateway.name}: {brief(client.request)}")
        self.invariants.deployments.begins(client, client.scheduler)

    async def _trouble(self, began: float, fault: Fault) -> None:
        await asyncio.sleep(began + fault.at - self.loop.time())
        self.note(fault)
        await faults.play(self, fault)
        self.note(f"over: {fault}")

    def _begun(self, life: Life) -> None:
        self.note(f"{life.process.name} begins")
        self.invariants.begun(life)

    def sent(self, gateway: Gateway, wire: Wire, request: Request) -> None:
        self.invariants.sent(gateway, wire, request)
        if self._trace is not None:
            self.note(f"{gateway.name} -> {wire.worker.name} {_brief(request)}")

    def got(self, gateway: Gateway, wire: Wire, data: bytes) -> None:
        if self._trace is not None:
            for call, reply in messages.decode_replies(data).replies:
                self.note(f"{gateway.name} <- {wire.worker.name} {call} {_brief(reply)}")

    def broke(self, gateway: Gateway, wire: Wire, calls: Sequence[str]) -> None:
        what = "closed" if wire.closed else "lost"
        self.note(f"{gateway.name} has {what} {wire.worker.name} with {len(calls)} calls")
        self.invariants.broke(gateway, wire, calls)

    def note(self, what: object) -> None:
        if self._trace is not None:
            self._trace.append(f"{self.loop.time():10.6f} {_RANDOM.sub('', str(what))}")


def simulate(plan: Plan, trace: list[str] | None = None) -> World:
    """Live through a plan.

    Raises:
        Broken: an invariant was broken.
    """
    loop = Loop()
    world = World(plan, loop, trace)
    with mock.patch.object(service, "Request", Told):
        loop.run(_whole(world))
    return world


async def _whole(world: World) -> None:
    try:
        await world.run()
    finally:
        world.loop.instant = lambda: None
        await world.close()


def _brief(message: Request | Reply) -> str:
    """Return a message's kind, and its short fields."""
    fields = []
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if name == "id":
            fields.append(value)
        elif isinstance(value, bytes):
            fields.append(f"{name}={len(value)} B")
        elif value and name not in ("version", "gateway", "sampling", "transfer"):
            fields.append(f"{name}={value}")
    return f"{type(message).__name__}({', '.join(fields)})"
