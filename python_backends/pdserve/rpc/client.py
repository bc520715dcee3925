"""A channel to one instance: it carries requests, and any number of replies to each."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from pdserve.errors import InstanceEnded, InstanceError
from pdserve.rpc import messages
from pdserve.rpc.messages import Reply, Request


class NoAnswer(InstanceError):
    """No reply came within the time of the wait. (A timer may fire early: the clock does not
    tell.)"""


class Replies:
    """The replies to one request, in order, for one reader.

    Every wait is bounded; a failure of the channel is raised after the replies that came before it
    have been read.
    """

    __slots__ = ("_error", "_items", "_waiter", "carrier", "epoch")

    def __init__(self, carrier: str = "") -> None:
        self.carrier = carrier
        """The call whose responses carry these replies; see ``pdserve.rpc.server``."""
        self.epoch = b""
        """Epoch of the process that sent the latest of them."""
        self._items: deque[Reply] = deque()
        self._error: InstanceError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, reply: Reply) -> None:
        self._items.append(reply)
        self._wake()

    def fail(self, error: InstanceError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self, timeout: float) -> Reply:
        """Return the next reply.

        Raises:
            InstanceError: the channel broke.
            NoAnswer: nothing came within ``timeout`` seconds.
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
        raise self._error or NoAnswer(f"no answer within {timeout:g} s")


class Calls:
    """The open calls of one channel, by id."""

    def __init__(self) -> None:
        self._replies: dict[str, Replies] = {}
        self._epoch = self._over = b""
        """Epoch of the instance's process that replied last, and of the process before it."""

    def __len__(self) -> int:
        return len(self._replies)

    def open(self, call: str) -> Replies:
        replies = self._replies[call] = Replies(call)
        return replies

    def forget(self, call: str) -> None:
        self._replies.pop(call, None)

    def deliver(self, carrier: str, data: bytes) -> None:
        """Hand out the replies in a response to the call ``carrier``; they may belong to any calls.

        Raises:
            InstanceError: the response is malformed.
        """
        batch = messages.decode_replies(data)
        if batch.epoch and batch.epoch != self._epoch:
            if batch.epoch == self._over:
                return  # it was on its way when its sender was found dead
            self._succeeded(batch.epoch)
        for call, reply in batch.replies:
            if replies := self._replies.get(call):
                replies.carrier = carrier
                replies.epoch = batch.epoch
                replies.put(reply)

    def lost(self, epoch: bytes) -> bool:
        """Note that a process of the instance is gone.

        Tell whether it is the one that replied last.

        If it is any other process, nothing changes.
        """
        if not epoch or epoch != self._epoch:
            return False
        self._over, self._epoch = self._epoch, b""
        return True

    def _succeeded(self, epoch: bytes) -> None:
        """Note that another process replies: the former one is gone, and its open calls with it."""
        former, self._epoch = self._epoch, epoch
        if former:
            self._over = former
            for call in [call for call, one in self._replies.items() if one.epoch == former]:
                self._replies.pop(call).fail(InstanceEnded("its process is gone"))

    def fail(self, carrier: str, error: InstanceError) -> None:
        """Fail the calls whose replies ``carrier`` brought: it gets no further response."""
        for call in [call for call, one in self._replies.items() if one.carrier == carrier]:
            self._replies.pop(call).fail(error)

    def fail_all(self, error: InstanceError) -> None:
        while self._replies:
            self._replies.popitem()[1].fail(error)


class Channel(Protocol):
    """A channel to one instance."""

    def open(self, call: str, request: Request) -> Replies:
        """Send one request; ``call`` is unique among the open calls of this channel."""

    def forget(self, call: str) -> None:
        """Drop a call: no further reply to it is wanted."""

    def lose(self, epoch: bytes) -> None:
        """Note that a process of the instance is gone.

        If it is the one that replied last, every open call fails, and the next call reaches its
        successor; if it is any other, nothing changes.
        """

    async def close(self) -> None:
        """Give up every open call and the connection."""
