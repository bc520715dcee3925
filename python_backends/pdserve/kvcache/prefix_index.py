"""An index of KV caches by their prefixes, so that a shared one is computed or moved once."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

BLOCK_TOKENS = 32
DIGEST_BYTES = 32
SHORT_BYTES = 8
T = TypeVar("T")


def chain(
    tokens: NDArray[np.int32], salt: str, limit: int, block_tokens: int = BLOCK_TOKENS
) -> Iterator[bytes]:
    """Yield the digests of the whole blocks within the first `limit` tokens.

    A block's digest covers all tokens before it and the salt, so that equal digests mean equal
    prefixes. They are equal in every process, so that a prefill's reports can be looked up
    elsewhere.
    """
    data = np.asarray(tokens, "<i4").tobytes()
    step = block_tokens * 4
    digest = blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()
    for end in range(step, limit * 4 + 1, step):
        state = blake2b(digest, digest_size=DIGEST_BYTES)
        state.update(data[end - step : end])
        digest = state.digest()
        yield digest


def shorten(digests: Iterable[bytes]) -> bytes:
    """Return the first SHORT_BYTES of each, joined: enough for a guess that is checked on use."""
    return b"".join(digest[:SHORT_BYTES] for digest in digests)


class PrefixIndex(Generic[T]):
    """KV caches (ranges, block tables: T, by identity) by the digests of their blocks (`chain`).

    Prompts of two salts never share. Pass `remove` to the arena or pool as `on_free`, so
    that a freed or evicted KV cache is never found.
    """

    def __init__(self, block_tokens: int = BLOCK_TOKENS) -> None:
        self.block_tokens = block_tokens
        # The inner dicts are ordered sets: several items may hold the same prefix.
        self._holding: dict[bytes, dict[T, None]] = {}
        self._digests: dict[T, list[bytes]] = {}

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, held: T, tokens: NDArray[np.int32], salt: str) -> list[bytes]:
        """Add the holder of the K and V of `tokens` int32 [n]; return the digests of its blocks.

        If the holder was added before, `tokens` replace its former ones.
        """
        self.remove(held)
        digests = self._digests[held] = list(chain(tokens, salt, len(tokens), self.block_tokens))
        for digest in digests:
            self._holding.setdefault(digest, {})[held] = None
        return digests

    def find(self, tokens: NDArray[np.int32], salt: str) -> tuple[T, int] | None:
        """Return the holder of the longest prefix of `tokens` int32 [n], and that prefix's length.

        The length is a multiple of `block_tokens` and at most n - 1: the last token is always
        computed, since its logits are needed. Pin the holder before anything else is allocated.
        """
        best = None
        digests = chain(tokens, salt, len(tokens) - 1, self.block_tokens)
        for count, digest in enumerate(digests, start=1):
            if digest not in self._holding:
                break
            best = next(reversed(self._holding[digest])), count * self.block_tokens
        return best

    def remove(self, held: T) -> None:
        """Remove a holder; it is no error if it was never added."""
        for digest in self._digests.pop(held, ()):
            del self._holding[digest][held]
            if not self._holding[digest]:
                del self._holding[digest]
