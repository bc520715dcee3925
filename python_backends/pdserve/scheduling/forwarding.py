"""On-demand forwarding: a request goes to an instance that is idle now, or waits at the gateway.

An instance accepts or rejects at once. One that has rejected is not asked again before something
has become free there: while anybody waits here, the gateway watches it (one message, answered
when a slot is free), and hears of slots that its own requests free without that. So nobody polls,
what a request costs does not grow with the number of busy instances, and whatever becomes free
wakes somebody. A watch that hears nothing for ``WATCH_S`` is given up and the instance asked
again: the net under messages that were lost.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from pdserve import errors
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.wait_queue import Order, QueuePlace, WaitQueue
from pdserve.supervision import traced

_log = logging.getLogger(__name__)

# With jitter, so that gateways do not ask together.
WATCH_S = (0.5, 1.0)
SHORTEST_S = 1e-3
MAX_WAITING = 4096

T = TypeVar("T")
R = TypeVar("R")
Offer = Callable[[Instance, bool], Awaitable[T | None]]
"""Offer it to an instance, in a hurry if others wait; None: it is busy. Raises: InstanceError."""
Rank = Callable[[Instance], float | None]
"""The smaller is asked first; None: it cannot be used."""


class Forwarding(Generic[T]):
    """Forwards a gateway's requests to the instances of one role, or to some of them.

    Args:
        role: what the instances are, for messages.
        slots: of one instance.
        batch: requests that one instance works at together, and so the offers that it gets at
            once: one that got a whole burst would reject most of it before another is asked.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        role: str,
        gateway: str,
        slots: int,
        batch: int,
        rng: random.Random,
    ) -> None:
        self.instances = instances
        self._role = role
        self._gateway = gateway
        self._slots = slots
        self._batch = batch
        self._rng = rng
        self._queue = WaitQueue()
        self._lookers = WaitQueue()
        """Those who offer nothing, and look at what instances have told."""
        self._busy: set[Instance] = set()
        self._told: set[Instance] = set()
        """Something is free there, though as far as is known here this gateway has all of it."""
        self._watching: dict[Instance, asyncio.Task[None]] = {}
        self._failure: errors.InstanceError | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def update(self, instances: Sequence[Instance]) -> None:
        """Go on with these instances; whoever waits is offered to those who have joined."""
        for gone in set(self.instances).difference(instances):
            self._busy.discard(gone)
            self._told.discard(gone)
            if (watching := self._watching.pop(gone, None)) is not None:
                watching.cancel()
        self.instances = instances
        self._failure = None
        self._queue.wake()
        self._lookers.wake()

    @property
    def congested(self) -> bool:
        """Whether others wait already, or what this gateway has there fills all of them."""
        return bool(self._queue) or all(map(self._full, self.instances))

    async def take(
        self, order: Order, until: float, rank: Rank, offer: Offer[T], alone_until: float = 0.0
    ) -> T | None:
        """The first offer that is accepted; None: none was until ``until`` (``loop.time()``).

        Args:
            alone_until: until then, if it is later, who stands in nobody's way goes on waiting.

        Raises:
            Unavailable: too many wait, or no instance can be used.
        """
        try:
            # If nobody waits, it may try without standing in line.
            taken = await self._round(rank, offer) if not self._queue else None
            if taken is not None:
                return taken
            return await self._wait(order, (until, alone_until), rank, offer)
        finally:
            self._queue.wake()
            if not self._queue and not self._lookers:
                self._forget()

    async def look(self, order: Order, until: float, find: Callable[[], R | None]) -> R | None:
        """What `find` finds, tried at once and whenever something may have become free.

        Only the first in line looks. None: there was nothing until `until` (``loop.time()``).

        Raises:
            Unavailable: too many wait.
        """
        found = find() if not self._lookers else None
        if found is not None:
            return found
        if len(self._lookers) >= MAX_WAITING:
            raise errors.Unavailable(f"{MAX_WAITING} requests wait for a {self._role} already")
        place = self._lookers.join(order)
        try:
            while found is None:
                self._look_out()
                if not await place.turn(until):
                    return None
                found = find()
            return found
        finally:
            place.leave()
            if not self._queue and not self._lookers:
                self._forget()

    def told(self) -> None:
        """What instances have told, or have been promised, leaves more room than before."""
        self._lookers.wake()

    async def once(self, rank: Rank, offer: Offer[T]) -> T | None:
        """The first offer that is accepted now; None: nobody accepts."""
        try:
            return await self._round(rank, offer)
        finally:
            if not self._queue and not self._lookers:
                self._forget()

    async def _round(self, rank: Rank, offer: Offer[T]) -> T | None:
        """Over those that are not known to be busy."""
        asked: set[Instance] = set()
        while (instance := self._best(rank, asked)) is not None:
            asked.add(instance)
            self._told.discard(instance)
            instance.offers += 1
            instance.asked = asyncio.get_running_loop().time()
            try:
                taken = await offer(instance, bool(self._queue))
            except errors.InstanceError as error:
                self._failure = error
                continue
            finally:
                instance.offers -= 1
            if taken is not None:
                return taken
            if instance in self.instances:  # it may have left meanwhile
                self._busy.add(instance)
            instance.refused = asyncio.get_running_loop().time()
        return None

    def freed(self, instance: Instance) -> None:
        """One of this gateway's own requests holds nothing there any more."""
        self._busy.discard(instance)
        self._queue.wake()
        self._lookers.wake()

    def why_not(self) -> str:
        """What the end of a wait in vain was like, for its error."""
        return self.all_failed() or f"no idle {self._role}"

    def all_failed(self) -> str | None:
        """Says that all have failed, with the last failure; None: some have not.

        One that is on trial counts as failed.
        """
        if self._failure is None or any(one.breaker.closed for one in self.instances):
            return None
        return f"no healthy {self._role} ({self._failure})"

    async def _wait(
        self, order: Order, until: tuple[float, float], rank: Rank, offer: Offer[T]
    ) -> T | None:
        if len(self._queue) >= MAX_WAITING:
            raise errors.Unavailable(f"{MAX_WAITING} requests wait for a {self._role} already")
        place = self._queue.join(order)
        # What became free while it was asking others woke nobody, if nobody else was in line.
        at_once = len(self._queue) == 1
        if not at_once and self._best(rank, set()) is not None:
            # Those before it may be waiting for something else.
            asyncio.get_running_loop().call_soon(self._queue.wake)
        try:
            while at_once or await self._turn(place, until):
                taken = await self._round(rank, offer)
                if taken is not None:
                    return taken
                at_once = self._best(rank, set()) is not None
                if not at_once and self._best(lambda _: 0.0, set()) is not None:
                    place.pass_on()
            return None
        finally:
            place.leave()

    async def _turn(self, place: QueuePlace, until: tuple[float, float]) -> bool:
        """Whether it is worth trying, and still its turn: not if it is late and others wait."""
        self._look_out()
        loop = asyncio.get_running_loop()
        if await place.turn(max(until) if len(self._queue) == 1 else until[0]):
            return loop.time() < until[0] or len(self._queue) == 1
        # It was not alone when it stood in line; it may be now.
        return len(self._queue) == 1 and loop.time() < max(until) and await self._turn(place, until)

    def _best(self, rank: Rank, asked: set[Instance]) -> Instance | None:
        now = asyncio.get_running_loop().time()
        best, least = None, (0.0, 0.0, 0.0)
        # What this gateway fills by itself would only say so: it is watched at once.
        self._busy.update(
            one for one in self.instances if self._full(one) and one not in self._told
        )
        for instance in self.instances:
            if (
                instance in self._busy
                or instance in asked
                or instance.offers >= self._batch
                or not instance.breaker.allows(now, instance.offers)
            ):
                continue
            cost = rank(instance)
            if cost is None:
                continue
            # Among equals the one that has refused the longest ago, since what others have there
            # is not seen from here; then the one that is the furthest with what it has of ours.
            key = cost, instance.refused, instance.asked
            if best is None or key < least:
                best, least = instance, key
        return best

    def _full(self, instance: Instance) -> bool:
        """Whether what this gateway has there is all that it can have."""
        working = instance.open - instance.computed
        return working >= self._batch or instance.open >= self._slots

    def _look_out(self) -> None:
        """Somebody is about to wait: see to it that what becomes free, or well, wakes the line."""
        for instance in self.instances:
            # One that has failed is looked at again when it may be tried.
            waited_for = instance in self._busy or (self._lookers and instance.breaker.closed)
            if waited_for and instance not in self._watching:
                self._watching[instance] = asyncio.create_task(self._watch(instance))
        if self._timer is None:
            loop = asyncio.get_running_loop()
            now = loop.time()
            opens = (max(one.breaker.reopens, one.suspects_from) for one in self.instances)
            reopen = [when for when in opens if when > now]
            again = min([now + self._rng.uniform(*WATCH_S), *reopen])
            # A timer may come a moment early, and would be set again for the same moment.
            again = max(again, now + SHORTEST_S)
            self._timer = loop.call_at(again, self._time_to_look)

    def _time_to_look(self) -> None:
        self._timer = None
        if self._queue or self._lookers:
            self._queue.wake()
            self._lookers.wake()
            self._look_out()

    async def _watch(self, instance: Instance) -> None:
        try:
            while not await instance.watch(self._gateway, self._rng.uniform(*WATCH_S)):
                self._tell(instance)  # or so it may be: it is asked again
        except errors.InstanceError as error:
            self._failure = error
            instance.failed()
        except Exception as error:  # else nobody would hear again of what becomes free there
            _log.error("watching %s has failed\n%s", instance.name, traced(error))
            self._failure = errors.InstanceError(f"{instance.name}: {errors.loggable(error)}")
            instance.failed()
        del self._watching[instance]
        self._tell(instance)

    def _tell(self, instance: Instance) -> None:
        self._told.add(instance)
        self.freed(instance)

    def _forget(self) -> None:
        """Nobody waits: what is busy now need not be when somebody does."""
        self._busy.clear()
        self._told.clear()
        for task in self._watching.values():
            task.cancel()
        self._watching.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
