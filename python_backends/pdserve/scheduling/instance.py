"""An instance as the scheduler sees it: a name, a channel, and what is open on it."""

from __future__ import annotations

import itertools

from pdserve import messages
from pdserve.channels.protocol import Channel, Replies
from pdserve.messages import Reply, Request


class Call:
    """One call to an instance, open until ``close``."""

    def __init__(self, instance: Instance, id: str, replies: Replies) -> None:
        self._instance = instance
        self._id = id
        self._replies = replies
        self.done = False
        """The instance holds nothing for this call any more."""
        self._closed = False

    async def reply(self, timeout: float) -> Reply:
        """The next reply.

        Raises:
            InstanceError: the instance failed, or said nothing for ``timeout`` seconds.
        """
        return messages.decode_reply(await self._replies.get(timeout))

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
        """After a failure it is asked last for a while (``loop.time()`` seconds)."""
        self._channel = channel
        self._releases = itertools.count()

    def rank(self, now: float) -> tuple[bool, int]:
        """Where it stands among the candidates; the least goes first."""
        return (now < self.suspect_until, self.open)

    def call(self, request: Request) -> Call:
        self.open += 1
        return Call(self, request.id, self._channel.open(request.id, messages.encode(request)))

    def close_call(self, id: str, release: bool) -> None:
        self.open -= 1
        self._channel.forget(id)
        if release:
            # Nobody waits for the answer: if this message is lost, the lease ends it.
            call = f"{id}/release{next(self._releases)}"
            self._channel.open(call, messages.encode(messages.Release(id)))
            self._channel.forget(call)

    async def close(self) -> None:
        await self._channel.close()
