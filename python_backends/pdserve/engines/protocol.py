"""What an engine computes: the calls that every kind of engine answers.

One call of ``prefill`` or ``step`` is made at a time, of an engine that has both, too; ``joined``
blocks, and may run in another thread at the same time as either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pdserve.kvcache.layout import KVLayout
from pdserve.sampling import Sampling
from pdserve.transfer.arrays import Array
from pdserve.transfer.producer.kv_range import KVRange

Tokens = NDArray[np.int32]
"""Token ids: int32 [n]."""


@dataclass(slots=True, eq=False)
class PrefillJob:
    """A prompt whose KV cache is to be filled in."""

    tokens: Tokens
    kv: Array
    """[planes, tokens, row_bytes]; K and V of a layer alternate."""
    sampling: Sampling
    filled: Callable[[int], None] = lambda _: None
    """To be called with the number of planes that are complete, as they become so."""
    resumed_tokens: int = 0
    """Of the last tokens, how many are output already; see ``PrefillRequest``."""
    cached: int = 0
    """Rows that another range holds already: less than the number of tokens, since at least
    one is computed, for its logits."""
    prefix: KVRange | None = None
    """That range."""

    def copy_prefix(self) -> None:
        """Fill in the cached rows."""
        if self.prefix is not None:
            self.prefix.read(self.cached, self.kv)


@dataclass(slots=True, eq=False)
class DecodeSequence:
    """A sequence that is being decoded.

    Between two steps the pool holds the K and V of ``prompt`` and ``tokens[:-1]``;
    a step computes those of the last token, and the token after it, which the
    instance appends. Token ``i`` of the sequence lies in row ``i`` of the ``runs``
    laid end to end.
    """

    prompt: Tokens
    tokens: list[int]
    """The output so far, the prefill's first token included."""
    runs: list[tuple[int, int]]
    """(first row in the pool, rows); together at least prompt + tokens - 1 at any step."""
    sampling: Sampling
    cached: int = 0
    """Tokens of the prompt that the pool held before it came; at least one less than it has."""
    resumed_tokens: int = 0
    """Of the prompt's last tokens, how many are output already; see ``PrefillRequest``."""
    state: Any = field(default=None, repr=False)
    """The engine's own, from ``joined`` on."""

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt) + len(self.tokens)

    def row(self, token: int) -> int:
        """Where a token of the sequence lies in the pool."""
        for first, rows in self.runs:
            if token < rows:
                return first + token
            token -= rows
        raise IndexError("the sequence's runs are not so long")

    def rows(self, tokens: int) -> list[tuple[int, int]]:
        """The runs cut to the first ``tokens`` tokens."""
        cut = []
        for first, rows in self.runs:
            if tokens <= 0:
                break
            cut.append((first, min(rows, tokens)))
            tokens -= rows
        return cut


class EngineModel(Protocol):
    """What is known of the model that an engine computes."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def fingerprint(self) -> str:
        """Differs where KV caches cannot be exchanged."""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and output together, at most."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""

    @property
    def eos_ids(self) -> frozenset[int]: ...


class PrefillEngine(Protocol):
    """Prompts in, KV caches and first tokens out."""

    async def prefill(self, jobs: Sequence[PrefillJob]) -> list[int]:
        """Fill in every job's range, the cached rows included; the first token of each."""

    def close(self) -> None: ...


class DecodeEngine(Protocol):
    """KV caches in, tokens out."""

    @property
    def pool(self) -> Array:
        """Where KV caches arrive, [planes, rows, row_bytes]; written to in other threads."""

    def joined(self, sequence: DecodeSequence) -> None:
        """The K and V of the sequence's prompt are in the pool."""

    async def prefill(self, sequence: DecodeSequence, begin: int, end: int) -> int | None:
        """Compute the K and V of a part of the prompt; the first token, if it is the last part.

        Args:
            begin: the K and V of so many of its tokens are in the sequence's rows.
            end: how many are there afterwards. Of a reproducible sequence, all: what its
                tokens are may not depend on how the prompt was cut.
        """

    async def step(self, batch: Sequence[DecodeSequence]) -> list[int]:
        """The next token of each sequence."""

    def close(self) -> None: ...
