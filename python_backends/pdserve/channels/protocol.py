"""A channel to one instance: requests go in, any number of replies come back for each."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from pdserve.errors import InstanceError


class Replies:
    """The replies to one request, in order, for one reader.

    Every wait is bounded; a failure of the channel is raised once the replies
    that came before it have been read.
    """

    __slots__ = ("_error", "_items", "_waiter")

    def __init__(self) -> None:
        self._items: deque[bytes] = deque()
        self._error: InstanceError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, reply: bytes) -> None:
        self._items.append(reply)
        self._wake()

    def fail(self, error: InstanceError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self, timeout: float) -> bytes:
        """The next reply.

        Raises:
            InstanceError: the channel broke, or nothing came within ``timeout`` seconds.
        """
        if not self._items and self._error is None:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        if self._items:
            return self._items.popleft()
        raise self._error or InstanceError(f"no answer within {timeout:g} s")


class Channel(Protocol):
    """Reaches one instance."""

    def open(self, call: str, payload: bytes) -> Replies:
        """Send one request; ``call`` is unique among the open calls of this channel."""

    def forget(self, call: str) -> None:
        """No further reply to this call is wanted."""

    async def close(self) -> None:
        """Give up every open call and the connection."""
