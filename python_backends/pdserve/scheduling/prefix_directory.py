"""Which instance has which prefixes cached, as far as its answers have told.

A prefill says with every answer which prefixes of that prompt it has from then on; of a decode it
is known what it has decoded. What they evict is not told: an answer that found less in the cache
than was expected corrects it. So this is a guess, used to choose among those that may take a
request now, and never a reason to wait for a busy one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from pdserve.kvcache.prefix_index import BLOCK_TOKENS, SHORT_BYTES, chain

MOST = 1 << 16
"""Prefixes known at once; the least recently used are forgotten."""


class PrefixDirectory:
    """Knows instances by the prefixes that they have, as chained hashes.

    Equal hashes are equal prefixes of one tenant.
    """

    def __init__(self) -> None:
        self._holders: OrderedDict[bytes, set[str]] = OrderedDict()

    def cached(self, digests: Iterable[bytes]) -> dict[str, int]:
        """Tokens of a prompt that instances are believed to have; those with none are left out.

        No more of its digests are taken than lead on.
        """
        found: dict[str, int] = {}
        for depth, digest in enumerate(digests):
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

    def correct(self, name: str, digests: Iterable[bytes], found: int, expected: int) -> None:
        """It had only ``found`` tokens of a prompt, where ``expected`` were."""
        if found < expected:
            self.gone(name, islice(digests, found // BLOCK_TOKENS, expected // BLOCK_TOKENS))

    def gone(self, name: str, digests: Iterable[bytes]) -> None:
        """It has not had these after all."""
        for digest in digests:
            if holders := self._holders.get(digest):
                holders.discard(name)

    def forget(self, name: str) -> None:
        """It has failed, and its cache with it."""
        for holders in self._holders.values():
            holders.discard(name)


def digests(ids: bytes, tenant: str) -> Iterator[bytes]:
    """Hashes of a prompt's prefixes, as instances tell them.

    The last token is left out: it is always computed.

    Args:
        ids: little-endian int32.
    """
    tokens: Any = np.frombuffer(ids, "<i4")
    return (digest[:SHORT_BYTES] for digest in chain(tokens, tenant, len(tokens) - 1))
