"""Which prefill has which prefixes cached, as far as their answers have told.

A prefill says with every answer which prefixes of that prompt it has from then on. What it evicts
is not told: an answer that found less in the cache than was expected corrects it. So this is a
guess, used to choose among idle prefills, and never a reason to wait for a busy one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pdserve.kvcache.prefix import BLOCK_TOKENS, SHORT_BYTES

MOST = 1 << 16
"""Prefixes known at once; the least recently used are forgotten."""


class Prefixes:
    """By chained hashes: equal ones are equal prefixes of one tenant."""

    def __init__(self) -> None:
        self._holders: OrderedDict[bytes, set[str]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._holders)

    def cached(self, chain: Sequence[bytes]) -> dict[str, int]:
        """Tokens of a prompt that instances are believed to have; those with none are left out."""
        found: dict[str, int] = {}
        for depth, digest in enumerate(chain):
            holders = self._holders.get(digest, ())
            for name in holders:
                if found.get(name, 0) == depth * BLOCK_TOKENS:
                    found[name] = (depth + 1) * BLOCK_TOKENS
            if not holders:
                break
        return found

    def stored(self, name: str, digests: bytes) -> None:
        """An instance has these from now on; ``SHORT_BYTES`` each."""
        for start in range(0, len(digests), SHORT_BYTES):
            digest = digests[start : start + SHORT_BYTES]
            self._holders.setdefault(digest, set()).add(name)
            self._holders.move_to_end(digest)
        while len(self._holders) > MOST:
            self._holders.popitem(last=False)

    def gone(self, name: str, digests: Sequence[bytes]) -> None:
        """It has not had these after all."""
        for digest in digests:
            if holders := self._holders.get(digest):
                holders.discard(name)

    def forget(self, name: str) -> None:
        """It has failed, and its cache with it."""
        for holders in self._holders.values():
            holders.discard(name)
