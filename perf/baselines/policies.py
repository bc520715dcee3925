"""The policies that on-demand forwarding is compared with: they choose a prefill on arrival.

They choose by the prefills' loads as they know them, and a request waits in the queue of that one
prefill, in order of arrival. The queue is kept at the gateway, where a request leaves it when its
limit passes: queues inside prefills would compute requests that are late already.

This module needs only the installed package: `perf.scheduling.servers` copies it to where the
Triton model of `bound_scheduler` finds it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from pdserve import config
from pdserve.observability.metrics import Registry
from pdserve.scheduling.forwarding import Forwarding
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.kv_links import KVLinks
from pdserve.scheduling.load import prefill_load
from pdserve.scheduling.offering import Offered
from pdserve.scheduling.prefill_stage import Computed, PrefillStage
from pdserve.scheduling.request import Chunk, Request
from pdserve.scheduling.scheduler import Scheduler
from pdserve.scheduling.wait_queue import Order

PolicyName = Literal[
    "on_demand", "round_robin", "fewest_streams", "shortest_queue", "pending_tokens"
]
REPORT_S = 0.1
"""Seconds between two reports of a prefill's load, for policies that see only those."""
Q = TypeVar("Q")


@dataclass(slots=True)
class Load:
    """The requests that this gateway has sent to a prefill."""

    streams: int = 0
    requests: int = 0
    """Number of requests without a first token."""
    tokens: int = 0
    """Number of prompt tokens of those requests."""


