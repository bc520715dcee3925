"""An instance as the scheduler sees it: a name, a channel, and what is open on it."""

from __future__ import annotations

import asyncio
import itertools
import uuid

from pdserve import errors
from pdserve.channels.protocol import Channel, Replies
from pdserve.messages import Busy, Failed, Release, Reply, Request, Stranger, Tokens

# An instance that has failed is left alone for so long, unless all have.
SUSPECT_S = 5.0


class Call:
    """One call to an instance, open until ``close``."""

    def __init__(self, instance: Instance, call_id: str, replies: Replies) -> None:
        self._instance = instance
        self._id = call_id
        self._replies = replies
        self.done = False
        """The instance holds nothing for this call any more."""
        self._closed = False

    async def reply(self, timeout: float) -> Reply:
        """The next reply.

        Raises:
            InstanceError: the instance failed, or said nothing for ``timeout`` seconds.
        """
        try:
            reply = await self._replies.get(timeout)
        except errors.InstanceError as error:
            self.suspect()
            raise errors.InstanceError(f"{self._instance.name}: {error}") from error
        self.done = isinstance(reply, Busy | Failed | Stranger) or (
            isinstance(reply, Tokens) and bool(reply.finish_reason)
        )
        return reply

    def suspect(self) -> None:
        """The instance has failed at this call, and may fail at the next."""
        self._instance.suspect_until = asyncio.get_running_loop().time() + SUSPECT_S

    def close(self) -> None:
        """End the call, telling the instance to let go unless it has already; once is enough."""
        if not self._closed:
            self._closed = True
            self._instance.close_call(self._id, release=not self.done)


class Instance:
    """A prefill or a decode of this gateway's deployment."""

    def __init__(self, name: str, channel: Channel) -> None:
        self.name = name
        self.open = 0
        """Calls of this gateway that hold, or wait for, something there."""
        self.suspect_until = 0.0
        """It has failed, and is not asked before (``loop.time()`` seconds) unless all have."""
        self._channel = channel
        self._ids = f"{uuid.uuid4().hex}-{name}"
        self._asked = itertools.count()

    def new_id(self) -> str:
        """For a request to it that is not a call, unique over all gateways."""
        return f"{self._ids}-{next(self._asked)}"

    async def ask(self, request: Request, timeout: float) -> Reply:
        """One question that holds nothing there.

        Raises:
            InstanceError: no answer within ``timeout`` seconds.
        """
        replies = self._channel.open(request.id, request)
        try:
            return await replies.get(timeout)
        finally:
            self._channel.forget(request.id)

    def call(self, request: Request) -> Call:
        self.open += 1
        return Call(self, request.id, self._channel.open(request.id, request))

    def close_call(self, call_id: str, release: bool) -> None:
        self.open -= 1
        self._channel.forget(call_id)
        if release:
            # Nobody waits for the answer. If this message is lost, a prefill's lease ends
            # it, and a decode's request runs to its end.
            call = f"{call_id}-release"
            self._channel.open(call, Release(call_id))
            self._channel.forget(call)

    async def close(self) -> None:
        await self._channel.close()
