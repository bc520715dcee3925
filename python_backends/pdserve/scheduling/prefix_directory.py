"""Which instance has which prefixes cached, as far as its answers have told.

A prefill says with every answer which prefixes of that prompt it has from then on; of a decode it
is known what it has decoded. What they evict is not told: an answer that found less in the cache
than was expected corrects it. So this is a guess, used to choose among those that may take a
request now, and never a reason to wait for a busy one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from pdserve.kvcache.prefix_index import BLOCK_TOKENS, SHORT_BYTES, chain

MOST = 1 << 16
"""Prefixes known at once; the least recently used are forgotten."""
HOLDERS = 128
"""Instances known to have one prefix; those that stored it the longest ago are forgotten."""
SOME = 32
"""Instances with a prefix that are told apart: where more have it, the load decides."""


class Cached:
    """The tokens of one prompt that instances are believed to have.

    Args:
        holders: of the first block, the first two, and so on, each in one of its lives.
        lives: which life of each instance counts, where it is not the first.
    """

    def __init__(self, holders: list[dict[str, int]], lives: Mapping[str, int]) -> None:
        self._holders = holders
        self._lives = lives
        self.some: dict[str, int] = {}
        """Tokens by instance, without those that have none: SOME instances at most, those with the
        most tokens."""
        self.all = True
        """These are all."""
        for names in reversed(holders):
            for name in reversed(names):
                if name in self.some or not (tokens := self._count(name)):
                    continue
                if len(self.some) == SOME:
                    self.all = False
                    return
                self.some[name] = tokens

    def tokens(self, name: str) -> int:
        """How many an instance has."""
        found = self.some.get(name)
        if found is None:
            found = 0 if self.all else self._count(name)
        return found

    @property
    def most(self) -> int:
        """The most that any has."""
        return max(self.some.values(), default=0)

    def _count(self, name: str) -> int:
        life = self._lives.get(name, 0)
        for depth, lives in enumerate(self._holders):
            if lives.get(name) != life:
                return depth * BLOCK_TOKENS
        return len(self._holders) * BLOCK_TOKENS


NOTHING = Cached([], {})


class PrefixDirectory:
    """Knows instances by the prefixes that they have, as chained hashes.

    Equal hashes are equal prefixes of one tenant.
    """

    def __init__(self) -> None:
        self._holders: OrderedDict[bytes, dict[str, int]] = OrderedDict()
        self._lives: dict[str, int] = {}

    def cached(self, digests: Iterable[bytes]) -> Cached:
        """What instances are believed to have of a prompt.

        No more of its digests are taken than lead on.
        """
        found = []
        for digest in digests:
            if not (holders := self._holders.get(digest)):
                break
            found.append(holders)
        return Cached(found, self._lives) if found else NOTHING

    def stored(self, name: str, digests: bytes) -> None:
        """An instance has these from now on; ``SHORT_BYTES`` each."""
        life = self._lives.get(name, 0)
        for start in range(0, len(digests), SHORT_BYTES):
            digest = digests[start : start + SHORT_BYTES]
            holders = self._holders.setdefault(digest, {})
            holders.pop(name, None)
            holders[name] = life  # the last of them now
            if len(holders) > HOLDERS:
                del holders[next(iter(holders))]
            self._holders.move_to_end(digest)
        while len(self._holders) > MOST:
            self._holders.popitem(last=False)

    def correct(self, name: str, digests: Iterable[bytes], found: int, expected: int) -> None:
        """It had only ``found`` tokens of a prompt, where ``expected`` were."""
        if found < expected:
            self.gone(name, islice(digests, found // BLOCK_TOKENS, expected // BLOCK_TOKENS))

    def gone(self, name: str, digests: Iterable[bytes]) -> None:
        """It has not had these after all."""
        for digest in digests:
            if holders := self._holders.get(digest):
                holders.pop(name, None)

    def forget(self, name: str) -> None:
        """It has failed, and its cache with it."""
        # What it had is left where it is: there may be many instances, and many prefixes of each.
        self._lives[name] = self._lives.get(name, 0) + 1


def digests(ids: bytes, tenant: str) -> Iterator[bytes]:
    """Hashes of a prompt's prefixes, as instances tell them.

    The last token is left out: it is always computed.

    Args:
        ids: little-endian int32.
    """
    tokens: Any = np.frombuffer(ids, "<i4")
    return (digest[:SHORT_BYTES] for digest in chain(tokens, tenant, len(tokens) - 1))
