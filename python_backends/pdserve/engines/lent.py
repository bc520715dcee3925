"""An external engine that outlives the instances that use it, one after another."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from pdserve.engines.external import Asked, Context, ExternalEngine, Piece, Report


class Lent:
    """Implements ``ExternalEngine`` by an engine that is not closed with an instance."""

    def __init__(self, engine: ExternalEngine) -> None:
        self._engine = engine

    @property
    def fingerprint(self) -> str:
        return self._engine.fingerprint

    @property
    def context_length(self) -> int:
        return self._engine.context_length

    @property
    def vocabulary(self) -> int:
        return self._engine.vocabulary

    @property
    def keeps_s(self) -> float:
        return self._engine.keeps_s

    async def context(self, asked: Asked, keep: bool) -> Context:
        return await self._engine.context(asked, keep)

    def generate(self, asked: Asked, first: int | None, link: bytes) -> AsyncGenerator[Piece, None]:
        return self._engine.generate(asked, first, link)

    async def report(self) -> Report:
        return await self._engine.report()

    async def close(self) -> None:
        """Do nothing: its owner ends it."""

    async def end(self) -> None:
        """End the engine, and wait until it has ended."""
        await self._engine.close()
