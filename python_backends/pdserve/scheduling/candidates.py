"""The instances of a role that may take a request now, ordered by load.

Choosing one costs the same in a group of two and in one of a thousand: the order is kept as loads
change, and a request looks at the head of it, and at the few instances that are better or worse for
this request than their load says.
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
    """What a request makes of the instances."""

    cost: Callable[[Instance], float | None]
    """The smaller is asked first; None: it cannot be used. Never less than the instance's load; and
    for all that are not ``special``, the load and the same constant."""
    special: Callable[[], Collection[Instance]] = tuple
    """Instances whose cost is another."""
    most: float = math.inf
    """Other instances are used up to this load."""
    only: bool = False
    """And not at all while there are special ones."""
    look: int = 1
    """How many of the others that can be used are compared."""


_Key = tuple[float, float, float, int]
"""Load, when it has refused and when it was asked last, and the instance's number, so that no two
are equal."""


class Candidates:
    """Keeps the order.

    Args:
        load: what instances are ordered by.
        slots: of one instance.
        batch: requests that one instance works at together, and so the offers that it gets at
            once: one that got a whole burst would reject most of it before another is asked.
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
        """What this gateway has there is all that it can have. A dict, as below, for its order."""
        self._failed = Order[tuple[float, int]]()
        """Those whose circuit breaker is not closed, by when they may be tried."""
        self._later: dict[Instance, None] = {}
        """Those that may not take a suspect for a while."""
        self._refusing: dict[Instance, None] = {}
        """Those that have said that they are busy, since anything became free there."""
        self._told: set[Instance] = set()
        """Something is free there, though as far as is known here this gateway has all of it."""
        self.update(instances)

    def update(self, instances: Sequence[Instance]) -> None:
        """Go on with these instances."""
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
        """Whether what this gateway has at each of them is all that it can have."""
        self._renew()
        return len(self._full) == len(self._members)

    @property
    def some(self) -> bool:
        """Whether any of them can be asked."""
        self._renew()
        return bool(self._order) or any(self._trials())

    def usable(self, instance: Instance) -> bool:
        """Whether this one can be asked."""
        self._renew()
        return self._order.key(instance) is not None or (
            self._failed.key(instance) is not None and instance in self._trials()
        )

    @property
    def busy(self) -> Iterator[Instance]:
        """Those that are not asked before something becomes free there."""
        self._renew()
        yield from self._refusing
        for instance in self._full:
            if instance not in self._told and instance not in self._refusing:
                yield instance

    def opens(self, now: float) -> Iterator[float]:
        """When those that are left alone for a while may be asked again (``loop.time()``)."""
        self._renew()
        for instance in [one for one in self._later if one.suspects_from <= now]:
            del self._later[instance]
        for instance in self._later:
            yield max(instance.breaker.reopens, instance.suspects_from)
        yield from itertools.islice((opens for (opens, _), _ in self._failed if opens > now), 1)

    def best(self, rank: Rank, asked: Collection[Instance] = ()) -> Instance | None:
        """The one that costs the least; None: none can be used.

        Among equals the one that has refused the longest ago, since what others have there is not
        seen from here; then the one that is the furthest with what it has of ours.

        Args:
            asked: those that are left out.
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
        """It has said that it is busy."""
        if instance in self._members:  # it may have left meanwhile
            self._refusing[instance] = None
            self._changed.add(instance)

    def freed(self, instance: Instance) -> None:
        """Something is free there again."""
        if instance in self._refusing:
            del self._refusing[instance]
            self._changed.add(instance)

    def tell(self, instance: Instance) -> None:
        """It has said that something is free, whatever is known here."""
        if instance in self._members:
            self._told.add(instance)
            self._refusing.pop(instance, None)
            self._changed.add(instance)

    def ask(self, instance: Instance) -> None:
        """It is about to be asked: what it has said before is over."""
        if instance in self._told:
            self._told.discard(instance)
            self._changed.add(instance)

    def forget(self) -> None:
        """What is busy now need not be when somebody comes."""
        self._changed.update(self._refusing, self._told)
        self._refusing.clear()
        self._told.clear()

    # ------------------------------------------------------------------ the order

    def _renew(self) -> None:
        if not self._changed:
            return
        # In order, or what is first among equals would differ from run to run.
        for instance in sorted(self._changed, key=self._members.__getitem__):
            load = instance.load
            if load.open - load.computed >= self._batch or load.open >= self._slots:
                self._full.setdefault(instance)
            else:
                self._full.pop(instance, None)
            if instance.suspects_from:
                self._later[instance] = None
            closed = instance.breaker.closed
            tried = None if closed else (instance.breaker.reopens, self._members[instance])
            self._failed.put(instance, tried)
            free = load.offers < self._batch and not self._is_busy(instance)
            self._order.put(instance, self._key(instance) if free and closed else None)
        self._changed.clear()

    def _key(self, instance: Instance) -> _Key:
        load = instance.load
        return self._load(load), load.refused, load.asked, self._members[instance]

    def _is_busy(self, instance: Instance) -> bool:
        # What this gateway fills by itself would only say so: it is watched at once.
        return instance in self._refusing or (instance in self._full and instance not in self._told)

    def _trials(self) -> Iterator[Instance]:
        """Those that have failed, and may be tried now."""
        now = asyncio.get_running_loop().time()
        for (reopens, _), instance in self._failed:
            if reopens > now:
                break
            offers = instance.load.offers
            if (
                offers < self._batch
                and not self._is_busy(instance)
                and instance.breaker.allows(now, offers)
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
    """The one that costs the least, of some and the best so far; its cost in the load's place.

    Args:
        entries: by load.
        most: up to this load.
        look: compare so many of those that can be used, at most.
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
