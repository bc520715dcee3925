"""Chooses what to evict: the least recently used item first, never a pinned one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Pinnable(Protocol):
    """An item of an `Evictor`. Hashed by identity; its text names it in errors."""

    pins: int
    """Number of readers that copy from it now; changed by its cache only."""


T = TypeVar("T", bound=Pinnable)


class Evictor(Generic[T]):
    """Keeps items in use; a *parked* item may be evicted, unless it is pinned."""

    def __init__(self) -> None:
        self.kept: dict[T, bool] = {}
        """Items that cannot be evicted; True: parked already, and evictable after its last pin."""
        self.evictable: OrderedDict[T, None] = OrderedDict()
        """Items that may be evicted, the least recently used first."""

    def __len__(self) -> int:
        return len(self.kept) + len(self.evictable)

    def add(self, item: T) -> None:
        """Add a new item, in use."""
        self.kept[item] = False

    def park(self, item: T) -> None:
        """Note that an item's use has ended; it is now the most recently used.

        Raises:
            ValueError: it is not in use.
        """
        if self.kept.get(item) is not False:
            raise ValueError(f"{item} is not in use: parked or freed before, or another's")
        self.kept[item] = True
        self._settle(item)

    def pin(self, item: T) -> None:
        """Keep an item while it is copied from, even if its use ends.

        Raises:
            ValueError: it is not here.
        """
        self._check(item)
        item.pins += 1
        if item in self.evictable:
            del self.evictable[item]
            self.kept[item] = True

    def unpin(self, item: T) -> None:
        """End a `pin`; a parked item is now the most recently used.

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
