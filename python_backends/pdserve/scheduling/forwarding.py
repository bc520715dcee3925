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
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Generic, TypeVar

from pdserve import errors
from pdserve.scheduling.candidates import Candidates, Rank
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.load import Load
from pdserve.scheduling.wait_queue import Order, QueuePlace, WaitQueue
from pdserve.supervision import traced

_log = logging.getLogger(__name__)

# With jitter, so that gateways do not ask together.
WATCH_S = (0.5, 1.0)
WATCHES = 64
"""Instances that are watched at once, at most: in a large group one of them is free soon."""
WATCHES_MORE, WATCHES_MORE_S = 8, 0.02
"""So many watches begin at once, and as many more each time that somebody still waits after so
long: most waits are over before."""
SHORTEST_S = 1e-3
MAX_WAITING = 4096

T = TypeVar("T")
R = TypeVar("R")
Offer = Callable[[Instance, bool], Awaitable[T | None]]
"""Offer it to an instance, in a hurry if others wait; None: it is busy. Raises: InstanceError."""


class Forwarding(Generic[T]):
    """Forwards a gateway's requests to the instances of one role, or to some of them.

    Args:
        role: what the instances are, for messages.
        load: the less, the sooner an instance is asked.
        slots: of one instance.
        batch: requests that one instance works at together, and so the offers that it gets at
            once: one that got a whole burst would reject most of it before another is asked.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        role: str,
        load: Callable[[Load], float],
        gateway: str,
        slots: int,
        batch: int,
        rng: random.Random,
    ) -> None:
        self.instances = instances
        self._role = role
        self._gateway = gateway
        self._rng = rng
        self.candidates = Candidates(instances, load, slots, batch)
        self._queue = WaitQueue()
        self._lookers = WaitQueue()
        """Those who offer nothing, and look at what instances have told."""
        self._next = 0
        """Of the instances, where everybody is watched in turn."""
        self._watching: dict[Instance, asyncio.Task[None]] = {}
        self._failure: errors.InstanceError | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def update(self, instances: Sequence[Instance]) -> None:
        """Go on with these instances; whoever waits is offered to those who have joined."""
        for gone in set(self.instances).difference(instances):
            if (watching := self._watching.pop(gone, None)) is not None:
                watching.cancel()
        self.instances = instances
        self.candidates.update(instances)
        self._failure = None
        self._queue.wake()
        self._lookers.wake()

    @property
    def congested(self) -> bool:
        """Whether others wait already, or what this gateway has there fills all of them."""
        return bool(self._queue) or self.candidates.all_full

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

    def told_of_link(self) -> None:
        """Somebody may be able to use what another could not."""
        self._queue.wake()

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
        while (instance := self.candidates.best(rank, asked)) is not None:
            asked.add(instance)
            self.candidates.ask(instance)
            instance.load.offer(asyncio.get_running_loop().time())
            try:
                taken = await offer(instance, bool(self._queue))
            except errors.InstanceError as error:
                self._failure = error
                continue
            finally:
                instance.load.answer()
            if taken is not None:
                return taken
            self.candidates.refused(instance)
            instance.load.refuse(asyncio.get_running_loop().time())
        return None

    def freed(self, instance: Instance) -> None:
        """One of this gateway's own requests holds nothing there any more."""
        self.candidates.freed(instance)
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
        if not at_once and self.candidates.best(rank) is not None:
            # Those before it may be waiting for something else.
            asyncio.get_running_loop().call_soon(self._queue.wake)
        try:
            while at_once or await self._turn(place, until):
                taken = await self._round(rank, offer)
                if taken is not None:
                    return taken
                at_once = self.candidates.best(rank) is not None
                if not at_once and self.candidates.some:
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

    def _look_out(self) -> None:
        """Somebody is about to wait: see to it that what becomes free, or well, wakes the line."""
        more = self._watch_more()
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._timer is None:
            again = min([now + self._rng.uniform(*WATCH_S), *self.candidates.opens(now)])
            # A timer may come a moment early, and would be set again for the same moment.
            self._timer = loop.call_at(max(again, now + SHORTEST_S), self._time_to_look)
        if more and self._timer.when() > now + WATCHES_MORE_S:
            self._timer.cancel()
            self._timer = loop.call_at(now + WATCHES_MORE_S, self._time_to_look)

    def _watch_more(self) -> bool:
        """Watch those that somebody waits for; whether there are more of them."""
        left = min(WATCHES_MORE, WATCHES - len(self._watching))
        for instance in self._waited_for():
            if instance not in self._watching:
                if left <= 0:
                    return len(self._watching) < WATCHES
                left -= 1
                self._watching[instance] = asyncio.create_task(self._watch(instance))
        return False

    def _waited_for(self) -> Iterator[Instance]:
        yield from self.candidates.busy
        # One that has failed is looked at again when it may be tried.
        for _ in self.instances if self._lookers else ():
            self._next = (self._next + 1) % len(self.instances)
            instance = self.instances[self._next]
            if instance.breaker.closed:
                yield instance

    def _time_to_look(self) -> None:
        self._timer = None
        if self._queue or self._lookers:
            self._queue.wake()
            self._lookers.wake()
            self._look_out()

    async def _watch(self, instance: Instance) -> None:
        try:
            while not await instance.watch(self._gateway, self._rng.uniform(*WATCH_S)):
                if len(self._watching) >= WATCHES:  # it is another's turn
                    break
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
        self.candidates.tell(instance)
        self.freed(instance)

    def _forget(self) -> None:
        """Nobody waits: what is busy now need not be when somebody does."""
        self.candidates.forget()
        for task in self._watching.values():
            task.cancel()
        self._watching.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
