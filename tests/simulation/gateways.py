"""The gateways of a world, and who asks them."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from perf.baselines.policies import SCHEDULERS

from pdserve.observability.metrics import Registry
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.kv_links import KVLinks
from pdserve.scheduling.request import Request, State
from tests.simulation.channels import Wire
from tests.simulation.loop import Process
from tests.unit.inprocess import EOS, Model

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.plan import Asked
    from tests.simulation.world import World


class Gateway:
    """One life of a gateway's process."""

    def __init__(self, world: World, number: int) -> None:
        plan = world.plan
        self.number = number
        self.name = f"gateway_{number}"
        self.process = Process(world.loop, self.name)
        self.metrics = Registry()
        self.wires: dict[str, Wire] = {}
        for worker in world.workers:
            wire = Wire(world.loop, self.process, worker, world.weather)
            wire.sent = partial(world.sent, self, worker.name)
            wire.got = partial(world.got, self, worker.name)
            wire.broke = partial(world.broke, self, worker.name)
            self.wires[worker.name] = wire
        self.instances = {name: Instance(name, wire) for name, wire in self.wires.items()}
        prefills, decodes = (
            [self.instances[worker.name] for worker in role]
            for role in (world.workers.prefills, world.workers.decodes)
        )
        self.kv_links = KVLinks(prefills, decodes, plan.layered, self.name, self.metrics)
        self.scheduler = SCHEDULERS[plan.policy](
            prefills,
            decodes,
            self.kv_links,
            self.metrics,
            gateway=plan.gateway,
            prefill=plan.prefill,
            decode=plan.decode,
            rng=random.Random(world.rng.random()),
        )
        decode_stage: Any = self.scheduler._decode_stage
        decode_stage.not_handed_over = partial(self._not_handed_over, decode_stage.not_handed_over)
        decode_stage.handed_over = partial(self._handed_over, decode_stage.handed_over)
        budget: Any = self.scheduler._budget
        budget.MOST, budget.SHARE = plan.retries
        budget._left = budget.MOST
        self.members = [prefills, decodes]
        """Instances of its group, by role."""
        self.parted_at: dict[tuple[str, str], float] = {}
        """When a prefill and a decode have failed to hand over, and have not done so since."""
        self.process.begin(self.kv_links.run())

    async def leave(self, name: str, seconds: float) -> None:
        """An instance leaves its group, unless it is the last of its role, and joins it again."""
        instance = self.instances[name]
        role = 0 if name.startswith("prefill") else 1
        if self.members[role] == [instance] or instance not in self.members[role]:
            return
        self._change(role, [one for one in self.members[role] if one is not instance])
        await asyncio.sleep(seconds)
        self._change(role, [*self.members[role], instance])

    def _change(self, role: int, members: list[Instance]) -> None:
        self.members[role] = members
        self.scheduler.update(*self.members)

    def _not_handed_over(self, told: Callable[..., None], prefill: str, decode: str) -> None:
        now = asyncio.get_running_loop().time()
        breaker = self.scheduler._decode_stage._pairs.known.get((prefill, decode))
        if breaker is None or now >= breaker.reopens:  # else it is known
            self.parted_at[prefill, decode] = now
        told(prefill, decode)

    def _handed_over(self, told: Callable[..., None], prefill: str, decode: str) -> None:
        self.parted_at.pop((prefill, decode), None)
        told(prefill, decode)


@dataclass(slots=True)
class Told(Request):
    """A request that tells when a prefill has taken it."""

    accepted: Callable[[], None] = lambda: None

    def to(self, state: State, *args: Any) -> None:
        Request.to(self, state, *args)
        if state is State.PREFILLING:
            self.accepted()


@dataclass(eq=False)
class Client:
    """Who asks for one answer."""

    asked: Asked
    gateway: Gateway
    model: Model
    request: Told = field(init=False)
    expected: list[int] = field(init=False)
    heard: list[int] = field(default_factory=list)
    chunk: Callable[[], None] = lambda: None
    """Called with each, once it is heard."""
    ended_at: float | None = None
    ended_in: State | None = None
    error: BaseException | None = None

    def __post_init__(self) -> None:
        asked = self.asked
        self.request = Told(
            id=str(asked.number), prompt=asked.prompt, max_tokens=asked.max_tokens, **asked.fields
        )
        prompt = np.frombuffer(asked.prompt, "<i4")
        self.expected = []
        while len(self.expected) < asked.max_tokens:
            self.expected.append(self.model.token(prompt, len(self.expected)))
            if self.expected[-1] == EOS and not self.request.ignore_eos:
                break

    @property
    def open(self) -> bool:
        return self.ended_at is None

    async def ask(self) -> None:
        """Raises: whatever the scheduler does."""
        asked = self.asked
        async with aclosing(self.gateway.scheduler.run(self.request)) as chunks:
            async for chunk in chunks:
                self.heard += chunk.ids
                self.chunk()
                if asked.stops_after and len(self.heard) >= asked.stops_after:
                    self.request.end_answer(asked.stops_after)
                if asked.reads_s:
                    await asyncio.sleep(asked.reads_s)
