"""Values of pairs of a prefill and a decode, found by either of the two."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Generic, TypeVar

V = TypeVar("V")
Pair = tuple[str, str]
"""Names of a prefill and a decode; names are unique among the instances of a deployment."""


class Pairs(Generic[V]):
    """Maps pairs of a prefill and a decode to values."""

    def __init__(self) -> None:
        self.known: dict[Pair, V] = {}
        """The value of each pair; to be read only."""
        self._others: defaultdict[str, dict[str, None]] = defaultdict(dict)

    def __setitem__(self, pair: Pair, value: V) -> None:
        prefill, decode = pair
        self.known[pair] = value
        self._others[prefill][decode] = self._others[decode][prefill] = None

    def __len__(self) -> int:
        return len(self.known)

    def pop(self, pair: Pair) -> V | None:
        """Remove the value of a pair and return it; None: it had none."""
        value = self.known.pop(pair, None)
        if value is not None and pair[::-1] not in self.known:  # the roles of both may have changed
            for one, other in (pair, pair[::-1]):
                del self._others[one][other]
                if not self._others[one]:
                    del self._others[one]
        return value

    def others(self, name: str) -> Collection[str]:
        """Return the names of the instances that form a pair with this one that has a value."""
        return self._others.get(name, {})

    def drop(self, name: str) -> None:
        """Remove the values of all pairs of this instance."""
        for other in list(self.others(name)):
            self.pop((name, other))
            self.pop((other, name))
