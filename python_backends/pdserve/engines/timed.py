"""Engines that know since when their present call has lasted: one that hangs never ends it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pdserve.engines.protocol import DecodeEngine, DecodeSequence, PrefillEngine, PrefillJob
from pdserve.transfer.arrays import Array


class Timed:
    """The time of an engine's present call. An engine has one call at a time."""

    _began: float | None = None

    @property
    def lasted_s(self) -> float:
        """Return for how long the present call has lasted, in seconds; 0: there is none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    @contextmanager
    def _calling(self) -> Iterator[None]:
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None


class TimedPrefill(Timed):
    """A prefill engine; see ``PrefillEngine``."""

    def __init__(self, engine: PrefillEngine) -> None:
        self._engine = engine

    async def prefill(self, jobs: Sequence[PrefillJob]) -> list[int]:
        """Fill every job's range; return the first token of each."""
        with self._calling():
            return await self._engine.prefill(jobs)

    def close(self) -> None:
        self._engine.close()


class TimedDecode(Timed):
    """A decode engine; see ``DecodeEngine``."""

    def __init__(self, engine: DecodeEngine) -> None:
        self._engine = engine

    @property
    def pool(self) -> Array:
        """Return the memory in which KV caches arrive, [planes, rows, row_bytes]."""
        return self._engine.pool

    def joined(self, sequence: DecodeSequence) -> None:
        """Note that the K and V of the sequence's prompt are in the pool."""
        self._engine.joined(sequence)

    async def prefill(self, sequence: DecodeSequence, begin: int, end: int) -> int | None:
        """Compute a part of the prompt; return the first token if it is the last part."""
        with self._calling():
            return await self._engine.prefill(sequence, begin, end)

    async def step(self, batch: Sequence[DecodeSequence]) -> list[int]:
        """Return the next token of each sequence."""
        with self._calling():
            return await self._engine.step(batch)

    def close(self) -> None:
        self._engine.close()
