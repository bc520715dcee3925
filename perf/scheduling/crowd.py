"""Measures the cost of a request in a group of many instances: the scheduler alone, in this
process.

The instances are stand-ins: they accept one prompt at a time and reject others, compute by waiting,
and move no bytes. Their messages are encoded as on the wire.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import aclosing

from msgspec import Struct

from pdserve import config
from pdserve.errors import InstanceError
from pdserve.instances.slot_watches import SlotWatches
from pdserve.observability.metrics import Registry
from pdserve.rpc import messages
from pdserve.rpc.client import Calls, Replies
from pdserve.rpc.messages import (
    Busy,
    Connect,
    Connected,
    DecodeRequest,
    Describe,
    Described,
    Prefilled,
    PrefillRequest,
    Release,
    Released,
    Reply,
    Tokens,
    Watch,
)
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.kv_links import KVLinks
from pdserve.scheduling.request import Request
from pdserve.scheduling.scheduler import Scheduler
from pdserve.transfer.reports import NO_TRANSFER, LinkReport
from perf.budgets import Budget

SIZES = (2, 200)
LINK = LinkReport("none", "", 0.0, 1e12, {}, False)
PROMPT = bytes(4 * 128)
TOKEN = (100).to_bytes(4, "little")
WAITING_S = 0.01
"""Seconds between two requests that end, while half of all users wait."""
LINKED_S = 60.0


class Cost(Struct):
    """Cost of a request for one number of instances, in milliseconds."""

    instances: int
    idle: float
    """Time from its arrival to its end without other requests; median."""
    waiting: float
    """CPU time while as many requests wait as are computed; mean."""


class _Channel(ABC):
    """A channel to a stand-in of an instance, and the stand-in."""

    def __init__(self) -> None:
        self._calls = Calls()

    def open(self, call: str, request: messages.Request) -> Replies:
        replies = self._calls.open(call)
        asyncio.get_running_loop().call_soon(self._arrive, call, messages.encode(request))
        return replies

    def _arrive(self, call: str, data: bytes) -> None:
        self.answer(call, messages.decode_request(data))

    @abstractmethod
    def answer(self, call: str, request: messages.Request) -> None: ...

    def reply(self, call: str, reply: Reply) -> None:
        self._calls.deliver(call, messages.encode_replies([(call, reply)]))

    def forget(self, call: str) -> None:
        self._calls.forget(call)

    def lose(self, _epoch: bytes = b"") -> None:
        self._calls.fail_all(InstanceError("it is gone"))

    async def close(self) -> None:
        self.lose()


class _Prefill(_Channel):
    def __init__(self, name: str, seconds: float) -> None:
        super().__init__()
        self._name = name.encode()
        self._seconds = seconds
        self._busy = False
        self._watches = SlotWatches()

    def answer(self, call: str, request: messages.Request) -> None:
        if isinstance(request, PrefillRequest):
            self._tell(request.gateway)
            if self._busy or not self._watches.admits(request.gateway, 1):
                self.reply(call, Busy("slots"))
                return
            self._busy = True
            self._watches.took(request.gateway)
            done = Prefilled(100, False, self._name, 0, 0.0)
            asyncio.get_running_loop().call_later(self._seconds, self.reply, call, done)
        elif isinstance(request, Watch):
            self._watches.add(request, request.gateway, lambda reply, _: self.reply(call, reply))
            self._tell()
        elif isinstance(request, Release):
            self._watches.release(request.id)
            self._tell()
        elif isinstance(request, Describe):
            self.reply(call, Described(self._name))

    def _tell(self, offering: str | None = None) -> None:
        self._watches.tell(not self._busy, asyncio.get_running_loop().time(), offering)

    def free(self) -> None:
        """Note that a decode has the KV cache that it held."""
        self._busy = False
        self._tell()


class _Decode(_Channel):
    def __init__(self, prefills: dict[bytes, _Prefill]) -> None:
        super().__init__()
        self._prefills = prefills

    def answer(self, call: str, request: messages.Request) -> None:
        if isinstance(request, DecodeRequest):
            self._prefills[request.handle].free()
            self.reply(call, Tokens(1, TOKEN, "length", NO_TRANSFER))
        elif isinstance(request, Connect):
            self.reply(call, Connected(request.endpoint.decode(), LINK, 128))
        elif isinstance(request, Release):
            self.reply(call, Released())


class _Crowd:
    """A scheduler over `instances`, half of them prefills that take `seconds` for a prompt."""

    def __init__(self, instances: int, seconds: float) -> None:
        names = [str(number) for number in range(instances // 2)]
        stand_ins = {name.encode(): _Prefill(name, seconds) for name in names}
        self._prefills = [Instance(name, stand_ins[name.encode()]) for name in names]
        self._decodes = [Instance(f"decode_{name}", _Decode(stand_ins)) for name in names]
        self._metrics = Registry()
        self._kv_links = KVLinks(self._prefills, self._decodes, None, "perf", self._metrics)
        self._scheduler = Scheduler(
            self._prefills,
            self._decodes,
            self._kv_links,
            self._metrics,
            gateway=config.Gateway(),
            prefill=config.Prefill(slots=1),
            decode=config.Decode(),
            rng=random.Random(0),
        )

    async def link(self) -> None:
        """Connect every pair that is planned, which is not part of later measurements.

        Raises:
            TimeoutError: some pairs are not connected in time.
        """
        linking = asyncio.create_task(self._kv_links.run())
        until = time.monotonic() + LINKED_S
        while missing := self._kv_links.table.counts()["unknown"]:
            if time.monotonic() > until:
                raise TimeoutError(f"{missing} pairs have no link within {LINKED_S:g} s")
            await asyncio.sleep(0.1)
        linking.cancel()
        await asyncio.gather(linking, return_exceptions=True)

    async def serve(self, requests: Sequence[str]) -> list[float]:
        """Serve requests one after another; return the seconds of each."""
        taken = []
        for name in requests:
            request = Request(id=name, prompt=PROMPT, max_tokens=2, stream=True)
            began = time.perf_counter()
            async with aclosing(self._scheduler.run(request)) as chunks:
                async for _ in chunks:
                    pass
            taken.append(time.perf_counter() - began)
        return taken


async def _cost(instances: int, requests: int) -> Cost:
    crowd = _Crowd(instances, 0.0)
    await crowd.link()
    idle = await crowd.serve([f"idle {number}" for number in range(requests)])
    users = instances
    each = -(-requests // users) + 1
    crowd = _Crowd(instances, WAITING_S * instances / 2)
    await crowd.link()
    cpu = time.process_time()
    await asyncio.gather(
        *(crowd.serve([f"{user} {number}" for number in range(each)]) for user in range(users))
    )
    cpu = time.process_time() - cpu
    return Cost(
        instances,
        round(statistics.median(idle) * 1e3, 3),
        round(cpu / (users * each) * 1e3, 3),
    )


def costs(requests: int) -> list[Cost]:
    """Measure the cost of a request with few and with many instances."""
    return [asyncio.run(_cost(instances, requests)) for instances in SIZES]


def limits(measured: Sequence[Cost]) -> list[Budget]:
    """Return how much more a request costs with many instances than with few."""
    few, many = measured
    what = f"{many.instances} instances in place of {few.instances}"
    idle, waiting = round(many.idle - few.idle, 3), round(many.waiting - few.waiting, 3)
    return [
        Budget(f"{what}: added to a request", idle, "ms", "at most", 1.0),
        Budget(f"{what}: CPU of one that waits", waiting, "ms", "at most", 1.0),
    ]
