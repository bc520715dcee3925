"""Which filled range starts with the same tokens, so that a shared prefix is computed once."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pdserve.kvcache.arena import Range

DIGEST_BYTES = 32


class PrefixIndex:
    """Ranges by the chained hashes of their blocks of `block_tokens` token ids.

    A block's hash covers all tokens before it and the salt, so that equal hashes mean equal
    prefixes, and prompts of two salts (tenants) never share. Give `remove` to the arena as
    `on_free`: a range that is freed or evicted is then never found.
    """

    def __init__(self, block_tokens: int = 32) -> None:
        self.block_tokens = block_tokens
        # The inner dicts are ordered sets: several ranges may hold the same prefix.
        self._ranges: dict[bytes, dict[Range, None]] = {}
        self._digests: dict[Range, list[bytes]] = {}

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, held: Range, tokens: NDArray[np.int32], salt: str) -> None:
        """Make a filled range of `tokens` int32 [n] findable.

        Raises:
            ValueError: the range is not filled, or has been added before.
        """
        if not held.filled or held in self._digests:
            what = "already in the index" if held.filled else held.state.value
            raise ValueError(f"range at {held.offset} is {what}; only a filled one is added, once")
        self._digests[held] = list(self._chain(tokens, salt, len(tokens)))
        for digest in self._digests[held]:
            self._ranges.setdefault(digest, {})[held] = None

    def find(self, tokens: NDArray[np.int32], salt: str) -> tuple[Range, int] | None:
        """The range with the longest prefix of `tokens` int32 [n], and that prefix's length.

        The length is a multiple of `block_tokens` and at most n - 1: the last token is always
        computed, since its logits are wanted. Pin the range before anything else is allocated.
        """
        best = None
        chain = self._chain(tokens, salt, len(tokens) - 1)
        for count, digest in enumerate(chain, start=1):
            if digest not in self._ranges:
                break
            best = next(reversed(self._ranges[digest])), count * self.block_tokens
        return best

    def remove(self, held: Range) -> None:
        """Forget a range; one that was never added is no error."""
        for digest in self._digests.pop(held, ()):
            del self._ranges[digest][held]
            if not self._ranges[digest]:
                del self._ranges[digest]

    def _chain(self, tokens: NDArray[np.int32], salt: str, limit: int) -> Iterator[bytes]:
        """Digests of the whole blocks within the first `limit` tokens."""
        data = np.asarray(tokens, "<i4").tobytes()
        step = self.block_tokens * 4
        digest = blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()
        for end in range(step, limit * 4 + 1, step):
            state = blake2b(digest, digest_size=DIGEST_BYTES)
            state.update(data[end - step : end])
            digest = state.digest()
            yield digest
