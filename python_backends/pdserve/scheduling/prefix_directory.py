"""Which instance has which prefixes cached, as far as its replies have told.

With every result a prefill reports which prefixes of that prompt it has cached; a decode is known
to have cached what it has decoded. Evictions are not reported: a result that found less in the
cache than expected corrects the directory. So it is a guess, used to choose among the instances
that may take a request now, and never a reason to wait for a busy one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from pdserve.kvcache.prefix_index import BLOCK_TOKENS, SHORT_BYTES, chain

MOST = 1 << 16
"""Number of prefixes known at once; the least recently used are forgotten."""
HOLDERS = 128
"""Instances known to have one prefix; those that stored it the longest ago are forgotten."""
SOME = 32
"""Instances with a prefix that are distinguished: where more have it, the load decides."""


class Cached:
    """The tokens of one prompt that instances are believed to have cached.

    Args:
        holders: for the first block, the first two blocks and so on, the instances that have them,
            each with its life (restarts counted).
        lives: the life of each instance that counts, where it is not the first.
    """

    def __init__(self, holders: list[dict[str, int]], lives: Mapping[str, int]) -> None:
        self._holders = holders
        self._lives = lives
        self.some: dict[str, int] = {}
        """Cached tokens by instance, without those that have none: at most SOME instances, those
        with the most tokens."""
        self.all = True
        """True if ``some`` holds all instances that have any."""
        for names in reversed(holders):
            for name in reversed(names):
                if name in self.some or not (tokens := self._count(name)):
                    continue
                if len(self.some) == SOME:
                    self.all = False
                    return
                self.some[name] = tokens

    def tokens(self, name: str) -> int:
        """Return the number of tokens that an instance has cached."""
        found = self.some.get(name)
        if found is None:
            found = 0 if self.all else self._count(name)
        return found

    @property
    def most(self) -> int:
        """Return the largest number of tokens that any instance has cached."""
        return max(self.some.values(), default=0)

    def _count(self, name: str) -> int:
        life = self._lives.get(name, 0)
        for depth, lives in enumerate(self._holders):
            if lives.get(name) != life:
                return depth * BLOCK_TOKENS
        return len(self._holders) * BLOCK_TOKENS


NOTHING = Cached([], {})


class PrefixDirectory:
    """Knows which instances have which prefixes cached, as chained hashes.

    Equal hashes mean equal prefixes of one salt.
    """

    def __init__(self) -> None:
        self._holders: OrderedDict[bytes, dict[str, int]] = OrderedDict()
        self._lives: dict[str, int] = {}

    def cached(self, digests: Iterable[bytes]) -> Cached:
        """Return what instances are believed to have cached of a prompt.

        Only as many of its digests are read as are found, and one more.
        """
        found = []
        for digest in digests:
            if not (holders := self._holders.get(digest)):
                break
            found.append(holders)
        return Cached(found, self._lives) if found else NOTHING

    def stored(self, name: str, digests: bytes) -> None:
        """Note that an instance has these prefixes from now on; ``SHORT_BYTES`` each."""
        life = self._lives.get(name, 0)
        for start in range(0, len(digests), SHORT_BYTES):
            digest = digests[start : start + SHORT_BYTES]
            holders = self._holders.setdefault(digest, {})
            holders.pop(name, None)
            holders[name] = life  # moved to the end: the most recent
            if len(holders) > HOLDERS:
                del holders[next(iter(holders))]
            self._holders.move_to_end(digest)
        while len(self._holders) > MOST:
            self._holders.popitem(last=False)

    def correct(self, name: str, digests: Iterable[bytes], found: int, expected: int) -> None:
        """Note that an instance had only ``found`` tokens of a prompt cached, not ``expected``."""
        if found < expected:
            self.gone(name, islice(digests, found // BLOCK_TOKENS, expected // BLOCK_TOKENS))

    def gone(self, name: str, digests: Iterable[bytes]) -> None:
        """Note that an instance does not have these prefixes after all."""
        for digest in digests:
            if holders := self._holders.get(digest):
                holders.pop(name, None)

    def forget(self, name: str) -> None:
        """Forget the cache of an instance that has failed."""
        # Its entries stay where they are, since there may be many instances with many prefixes
        # each: those of a former life do not count.
        self._lives[name] = self._lives.get(name, 0) + 1


def digests(ids: bytes, salt: str) -> Iterator[bytes]:
    """Return the hashes of a prompt's prefixes, as instances report them.

    The last token is left out, since it is always computed.

    Args:
        ids: little-endian int32.
    """
    tokens: Any = np.frombuffer(ids, "<i4")
    return (digest[:SHORT_BYTES] for digest in chain(tokens, salt, len(tokens) - 1))
