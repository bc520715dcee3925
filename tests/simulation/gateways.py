"""The gateways of a world."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from perf.baselines.policies import SCHEDULERS

from pdserve.gateway.service import Service
from pdserve.observability.metrics import Registry
from pdserve.supervision import repeat
from tests.simulation.channels import Wire
from tests.simulation.loop import Process

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from pdserve import config
    from pdserve.scheduling.instance import Instance
    from pdserve.scheduling.request import Chunk, Request
    from pdserve.scheduling.scheduler import Scheduler
    from tests.simulation.clients import Client
    from tests.simulation.world import World

SWEEP_S = 1.0
"""The interval of sweeps is that of `pdserve.triton.gateway`, which only the server can load."""
LONGEST = 8192
"""The limit of prompt and answer together, in tokens: no arena has room for so many."""


class Gateway:
    """One life of a gateway's process."""

    def __init__(self, world: World, number: int) -> None:
        self.number = number
        self.name = f"gateway_{number}"
        self.process = Process(world.loop, self.name)
        self.metrics = Registry()
        self.wires: dict[str, Wire] = {}
        """The latest channel to each worker, by the worker's name."""
        self.clients: dict[str, Client] = {}
        """Its clients, by the ids of their requests."""
        self.members: dict[Scheduler, frozenset[str]] = {}
        """The instances of every scheduler, according to the last deployment that had its group."""
        self.parted_at: dict[tuple[Scheduler, str, str], float] = {}
        """The time when a prefill and a decode failed to hand over; a success removes it."""
        self.begun: Counter[Scheduler] = Counter()
        """The number of requests that have reached each scheduler."""
        self.retried: Counter[Scheduler] = Counter()
        """The number of retries after a failure, by scheduler."""
        self._world = world
        self._layout = 0
        self._away: set[str] = set()
        self.groups: dict[str, Scheduler] = {}
        """The schedulers of its groups, by name."""
        self.deployment = world.plan.deployment()
        self.service = self.process.run(self._start)
        self._note_groups()
        self.process.begin(repeat("the sweep", self._sweep))

    def _start(self) -> Service:
        return Service(
            self.name,
            self.deployment,
            self._world.vocabulary,
            LONGEST,
            self._connect,
            self.metrics,
            random.Random(self._world.rng.random()),
            self._observed(),
        )

    def _connect(self, name: str, _server: config.Server, number: int) -> Wire:
        world, before = self._world, self.wires.get(name)
        worker = world.workers.get(name)
        assert worker is not None
        wire = Wire(world.loop, self.process, worker, world.weather, number)
        wire.sent = partial(world.sent, self, wire)
        wire.got = partial(world.got, self, wire)
        wire.broke = partial(world.broke, self, wire)
        if before is not None:
            world.invariants.deployments.connects(self, before)
            wire.cut_until = before.cut_until
        self.wires[name] = wire
        return wire

    def _observed(self) -> type[Scheduler]:
        """Make the class of its schedulers, which report what they do."""
        gateway, made = self, SCHEDULERS[self._world.plan.policy]

        class Observed(made):  # type: ignore[misc, valid-type]
            def __init__(self, *given: Any, **limits: Any) -> None:
                super().__init__(*given, **limits)
                gateway._observe(self)

            def run(self, request: Request) -> AsyncGenerator[Chunk, None]:
                gateway._begins(self, request)
                return super().run(request)  # type: ignore[no-any-return]

        return Observed

    def _observe(self, scheduler: Scheduler) -> None:
        decode_stage: Any = scheduler._decode_stage
        for name in ("not_handed_over", "handed_over", "let_go_of"):
            told = partial(getattr(self, f"_{name}"), scheduler, getattr(decode_stage, name))
            setattr(decode_stage, name, told)
        budget: Any = scheduler._budget
        budget.MOST, budget.SHARE = self._world.plan.retries
        budget._left = budget.MOST
        budget.spend = partial(self._spend, scheduler, budget.spend)
        self.members[scheduler] = frozenset()

    def _begins(self, scheduler: Scheduler, request: Any) -> None:
        client = self.clients[request.id]
        client.scheduler, client.request = scheduler, request
        self.begun[scheduler] += 1
        self._world.begins(client)

    # --------------------------------------------------------- its state

    @property
    def schedulers(self) -> list[Scheduler]:
        """Return the schedulers of its groups, and those that still serve what they have begun."""
        groups = self.service._groups
        return [one._scheduler for one in (*groups._current.values(), *groups._retired)]

    @property
    def instances(self) -> dict[str, Instance]:
        """Return the instances that it has a channel to, by name."""
        return {key[1]: one for key, one in self.service._groups._instances.items()}

    # ------------------------------------------------------- another deployment

    async def leave(self, name: str, seconds: float) -> None:
        """Take an instance out of its group, unless it is the last of its role, and put it back."""
        if name in self._away:
            return
        self._change(self._layout, self._away | {name})
        await asyncio.sleep(seconds)
        self._change(self._layout, self._away - {name})

    async def take(self, layout: int, seconds: float) -> None:
        """Serve by another layout, and then by the first one again."""
        self._change(layout, self._away)
        await asyncio.sleep(seconds)
        self._change(0, self._away)

    def _change(self, layout: int, away: set[str]) -> None:
        self._layout, self._away, before = layout, away, self.groups
        self.deployment = self._world.plan.deployment(layout, away)
        self.service.take(self.deployment)
        self._note_groups()
        self._world.note(f"{self.name} serves by layout {layout} without {sorted(away)}")
        self._world.invariants.deployments.taken(self, before)

    def _note_groups(self) -> None:
        current = self.service._groups._current
        specs = [group for scenario in self.deployment.served for group in scenario.groups]
        self.groups = {group.name: current[group.name]._scheduler for group in specs}
        for group in specs:
            members = frozenset((*group.prefill, *group.decode))
            self.members[self.groups[group.name]] = members

    async def _sweep(self) -> float:
        await self.service.sweep()
        self._world.invariants.deployments.swept(self)
        return SWEEP_S

    # ---------------------------------------------------------------- events

    def _spend(self, scheduler: Scheduler, spend: Callable[[], bool]) -> bool:
        spent = spend()
        self.retried[scheduler] += spent
        return spent

    def _not_handed_over(
        self, scheduler: Scheduler, told: Callable[..., None], prefill: str, decode: str
    ) -> None:
        now = asyncio.get_running_loop().time()
        breaker = scheduler._decode_stage._pairs.known.get((prefill, decode))
        if breaker is None or now >= breaker.reopens:  # else the failure is known
            self.parted_at[scheduler, prefill, decode] = now
        told(prefill, decode)

    def _handed_over(
        self, scheduler: Scheduler, told: Callable[..., None], prefill: str, decode: str
    ) -> None:
        self.parted_at.pop((scheduler, prefill, decode), None)
        told(prefill, decode)

    def _let_go_of(self, scheduler: Scheduler, told: Callable[..., None], name: str) -> None:
        for key in [key for key in self.parted_at if key[0] is scheduler and name in key]:
            del self.parted_at[key]
        told(name)
