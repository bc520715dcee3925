"""What is known of pairs of a prefill and a decode, by either of the two."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Generic, TypeVar

V = TypeVar("V")
Pair = tuple[str, str]
"""Names of a prefill and a decode; no two instances of a deployment have the same."""


class Pairs(Generic[V]):
    """One value for each pair that has one."""

    def __init__(self) -> None:
        self.known: dict[Pair, V] = {}
        """The values, to be read."""
        self._others: defaultdict[str, dict[str, None]] = defaultdict(dict)

    def __setitem__(self, pair: Pair, value: V) -> None:
        prefill, decode = pair
        self.known[pair] = value
        self._others[prefill][decode] = self._others[decode][prefill] = None

    def __len__(self) -> int:
        return len(self.known)

    def pop(self, pair: Pair) -> V | None:
        """The value of a pair, which has none any more; None: it had none."""
        if pair not in self.known:
            return None
        for one, other in (pair, pair[::-1]):
            del self._others[one][other]
            if not self._others[one]:
                del self._others[one]
        return self.known.pop(pair)

    def others(self, name: str) -> Collection[str]:
        """Names of those with which an instance is a pair that has a value."""
        return self._others.get(name, {})

    def drop(self, name: str) -> None:
        """No pair of this instance has a value any more."""
        for other in list(self.others(name)):
            self.pop((name, other))
            self.pop((other, name))
