"""On-demand forwarding: a request goes to an instance that is idle now, or waits at the gateway.

An instance accepts or rejects at once. One that has rejected is not asked again before something
has become free there: while requests wait here, the gateway watches it (one message, answered when
a slot is free), and it knows without that of slots that its own requests free. So there is no
polling, the cost of a request does not grow with the number of busy instances, and whatever becomes
free wakes a waiting request. A watch that gets no answer for ``WATCH_S`` is given up and the
instance asked again, in case a message was lost.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Generic, TypeVar

from pdserve import errors
from pdserve.observability import catalogue
from pdserve.observability.metrics import Registry
from pdserve.scheduling.candidates import Candidates, Rank
from pdserve.scheduling.instance import Instance
from pdserve.scheduling.load import Load
from pdserve.scheduling.wait_queue import Order, QueuePlace, WaitQueue
from pdserve.supervision import traced

_log = logging.getLogger(__name__)

# Range in seconds; random, so that gateways do not all ask at the same time.
WATCH_S = (0.5, 1.0)
WATCHES = 64
"""Maximum number of instances that are watched at once: in a large group one of them is free
soon."""
WATCHES_MORE, WATCHES_MORE_S = 8, 0.02
"""Number of watches that begin at once, and seconds after which as many more begin if a request
still waits: most waits are shorter."""
SHORTEST_S = 1e-3
MAX_WAITING = 4096

T = TypeVar("T")
R = TypeVar("R")
Offer = Callable[[Instance, bool], Awaitable[T | None]]
"""Offers the request to an instance, in a hurry if others wait; returns None if the instance is
busy. Raises InstanceError; Drained: the instance has left, or another that the request needs."""


class Forwarding(Generic[T]):
    """Forwards a gateway's requests to the instances of one role, or to some of them.

    Args:
        role: name of the role, for error messages.
        load: the smaller it is, the sooner an instance is asked.
        slots: slots of one instance.
        batch: requests that one instance computes together, and so the number of offers that it
            gets at the same time: an instance that got a whole burst would reject most of it before
            another is asked.
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
        """Requests that offer nothing and only check what instances have reported."""
        self._next = 0
        """Index of the next instance to watch, where all instances are watched in turn."""
        self._watching: dict[Instance, asyncio.Task[None]] = {}
        self._failure: errors.InstanceError | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return len(self._queue)

    def update(self, instances: Sequence[Instance]) -> None:
        """Replace the instances; waiting requests are offered to those that have joined."""
        here = set(instances)
        for gone in [one for one in self.instances if one not in here]:
            if (watching := self._watching.pop(gone, None)) is not None:
                watching.cancel()
        self.instances = instances
        self.candidates.update(instances)
        self._failure = None
        self._queue.wake()
        self._lookers.wake()

    def show(self, metrics: Registry, gateway: str, group: str) -> None:
        """Set the metrics of the requests that wait for an instance, or for room in one."""
        labels = {"gateway": gateway, "group": group, "role": self._role}
        waiting = len(self._queue) + len(self._lookers)
        metrics.set(catalogue.WAITING_REQUESTS, waiting, **labels)
        now = asyncio.get_running_loop().time()
        joined = [queue.oldest for queue in (self._queue, self._lookers)]
        oldest = min((time for time in joined if time is not None), default=now)
        metrics.set(catalogue.OLDEST_WAITING, now - oldest, **labels)

    @property
    def congested(self) -> bool:
        """Tell whether requests wait already, or this gateway's calls fill all instances."""
        return bool(self._queue) or self.candidates.all_full

    async def take(
        self, order: Order, until: float, rank: Rank, offer: Offer[T], alone_until: float = 0.0
    ) -> T | None:
        """Return the first accepted offer.

        None: none was accepted before ``until`` (``loop.time()``).

        Args:
            alone_until: if this is later than ``until``, a request that nobody waits behind goes on
                waiting until then.

        Raises:
            Unavailable: too many requests wait, or no instance can be used.
        """
        try:
            # If no request waits, this one may try without joining the queue.
            taken = await self._round(rank, offer) if not self._queue else None
            if taken is not None:
                return taken
            return await self._wait(order, (until, alone_until), rank, offer)
        finally:
            self._queue.wake()
            if not self._queue and not self._lookers:
                self._forget()

    async def look(self, order: Order, until: float, find: Callable[[], R | None]) -> R | None:
        """Return what `find` returns, called at once and whenever something may have become free.

        Only the first in the queue calls it. None: nothing was found before `until`
        (``loop.time()``).

        Raises:
            Unavailable: too many requests wait.
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
        """Wake the first looking request: there is more room than before."""
        self._lookers.wake()

    def wake(self) -> None:
        """Wake the queue: its first request may be able to use an instance that it could not use
        before."""
        self._queue.wake()

    async def once(self, rank: Rank, offer: Offer[T]) -> T | None:
        """Return the first offer that is accepted now; None: no instance accepts."""
        try:
            return await self._round(rank, offer)
        finally:
            if not self._queue and not self._lookers:
                self._forget()

    async def _round(self, rank: Rank, offer: Offer[T]) -> T | None:
        """Offer the request to the instances that are not known to be busy, one after another."""
        asked: set[Instance] = set()
        while (instance := self.candidates.best(rank, asked)) is not None:
            asked.add(instance)
            self.candidates.ask(instance)
            instance.load.offer(asyncio.get_running_loop().time())
            try:
                taken = await offer(instance, bool(self._queue))
            except errors.Drained:
                if not instance.left:  # another instance that the request needs has left
                    raise
                continue
            except errors.InstanceError as error:
                self._failure = error
                continue
            finally:
                instance.load.answer()
                self.candidates.answered(instance)
            if taken is not None:
                return taken
            self.candidates.refused(instance)
            instance.load.refuse(asyncio.get_running_loop().time())
            self._watch_again(instance)
        return None

    def freed(self, instance: Instance) -> None:
        """Note that one of this gateway's own requests has freed something at an instance."""
        self.candidates.freed(instance)
        self._queue.wake()
        self._lookers.wake()

    def why_not(self) -> str:
        """Say why a wait ended without an instance, for the error."""
        return self.all_failed() or f"no idle {self._role}"

    def all_failed(self) -> str | None:
        """Say that all instances have failed, with the last failure; None: some have not.

        An instance on trial counts as failed.
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
        # If no other request was queued, nobody was woken by what became free during the offers.
        at_once = len(self._queue) == 1
        if not at_once and self.candidates.best(rank) is not None:
            # The requests before it may be waiting for something else.
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
        """Wait for the request's turn; False: it is late and others wait."""
        self._look_out()
        loop = asyncio.get_running_loop()
        if await place.turn(max(until) if len(self._queue) == 1 else until[0]):
            return loop.time() < until[0] or len(self._queue) == 1
        # It was not alone when it joined the queue; it may be now.
        return len(self._queue) == 1 and loop.time() < max(until) and await self._turn(place, until)

    def _look_out(self) -> None:
        """Make sure that the queue is woken when an instance becomes free or recovers."""
        more = self._watch_more()
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._timer is None:
            again = min([now + self._rng.uniform(*WATCH_S), *self.candidates.opens(now)])
            # A timer may fire slightly early, and would then be set again for the same moment.
            self._timer = loop.call_at(max(again, now + SHORTEST_S), self._time_to_look)
        if more and self._timer.when() > now + WATCHES_MORE_S:
            self._timer.cancel()
            self._timer = loop.call_at(now + WATCHES_MORE_S, self._time_to_look)

    def _watch_more(self) -> bool:
        """Watch instances that requests wait for; return whether there are more to watch."""
        left = min(WATCHES_MORE, WATCHES - len(self._watching))
        for instance in self._waited_for():
            if instance not in self._watching:
                if left <= 0:
                    return len(self._watching) < WATCHES
                left -= 1
                self._watching[instance] = asyncio.create_task(self._watch(instance))
        return False

    def _watch_again(self, instance: Instance) -> None:
        """Renew the watch of a decode that has refused a request since the watch was sent.

        The watch states the room that was known before the refusal. If as much as that has become
        free before the watch arrives, the decode sees nothing new in it and does not answer.
        """
        if instance.room.told is not None and instance in self._watching:
            self._watching[instance].cancel()
            self._watching[instance] = asyncio.create_task(self._watch(instance))

    def _waited_for(self) -> Iterator[Instance]:
        yield from self.candidates.busy
        # A failed instance is asked again when a trial is allowed.
        for _ in self.instances if self._lookers else ():
            self._next = (self._next + 1) % len(self.instances)
            instance = self.instances[self._next]
            if instance.breaker.closed and not instance.left:
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
                if len(self._watching) >= WATCHES:  # other instances have their turn
                    break
                self._tell(instance)  # it may be free all the same: ask it again
        except errors.Drained:
            pass  # it is offered nothing any more
        except errors.InstanceError as error:
            self._failure = error
            instance.failed()
        except Exception as error:  # otherwise nothing that becomes free there would be noticed
            _log.error("watching %s has failed\n%s", instance.name, traced(error))
            self._failure = errors.InstanceError(f"{instance.name}: {errors.loggable(error)}")
            instance.failed()
        del self._watching[instance]
        self._tell(instance)

    def _tell(self, instance: Instance) -> None:
        self.candidates.tell(instance)
        self.freed(instance)

    def _forget(self) -> None:
        """Stop watching, since no request waits: what is busy now may be idle when one does."""
        self.candidates.forget()
        for task in self._watching.values():
            task.cancel()
        self._watching.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
