"""Free intervals of a line of `size` units: best fit, neighbours coalesced."""

from __future__ import annotations

from bisect import bisect_left, insort


class FreeList:
    """The free parts of [0, size), as maximal intervals; the unit is the caller's.

    Every operation costs a binary search and a shift in a list with one entry per hole.
    """

    def __init__(self, size: int) -> None:
        self.free = 0
        """Number of free units, in all holes together."""
        self._by_size: list[tuple[int, int]] = []
        self._size_at: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        if size:
            self.give(0, size)

    def __len__(self) -> int:
        return len(self._by_size)

    def copy(self) -> FreeList:
        """Return a copy with the same holes, for trials."""
        other = FreeList(0)
        other.free = self.free
        other._by_size = self._by_size.copy()
        other._size_at = self._size_at.copy()
        other._start_of = self._start_of.copy()
        return other

    @property
    def largest(self) -> int:
        """Return the units in the largest hole; 0 if nothing is free."""
        return self._by_size[-1][0] if self._by_size else 0

    def take(self, size: int) -> int | None:
        """Take `size` units from the smallest hole that has them, and return their start.

        None: none has.
        """
        index = bisect_left(self._by_size, (size, 0))
        if index == len(self._by_size):
            return None
        found, start = self._by_size[index]
        self._remove(start, found)
        if found > size:
            self._insert(start + size, found - size)
        return start

    def give(self, start: int, size: int) -> None:
        """Return an interval that was taken; it is merged with adjacent holes."""
        if before := start - self._start_of.get(start, start):
            start -= before
            size += before
            self._remove(start, before)
        if after := self._size_at.get(start + size, 0):
            self._remove(start + size, after)
            size += after
        self._insert(start, size)

    def _insert(self, start: int, size: int) -> None:
        insort(self._by_size, (size, start))
        self._size_at[start] = size
        self._start_of[start + size] = start
        self.free += size

    def _remove(self, start: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, start))]
        del self._size_at[start], self._start_of[start + size]
        self.free -= size
