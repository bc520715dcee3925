"""Instances ordered by a key that changes."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from pdserve.scheduling.instance import Instance

K = TypeVar("K", bound=tuple[float, ...])


class Order(Generic[K]):
    """Keeps instances by key, the smallest first. No two instances have equal keys.

    A sorted list: to move one of a thousand entries takes two microseconds.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[K, Instance]] = []
        self._keys: dict[Instance, K] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[K, Instance]]:
        return iter(self._entries)

    def key(self, instance: Instance) -> K | None:
        """Return an instance's key; None: it is not in the order."""
        return self._keys.get(instance)

    @property
    def first(self) -> tuple[K, Instance] | None:
        """Return the smallest key and its instance; None: the order is empty."""
        return self._entries[0] if self._entries else None

    @property
    def last(self) -> Instance | None:
        """Return the instance with the largest key; None: the order is empty."""
        return self._entries[-1][1] if self._entries else None

    def put(self, instance: Instance, key: K | None) -> None:
        """Set an instance's key; None takes the instance out of the order."""
        before = self._keys.get(instance)
        if before == key:
            return
        if before is not None:
            del self._entries[bisect_left(self._entries, (before,))]
        if key is None:
            del self._keys[instance]
        else:
            self._keys[instance] = key
            insort(self._entries, (key, instance))
