"""The plan of which prefills and decodes are linked before any request needs it.

In a large group not every decode is linked to every prefill: links cost memory on both sides, and
their number would grow with the square of the group. Each instance chooses PEERS of the other role,
those that follow the hash of its name on a hash ring of their names. So all gateways make the same
plan, and an instance that joins or leaves changes the plan of few others (consistent hashing,
Karger et al. 1997).
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator
from hashlib import blake2b

PEERS = 8
"""Links that each instance plans; its peers may plan more with it. Groups of up to this size are
linked fully."""


class Ring:
    """A hash ring: names, ordered by their hashes."""

    def __init__(self, names: Iterable[str]) -> None:
        self._points = sorted((_hash(name), name) for name in names)

    def after(self, name: str) -> Iterator[str]:
        """Yield each name once, beginning with the one that follows the hash of ``name``."""
        begin = bisect(self._points, (_hash(name), name))
        for _, found in (*self._points[begin:], *self._points[:begin]):
            yield found


def _hash(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=8).digest()
