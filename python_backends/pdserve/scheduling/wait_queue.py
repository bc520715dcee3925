"""The queue of requests that found every instance busy, and how they are woken."""

from __future__ import annotations

import asyncio
import itertools
from bisect import bisect, insort

Order = tuple[bool, float]
"""Sort key of a waiting request; the smallest goes first."""

# A wait below the resolution of a loop's clock would let no time pass: 1e-6 in virtual time.
_SHORTEST_WAIT = 1e-5


class WaitQueue:
    """A queue of waiting requests.

    Each ``wake`` lets one of them try, the first by its order; one that finds nothing returns to
    its place in the queue. A request that leaves, for whatever reason, wakes the next: so all that
    is free is taken, and no wake-up is lost with a request that ends before it could use it.
    """

    def __init__(self) -> None:
        self._standing: list[tuple[Order, int, QueuePlace]] = []
        self._joined = itertools.count()
        self._members: dict[QueuePlace, float] = {}
        """Every request that has joined and not left, with the time when it joined; the one that
        joined first comes first."""

    def __len__(self) -> int:
        """Return the number of requests that have joined and not left."""
        return len(self._members)

    @property
    def oldest(self) -> float | None:
        """Return the time (``loop.time()``) at which the first of them joined; None: none waits."""
        return next(iter(self._members.values()), None)

    def join(self, order: Order) -> QueuePlace:
        place = QueuePlace(self, (order, next(self._joined)))
        self._members[place] = asyncio.get_running_loop().time()
        return place

    def wake(self, behind: QueuePlace | None = None) -> None:
        """Let the first request in the queue try, or the first behind another."""
        first = bisect(self._standing, behind.key) if behind else 0
        while first < len(self._standing):
            if self._standing.pop(first)[-1].call():
                return

    def stand(self, place: QueuePlace) -> None:
        insort(self._standing, (*place.key, place))

    def leave(self, place: QueuePlace) -> None:
        del self._members[place]
        self.wake()


class QueuePlace:
    """A request's place in the queue, from joining until ``leave``."""

    def __init__(self, queue: WaitQueue, key: tuple[Order, int]) -> None:
        self.key = key
        self._queue = queue
        self._turn: asyncio.Future[bool] | None = None

    async def turn(self, deadline: float) -> bool:
        """Wait until it is worth trying; False: ``deadline`` (``loop.time()``) has passed."""
        loop = asyncio.get_running_loop()
        if loop.time() >= deadline:
            return False
        self._turn = loop.create_future()
        self._queue.stand(self)
        wait = max(deadline - loop.time(), _SHORTEST_WAIT)
        timer = loop.call_later(wait, self._answer, False)
        try:
            return await self._turn
        finally:
            timer.cancel()
            self._turn = None

    def call(self) -> bool:
        """Let the request try; False: it does not wait any more."""
        return self._answer(True)

    def _answer(self, turn: bool) -> bool:
        if self._turn is None or self._turn.done():
            return False
        self._turn.set_result(turn)
        return True

    def pass_on(self) -> None:
        """Let the next request behind this one try: what is free does not suit this one."""
        self._queue.wake(behind=self)

    def leave(self) -> None:
        """Leave the queue, with or without an instance; the next request tries."""
        self._queue.leave(self)
