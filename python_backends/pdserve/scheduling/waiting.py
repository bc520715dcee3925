"""Who goes next: requests that found every instance busy, and how they are woken."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random

_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.02
# Below the resolution of a loop's clock, a wait would let no time pass: 1e-6 in virtual time.
_SHORTEST_WAIT = 1e-5

_Entry = tuple[int, float, int, asyncio.Event]
"""-priority, arrival, order of joining, and the event that wakes it."""


class WaitingLine:
    """A line of waiting requests: higher priority first, then the earlier arrival.

    Only the head of the line tries, so that what a busy deployment costs does not
    grow with the number of those who wait. It tries when something became free
    (``wake``) and, since another gateway's requests free things unseen, after a
    pause that doubles up to 20 ms, with jitter.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._line: list[_Entry] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._line)

    def join(self, priority: int, arrived: float) -> Place:
        entry = (-priority, arrived, next(self._order), asyncio.Event())
        heapq.heappush(self._line, entry)
        return Place(self, entry)

    def wake(self) -> None:
        """Something may be free now."""
        if self._line:
            self._line[0][-1].set()

    def leave(self, entry: _Entry) -> None:
        self._line.remove(entry)
        heapq.heapify(self._line)
        self.wake()

    def is_head(self, entry: _Entry) -> bool:
        return self._line[0] is entry

    def jitter(self, pause: float) -> float:
        return pause * self._rng.uniform(0.5, 1.0)


class Place:
    """A request's place in the line, from joining until ``leave``."""

    def __init__(self, line: WaitingLine, entry: _Entry) -> None:
        self._line = line
        self._entry = entry
        self._pause = _FIRST_PAUSE

    async def turn(self, deadline: float) -> bool:
        """Wait until it is worth trying, as the head of the line; False: ``deadline`` passed."""
        loop = asyncio.get_running_loop()
        event = self._entry[-1]
        while True:
            now = loop.time()
            if now >= deadline:
                return False
            wait = max(deadline - now, _SHORTEST_WAIT)
            if self._line.is_head(self._entry):
                wait = min(wait, self._line.jitter(self._pause))
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            timer = loop.call_later(wait, event.set)
            try:
                await event.wait()
            finally:
                timer.cancel()
            event.clear()
            if self._line.is_head(self._entry):
                return loop.time() < deadline

    def leave(self) -> None:
        """Go on, or give up; the next in line becomes the head."""
        self._line.leave(self._entry)
