"""The interface of engines: the calls that every kind of engine implements.

Only one call of ``prefill`` or ``step`` is made at a time, even of an engine that has both;
``joined`` blocks, and may run in another thread at the same time as either.
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
    """A prompt whose KV cache is to be computed."""

    tokens: Tokens
    kv: Array
    """Memory of the KV cache, [planes, tokens, row_bytes]; K and V of a layer alternate."""
    sampling: Sampling
    filled: Callable[[int], None] = lambda _: None
    """Called with the number of complete planes, whenever it grows."""
    resumed_tokens: int = 0
    """Number of the last tokens that are output already; see ``PrefillRequest``."""
    cached: int = 0
    """Number of rows that another range holds already: less than the number of tokens, since at
    least one is computed, for its logits."""
    prefix: KVRange | None = None
    """The range with the cached rows."""

    def copy_prefix(self) -> None:
        """Copy the cached rows."""
        if self.prefix is not None:
            self.prefix.read(self.cached, self.kv)


@dataclass(slots=True, eq=False)
class DecodeSequence:
    """A sequence that is being decoded.

    Between two steps the pool holds the K and V of ``prompt`` and ``tokens[:-1]``; a step computes
    those of the last token, and the next token, which the instance appends. Token ``i`` of the
    sequence is in row ``i`` of the concatenated ``runs``.
    """

    prompt: Tokens
    tokens: list[int]
    """The output so far, the prefill's first token included."""
    runs: list[tuple[int, int]]
    """Runs of (first row in the pool, rows); together at least prompt + tokens - 1 rows at any
    step."""
    sampling: Sampling
    cached: int = 0
    """Number of prompt tokens that the pool had cached; less than the number of its tokens."""
    resumed_tokens: int = 0
    """Number of the prompt's last tokens that are output already; see ``PrefillRequest``."""
    state: Any = field(default=None, repr=False)
    """The engine's own state, from ``joined`` on."""

    @property
    def length(self) -> int:
        """Return the number of tokens of prompt and output."""
        return len(self.prompt) + len(self.tokens)

    def row(self, token: int) -> int:
        """Return the row of the pool with a token of the sequence."""
        for first, rows in self.runs:
            if token < rows:
                return first + token
            token -= rows
        raise IndexError("the sequence's runs are not so long")

    def rows(self, tokens: int) -> list[tuple[int, int]]:
        """Return the runs, cut to the first ``tokens`` tokens."""
        cut = []
        for first, rows in self.runs:
            if tokens <= 0:
                break
            cut.append((first, min(rows, tokens)))
            tokens -= rows
        return cut


class EngineModel(Protocol):
    """Properties of the model that an engine computes."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def fingerprint(self) -> str:
        """Return a text that differs where KV caches cannot be exchanged."""

    @property
    def context_length(self) -> int:
        """Return the maximum tokens of prompt and output together."""

    @property
    def vocabulary(self) -> int:
        """Return the number of token ids."""

    @property
    def eos_ids(self) -> frozenset[int]: ...


class PrefillEngine(Protocol):
    """An engine that computes the KV caches and first tokens of prompts."""

    async def prefill(self, jobs: Sequence[PrefillJob]) -> list[int]:
        """Fill every job's range, the cached rows included; return the first token of each."""

    def close(self) -> None: ...


class DecodeEngine(Protocol):
    """An engine that generates tokens from KV caches."""

    @property
    def pool(self) -> Array:
        """Return the memory in which KV caches arrive, [planes, rows, row_bytes].

        Other threads write to it.
        """

    def joined(self, sequence: DecodeSequence) -> None:
        """Note that the K and V of the sequence's prompt are in the pool."""

    async def prefill(self, sequence: DecodeSequence, begin: int, end: int) -> int | None:
        """Compute the K and V of a part of the prompt.

        Return the first token if it is the last part.

        Args:
            begin: number of its tokens whose K and V are in the sequence's rows.
            end: number of them afterwards. For a reproducible sequence, all of its tokens: its
                output may not depend on how the prompt was split.
        """

    async def step(self, batch: Sequence[DecodeSequence]) -> list[int]:
        """Return the next token of each sequence."""

    def close(self) -> None: ...