class Binding(Generic[Q]):
    """Binds each request to one of several queues: the one with the lowest cost of its load.

    Args:
        report_s: seconds between two reports of the loads, of which the last one is used; 0: the
            current loads are used.
    """

    def __init__(
        self, queues: Sequence[Q], cost: Callable[[Load], int], report_s: float = 0.0
    ) -> None:
        self.loads = {queue: Load() for queue in queues}
        self._cost = cost
        self._report_s = report_s
        self._reported = self._now()
        self._next_report = 0.0
        self._waiting: dict[str, tuple[Load, int]] = {}
        self._turn = itertools.count()

    def update(self, queues: Sequence[Q]) -> None:
        """Replace the queues."""
        self.loads = {queue: self.loads.get(queue, Load()) for queue in queues}
        self._reported = {queue: self._reported.get(queue, Load()) for queue in queues}

    @contextmanager
    def bound(self, request: Request) -> Iterator[Q]:
        """Give the queue of a new request, until the request ends."""
        self._report()
        seen = list((self._reported if self._report_s else self.loads).items())
        first, count = next(self._turn), len(seen)
        # Equal queues take turns.
        number = min(range(count), key=lambda i: (self._cost(seen[i][1]), (i - first) % count))
        queue = seen[number][0]
        load, tokens = self.loads[queue], request.prompt_tokens
        load.streams += 1
        load.requests += 1
        load.tokens += tokens
        self._waiting[request.id] = load, tokens
        try:
            yield queue
        finally:
            self.computed(request)
            load.streams -= 1

    def computed(self, request: Request) -> None:
        """Note that the request's first token has come."""
        self._report()
        if (waiting := self._waiting.pop(request.id, None)) is not None:
            load, tokens = waiting
            load.requests -= 1
            load.tokens -= tokens

    def _report(self) -> None:
        """Report the loads if it is time; called before they change."""
        now = asyncio.get_running_loop().time()
        if self._report_s and now >= self._next_report:
            self._reported = self._now()
            self._next_report = (now // self._report_s + 1) * self._report_s

    def _now(self) -> dict[Q, Load]:
        return {queue: replace(load) for queue, load in self.loads.items()}


class Queue(PrefillStage):
    """The queue of one prefill, in order of arrival; a request leaves it at its limit.

    Args:
        told: called with each request whose first token has come.
        given: the arguments of `PrefillStage`.
    """

    def __init__(self, told: Callable[[Request], None], *given: Any) -> None:
        super().__init__(*given)
        self._told = told

    def place(self, request: Request, tokens: int) -> tuple[Order, float, float]:
        return (False, request.arrived), 0.0, 0.0

    async def compute(self, request: Request) -> Computed:
        computed = await super().compute(request)
        self._told(request)
        return computed


class BoundScheduler(Scheduler):
    """Chooses a prefill for each request when it arrives.

    Its arguments are those of a `Scheduler`.
    """

    report_s = 0.0

    @staticmethod
    @abstractmethod
    def cost(load: Load) -> int:
        """Return the cost of a load: the prefill with the lowest is chosen."""

    def __init__(
        self,
        prefills: Sequence[Instance],
        decodes: Sequence[Instance],
        kv_links: KVLinks,
        metrics: Registry,
        *,
        gateway: config.Gateway,
        prefill: config.Prefill,
        decode: config.Decode,
        rng: random.Random,
    ) -> None:
        super().__init__(
            prefills,
            decodes,
            kv_links,
            metrics,
            gateway=gateway,
            prefill=prefill,
            decode=decode,
            rng=rng,
        )
        self.binding = Binding[Queue]([], self.cost, self.report_s)
        slots, batch, calls = prefill.slots, min(prefill.batch, prefill.slots), self._calls

        def queue(one: Instance) -> Queue:
            return Queue(
                self.binding.computed,
                Forwarding[Offered](
                    [one], "prefill", prefill_load, calls.gateway, slots, batch, rng
                ),
                self._decode_stage,
                kv_links,
                calls,
                metrics,
                gateway.stall_s,
            )

        self._new_queue = queue
        self.queues = {one: queue(one) for one in prefills}
        self.binding.update(list(self.queues.values()))
        self._chosen: dict[str, Queue] = {}
        """Queues of open requests, by their ids."""

    def update(self, prefills: Sequence[Instance], decodes: Sequence[Instance]) -> None:
        """Replace the instances.

        Requests that wait for a prefill that has left are offered to all others.
        """
        super().update(prefills, decodes)
        for gone in self.queues.keys() - set(prefills):
            self.queues.pop(gone).update(prefills)
        self.queues = {one: self.queues.get(one) or self._new_queue(one) for one in prefills}
        self.binding.update(list(self.queues.values()))

    def links_changed(self) -> None:
        super().links_changed()
        for queue in self.queues.values():
            queue.forwarding.wake()

    def prefill_stage(self, request: Request) -> PrefillStage:
        return self._chosen[request.id]

    async def run(self, request: Request) -> AsyncGenerator[Chunk, None]:
        with self.binding.bound(request) as queue:
            self._chosen[request.id] = queue
            try:
                async with aclosing(super().run(request)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            finally:
                del self._chosen[request.id]


class RoundRobin(BoundScheduler):
    """Chooses the prefills in turn."""

    @staticmethod
    def cost(_: Load) -> int:
        return 0


class FewestStreams(BoundScheduler):
    """Chooses the prefill with the fewest open answers, decoding included: P/D-Serve's own old
    version."""

    @staticmethod
    def cost(load: Load) -> int:
        return load.streams


class ShortestQueue(BoundScheduler):
    """Chooses the prefill with the fewest waiting or computing requests, by the last report."""

    report_s = REPORT_S

    @staticmethod
    def cost(load: Load) -> int:
        return load.requests


class PendingTokens(BoundScheduler):
    """Chooses the prefill with the fewest prompt tokens of those requests, by the last report."""

    report_s = REPORT_S

    @staticmethod
    def cost(load: Load) -> int:
        return load.tokens


BOUND: dict[PolicyName, type[BoundScheduler]] = {
    "round_robin": RoundRobin,
    "fewest_streams": FewestStreams,
    "shortest_queue": ShortestQueue,
    "pending_tokens": PendingTokens,
}
SCHEDULERS: dict[PolicyName, type[Scheduler]] = {"on_demand": Scheduler, **BOUND}
"""The scheduler of every policy, pdserve's own included."""
