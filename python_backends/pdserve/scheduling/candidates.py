"""The instances of one role that may be offered a request now, ordered by load.

Choosing one costs the same in a group of two and in one of a thousand: the order is maintained as
loads change, and a request looks at the head of it and at the few instances that are better or
worse for this request than their load says.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from pdserve.scheduling.instance import Instance
from pdserve.scheduling.load import Load
from pdserve.scheduling.order import Order


class Rank(NamedTuple):
    """How one request orders the instances."""

    cost: Callable[[Instance], float | None]
    """Cost of an instance; the one with the smallest cost is offered the request first. None: the
    instance cannot be used. The cost is never less than the instance's load; for all instances that
    are not ``special`` it is the load plus the same constant."""
    special: Callable[[], Collection[Instance]] = tuple
    """Instances whose cost differs from their load plus the constant."""
    most: float = math.inf
    """Instances that are not special are used up to this load."""
    only: bool = False
    """Instances that are not special are not used at all while there are special ones."""
    look: int = 1
    """Number of usable instances that are not special to compare."""


_Key = tuple[float, float, float, int]
"""Sort key: load, time of the last refusal, time of the last offer, and the instance's number, so
that no two keys are equal."""


class Candidates:
    """Keeps the instances of one role in the order in which they are offered requests.

    Args:
        load: returns the load by which instances are ordered.
        slots: slots of one instance.
        batch: requests that one instance computes together, and so the number of offers that it
            gets at the same time: an instance that got a whole burst would reject most of it before
            another is asked.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        load: Callable[[Load], float],
        slots: int,
        batch: int,
    ) -> None:
        self._load = load
        self._slots = slots
        self._batch = batch
        self._numbers = itertools.count(1)
        self._members: dict[Instance, int] = {}
        self._changed: set[Instance] = set()
        self._order = Order[_Key]()
        self._full: dict[Instance, None] = {}
        """Instances at which this gateway's calls take up all that it can have. A dict, like those
        below, since it keeps its order."""
        self._failed = Order[tuple[float, int]]()
        """Instances whose circuit breaker is not closed, by the time from which they may be
        tried."""
        self._later: dict[Instance, None] = {}
        """Instances that may not take a suspect for a while."""
        self._refusing: dict[Instance, None] = {}
        """Instances that have refused a request as busy, and where nothing has become free
        since."""
        self._told: set[Instance] = set()
        """Instances that have reported something free, although this gateway's calls take up all of
        them as far as it knows."""
        self._offers: dict[Instance, int] = {}
        """Number of offers from here that each instance has not answered. Those of other groups,
        which an instance may serve as well, do not count: no request here is woken when they end.
        """
        self.update(instances)

    def update(self, instances: Sequence[Instance]) -> None:
        """Replace the instances; what is known of those that stay is kept."""
        members = dict.fromkeys(instances, 0)
        for gone in self._members.keys() - members.keys():
            gone.listeners.remove(self._changed.add)
            self._order.put(gone, None)
            self._failed.put(gone, None)
            for known in (self._full, self._later, self._refusing):
                known.pop(gone, None)
            self._told.discard(gone)
            self._changed.discard(gone)
        for instance in members:
            if instance not in self._members:
                instance.listeners.append(self._changed.add)
                self._changed.add(instance)
            members[instance] = self._members.get(instance) or next(self._numbers)
        self._members = members

    @property
    def all_full(self) -> bool:
        """Tell whether this gateway's calls take up all that it can have at every instance."""
        self._renew()
        return len(self._full) == len(self._members)

    @property
    def some(self) -> bool:
        """Tell whether any instance can be offered a request."""
        self._renew()
        return bool(self._order) or any(self._trials())

    def usable(self, instance: Instance) -> bool:
        """Tell whether this instance can be offered a request."""
        self._renew()
        return self._order.key(instance) is not None or (
            self._failed.key(instance) is not None and instance in self._trials()
        )

    @property
    def busy(self) -> Iterator[Instance]:
        """Yield the instances that are not offered requests before something becomes free there."""
        self._renew()
        yield from (one for one in self._refusing if not one.left)
        for instance in self._full:
            if instance not in self._told and instance not in self._refusing and not instance.left:
                yield instance

    def opens(self, now: float) -> Iterator[float]:
        """Yield the times (``loop.time()``) from which excluded instances may be tried again."""
        self._renew()
        for instance in [one for one in self._later if one.suspects_from <= now]:
            del self._later[instance]
        for instance in self._later:
            yield max(instance.breaker.reopens, instance.suspects_from)
        yield from itertools.islice((opens for (opens, _), _ in self._failed if opens > now), 1)

    def best(self, rank: Rank, asked: Collection[Instance] = ()) -> Instance | None:
        """Return the instance with the smallest cost; None: none can be used.

        Among equals, the one that refused the longest ago is chosen, since the load of other
        gateways is not seen from here; then the one that was offered something the longest ago.

        Args:
            asked: instances to leave out.
        """
        self._renew()
        special = rank.special()
        alone = rank.only and bool(special)
        best = None
        if special:
            known = [(self._order.key(one), one) for one in special]
            usable = sorted([(key, one) for key, one in known if key is not None])
            best = _least(usable, rank, asked, best)
        if self._failed:
            trials = [one for one in self._trials() if one in special or not alone]
            best = _least(sorted([(self._key(one), one) for one in trials]), rank, asked, best)
        if not alone:
            left_out = {*asked, *special} if special else asked
            best = _least(self._order, rank, left_out, best, rank.most, rank.look)
        return None if best is None else best[1]

    def refused(self, instance: Instance) -> None:
        """Note that an instance has refused a request as busy."""
        if instance in self._members:  # it may have left meanwhile
            self._refusing[instance] = None
            self._changed.add(instance)

    def freed(self, instance: Instance) -> None:
        """Note that something has become free at an instance."""
        if instance in self._refusing:
            del self._refusing[instance]
            self._changed.add(instance)

    def tell(self, instance: Instance) -> None:
        """Note that an instance has reported something free, whatever is known here."""
        if instance in self._members:
            self._told.add(instance)
            self._refusing.pop(instance, None)
            self._changed.add(instance)

    def ask(self, instance: Instance) -> None:
        """Note that an instance is about to be offered a request; its last report is dropped."""
        self._told.discard(instance)
        self._offer(instance, 1)

    def answered(self, instance: Instance) -> None:
        """Note that an offer has been answered or has failed; the instance may have left."""
        self._offer(instance, -1)

    def _offer(self, instance: Instance, change: int) -> None:
        self._offers[instance] = self._offers.get(instance, 0) + change
        if not self._offers[instance]:
            del self._offers[instance]
        if instance in self._members:
            self._changed.add(instance)

    def forget(self) -> None:
        """Forget which instances are busy: they may be idle when the next request comes."""
        self._changed.update(self._refusing, self._told)
        self._refusing.clear()
        self._told.clear()

    # ------------------------------------------------------------------ the order

    def _renew(self) -> None:
        if not self._changed:
            return
        # Sorted, since otherwise the first among equals would differ from run to run.
        for instance in sorted(self._changed, key=self._members.__getitem__):
            load = instance.load
            if load.open - load.computed >= self._batch or load.open >= self._slots:
                self._full.setdefault(instance)
            else:
                self._full.pop(instance, None)
            if instance.suspects_from:
                self._later[instance] = None
            closed = instance.breaker.closed
            tried = (
                None
                if closed or instance.left
                else (instance.breaker.reopens, self._members[instance])
            )
            self._failed.put(instance, tried)
            free = self._takes_offers(instance) and not self._is_busy(instance)
            self._order.put(instance, self._key(instance) if free and closed else None)
        self._changed.clear()

    def _key(self, instance: Instance) -> _Key:
        load = instance.load
        return self._load(load), load.refused, load.asked, self._members[instance]

    def _takes_offers(self, instance: Instance) -> bool:
        return not instance.left and self._offers.get(instance, 0) < self._batch

    def _is_busy(self, instance: Instance) -> bool:
        # An instance that this gateway fills by itself would only refuse: it is watched at once.
        return instance in self._refusing or (instance in self._full and instance not in self._told)

    def _trials(self) -> Iterator[Instance]:
        """Yield the instances that have failed and may be tried now."""
        now = asyncio.get_running_loop().time()
        for (reopens, _), instance in self._failed:
            if reopens > now:
                break
            if (
                self._takes_offers(instance)
                and not self._is_busy(instance)
                and instance.breaker.allows(now, instance.load.offers)
            ):
                yield instance


def _least(
    entries: Iterable[tuple[_Key, Instance]],
    rank: Rank,
    left_out: Collection[Instance],
    best: tuple[_Key, Instance] | None,
    most: float = math.inf,
    look: int = sys.maxsize,
) -> tuple[_Key, Instance] | None:
    """Return the entry with the smallest cost, the best so far included; its load is that cost.

    Args:
        entries: instances by load, the smallest first.
        most: largest load to consider.
        look: number of usable instances to compare, at most.
    """
    for key, instance in entries:
        if not look or key[0] > most or (best is not None and best[0] <= key):
            break  # no cost is less than its load
        if instance not in left_out and (cost := rank.cost(instance)) is not None:
            found = (cost, *key[1:]), instance
            if best is None or found[0] < best[0]:
                best = found
            look -= 1
    return best
