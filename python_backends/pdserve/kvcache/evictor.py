"""Who of those that occupy memory may be evicted: least recently used first, never while pinned."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Pinnable(Protocol):
    """Hashed by identity; its text names it in errors."""

    pins: int
    """Those who copy from it now; changed by its cache only."""


T = TypeVar("T", bound=Pinnable)


class Evictor(Generic[T]):
    """Items in use stay; a *parked* one may be evicted, once nobody pins it."""

    def __init__(self) -> None:
        self.kept: dict[T, bool] = {}
        """Those that stay; True: parked already, and evictable when its last pin goes."""
        self.evictable: OrderedDict[T, None] = OrderedDict()
        """Least recently used first."""

    def __len__(self) -> int:
        return len(self.kept) + len(self.evictable)

    def add(self, item: T) -> None:
        """A new item, in use."""
        self.kept[item] = False

    def park(self, item: T) -> None:
        """An item's use has ended; it is now the most recently used.

        Raises:
            ValueError: it is not in use.
        """
        if self.kept.get(item) is not False:
            raise ValueError(f"{item} is not in use: parked or freed before, or another's")
        self.kept[item] = True
        self._settle(item)

    def pin(self, item: T) -> None:
        """Keep an item while it is copied from, whatever becomes of its use.

        Raises:
            ValueError: it is not here.
        """
        self._check(item)
        item.pins += 1
        if item in self.evictable:
            del self.evictable[item]
            self.kept[item] = True

    def unpin(self, item: T) -> None:
        """End of `pin`; a parked item is now the most recently used.

        Raises:
            ValueError: it is not pinned.
        """
        if not item.pins:
            raise ValueError(f"{item} is not pinned")
        item.pins -= 1
        self._settle(item)

    def remove(self, item: T) -> None:
        """Forget an item, in use or parked.

        Raises:
            ValueError: it is not here, or pinned.
        """
        self._check(item)
        if item.pins:
            raise ValueError(f"{item} is pinned by {item.pins} and cannot be freed")
        self.kept.pop(item, None)
        self.evictable.pop(item, None)

    def _check(self, item: T) -> None:
        if item not in self.kept and item not in self.evictable:
            raise ValueError(f"{item} is not held: freed before, or another's")

    def _settle(self, item: T) -> None:
        if self.kept[item] and not item.pins:
            del self.kept[item]
            self.evictable[item] = None
