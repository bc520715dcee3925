"""A queue from an engine's thread to a reader."""

from __future__ import annotations

import asyncio
import queue
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """A queue that is read by a thread, or in the loop that it was made in."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        with suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()
            self._filled = asyncio.Event()

    def put(self, item: T) -> None:
        self._queue.put(item)
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed, so it has no reader any more
                self._loop.call_soon_threadsafe(self._filled.set)

    def get(self, timeout: float | None = None) -> T:
        """Raises: queue.Empty."""
        return self._queue.get(timeout=timeout)

    async def aget(self) -> T:
        assert self._loop is not None, "made without a running event loop: it cannot be awaited"
        while self._queue.empty():
            self._filled.clear()
            await self._filled.wait()
        return self._queue.get_nowait()
