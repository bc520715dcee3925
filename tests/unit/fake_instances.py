"""Instances that only have slots, to test the messages between them and gateways."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from pdserve import errors
from pdserve.instances.slot_watches import SlotWatches
from pdserve.rpc.client import Replies
from pdserve.rpc.messages import Accepted, Busy, Freed, PrefillRequest, Release, Reply, Watch
from pdserve.sampling import Sampling
from pdserve.scheduling.candidates import Rank
from pdserve.scheduling.forwarding import Forwarding
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.load import Load
from pdserve.scheduling.offering import Offered, offer
from pdserve.scheduling.request import Answer, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pdserve.rpc import messages

LATENCY_S = 1e-4


class FakeInstance:
    """A channel to an instance with `slots`, which any number of gateways may share."""

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self.held: set[str] = set()
        self.messages: Counter[type] = Counter()
        self.lose: Callable[[messages.Request | Reply], bool] = lambda message: False
        self.heard: Callable[[messages.Request], None] = lambda request: None
        """Called before a message is handled."""
        self._watches = SlotWatches()
        self._last = 0.0

    def open(self, call: str, request: messages.Request) -> Replies:
        replies = Replies(call)
        self._later(request, partial(self._arrive, request, replies))
        return replies

    def forget(self, call: str) -> None:
        """Do nothing: it keeps no state of a gateway."""

    def lose_all(self) -> None:
        """End all calls, as when the process is stopped."""
        self.lose = lambda message: True

    async def close(self) -> None:
        """Do nothing: there is no connection."""

    def fill(self) -> None:
        """Take all its slots, like another client."""
        self.held.update(f"other {number}" for number in range(self.slots))

    def free(self) -> None:
        """Free one of those slots."""
        self.held.remove(next(one for one in self.held if one.startswith("other")))
        self._look()

    def _later(self, message: messages.Request | Reply, deal: Callable[[], None]) -> None:
        self.messages[type(message)] += 1
        if not self.lose(message):
            loop = asyncio.get_running_loop()
            # Timers of the same moment have no order.
            self._last = max(loop.time() + LATENCY_S, self._last + 1e-9)
            loop.call_at(self._last, deal)

    def _arrive(self, request: messages.Request, replies: Replies) -> None:
        self.heard(request)

        def answer(reply: Reply, _last: bool) -> None:
            if isinstance(reply, Accepted | Busy | Freed):
                self._later(reply, partial(replies.put, reply))

        if isinstance(request, Watch):
            self._watches.add(request, request.gateway, answer)
            self._look()
        elif isinstance(request, Release):
            self._watches.release(request.id)
            self.held.discard(request.id)
            self._look()
        elif isinstance(request, PrefillRequest):
            self._look(request.gateway)
            if self._watches.admits(request.gateway, self._free):
                self._watches.took(request.gateway)
                self.held.add(request.id)
                answer(Accepted(), False)
            else:
                answer(Busy("slots"), True)

    @property
    def _free(self) -> int:
        return self.slots - len(self.held)

    def _look(self, offering: str | None = None) -> None:
        self._watches.tell(self._free, asyncio.get_running_loop().time(), offering)


def load(of: Load) -> float:
    return of.open


class Gateway:
    """Forwards requests to fake instances; each request holds its slot for `hold_s`."""

    def __init__(self, fakes: Sequence[FakeInstance], seed: int = 0, hold_s: float = 0.1) -> None:
        self.rng = random.Random(seed)
        self.name = uuid.UUID(int=self.rng.getrandbits(128)).hex
        self.instances = [Instance(f"instance_{i}", fake) for i, fake in enumerate(fakes)]
        self.forwarding = Forwarding[Offered](
            self.instances, "prefill", load, self.name, fakes[0].slots, fakes[0].slots, self.rng
        )
        self.hold_s = hold_s
        self.served: list[Request] = []
        """Requests in the order in which they got their slots."""
        self._requests = 0

    def request(self, **fields: object) -> Request:
        self._requests += 1
        name = f"{self.name}-{self._requests}"
        return Request(id=name, prompt=bytes(4), max_tokens=1, **fields)  # type: ignore[arg-type]

    async def serve(self, request: Request, usable: Sequence[int] | None = None) -> bool:
        """Serve a request; tell whether one of the `usable` instances took it before its limit."""
        loop = asyncio.get_running_loop()
        request.arrived = request.waiting_since = loop.time()

        def rank(instance: Instance) -> float | None:
            if usable is not None and self.instances.index(instance) not in usable:
                return None
            return float(instance.load.open)

        async def ask(instance: Instance, hurry: bool) -> Offered | None:
            name = f"{request.id}-{len(request.offers)}-{loop.time()}"
            message = PrefillRequest(name, request.prompt, Sampling(), "", 0.0, 0, self.name, hurry)
            return await offer(request, instance, message, request.deadline)

        try:
            taken = await self.forwarding.take(request.order, request.deadline, Rank(rank), ask)
        except errors.Late:
            return False
        if taken is None:
            return False
        request.forwarded = loop.time()
        self.served.append(request)
        try:
            await asyncio.sleep(self.hold_s)
        finally:
            taken.call.close()
            self.forwarding.freed(taken.instance)
        return True

    def start(self, request: Request, usable: Sequence[int] | None = None) -> asyncio.Task[bool]:
        return asyncio.create_task(self.serve(request, usable))


def rejections(requests: Sequence[Request]) -> int:
    """Return the number of offers that were refused."""
    return sum(offer.answer is Answer.BUSY for one in requests for offer in one.offers)
