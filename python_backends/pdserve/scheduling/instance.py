"""An instance as the scheduler sees it: a name, a channel, and what is open on it."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from pdserve import errors
from pdserve.rpc.client import Channel, NoAnswer, Replies
from pdserve.rpc.messages import (
    Accepted,
    Busy,
    Connected,
    Failed,
    Freed,
    NotConnected,
    Prefilled,
    Release,
    Reply,
    Tokens,
    Transferred,
    Watch,
)
from pdserve.rpc.messages import Request as Message
from pdserve.scheduling.circuit_breaker import CircuitBreaker
from pdserve.scheduling.load import Load
from pdserve.scheduling.room import Room

if TYPE_CHECKING:
    from pdserve.scheduling.request import Request
    from pdserve.scheduling.suspicion import Stay


class Call:
    """One call to an instance, open until ``close``."""

    def __init__(self, instance: Instance, call_id: str, replies: Replies, stay: Stay) -> None:
        self._instance = instance
        self.stay = stay
        self._id = call_id
        self._replies = replies
        self.done = False
        """The instance holds nothing for this call any more."""
        self._computed = False
        self._closed = False

    async def reply(self, timeout: float, until: float) -> Reply:
        """The next reply.

        Args:
            timeout: seconds after which an instance that says nothing has failed.
            until: the request's own limit (``loop.time()``), which is no failure of the instance.

        Raises:
            InstanceError: the instance failed, or said nothing for ``timeout`` seconds.
            Suspected: it has ended, and the request is not tried again.
            Late: ``until`` has come.
        """
        left = until - asyncio.get_running_loop().time()
        if left <= 0:  # whatever has come meanwhile
            raise errors.Late("the request's own time limit has passed")
        try:
            reply = await self._replies.get(min(timeout, left))
        except errors.InstanceError as error:
            if left < timeout and isinstance(error, NoAnswer):
                raise errors.Late("the request's own time limit has passed") from error
            self.blame()
            if isinstance(error, errors.InstanceEnded):
                self.stay.ended()
            raise errors.InstanceError(f"{self._instance.name}: {error}") from error
        if isinstance(reply, Prefilled | Tokens):
            self.stay.progress()
        self.stay.answered = True
        self._instance.heard(reply)
        self.done = isinstance(reply, Busy | Failed | NotConnected) or (
            isinstance(reply, Tokens) and bool(reply.finish_reason)
        )
        return reply

    def blame(self) -> None:
        """The instance has failed at this call, and may fail at the next."""
        self._instance.failed()

    def computed(self) -> None:
        """The instance has computed what it was to; it only holds the result."""
        self._computed = True
        self._instance.load.add(0, 1)

    def transferred(self, tell: bool) -> None:
        """A decode has the result: the instance has let go of it, or does when it is told."""
        self.done = True
        if tell:
            self._instance.tell(Transferred(self._id))
        self.close()

    def close(self) -> None:
        """End the call, telling the instance to let go unless it has already; once is enough."""
        if not self._closed:
            self._closed = True
            self.stay.over()
            self._instance.close_call(self._id, -self._computed, release=not self.done)


class Instance:
    """A prefill or a decode of this gateway's deployment."""

    def __init__(self, name: str, channel: Channel) -> None:
        self.name = name
        self.listeners: list[Callable[[Instance], None]] = []
        """Called when its load, its room or its circuit breaker has changed, or who may come."""
        self.load = Load(self._changed)
        self.suspect: Request | None = None
        """The one request there, of those that have made no progress there, that may end it."""
        self.suspects_from = 0.0
        """When one may be offered again (``loop.time()``), where another gateway's was there."""
        self.breaker = CircuitBreaker(self._changed)
        self.room = Room(self._changed)
        """Of a decode."""
        self._channel = channel
        self._ids = f"{uuid.uuid4().hex}-{name}"
        self._asked = itertools.count()

    def _changed(self) -> None:
        for listener in self.listeners:
            listener(self)

    def leave_alone(self, until: float) -> None:
        """It takes no suspect before ``until`` (``loop.time()``)."""
        self.suspects_from = until
        self._changed()

    def heard(self, reply: Reply) -> None:
        """Take in what a reply says of the instance itself."""
        if (
            isinstance(reply, Busy | Freed | Accepted | Tokens | Connected)
            and reply.room is not None
        ):
            self.room.tell(reply.room, asyncio.get_running_loop().time())

    def failed(self) -> None:
        self.room.forget()
        self.breaker.failed(asyncio.get_running_loop().time())

    def new_id(self) -> str:
        """For a request to it that is not a call, unique over all gateways."""
        return f"{self._ids}-{next(self._asked)}"

    async def ask(self, request: Message, timeout: float) -> Reply:
        """One question that holds nothing there.

        Raises:
            InstanceError: no answer within ``timeout`` seconds.
        """
        replies = self._channel.open(request.id, request)
        try:
            return await replies.get(timeout)
        finally:
            self._channel.forget(request.id)

    async def watch(self, gateway: str, timeout: float) -> bool:
        """Whether something has become free there within ``timeout`` seconds.

        Asked again, the gateway keeps its place among those who watch.

        Raises:
            InstanceError: it cannot be reached any more.
        """
        watch = Watch(self.new_id(), gateway, self.room.told)
        replies = self._channel.open(watch.id, watch)
        try:
            reply = await replies.get(timeout)
            self.heard(reply)
            freed = isinstance(reply, Freed)
            if not freed:  # so many wait there that it has no place: as if it said nothing
                await asyncio.sleep(timeout)
            return freed
        except NoAnswer:
            return False
        except asyncio.CancelledError:
            self._release(watch.id)
            raise
        finally:
            self._channel.forget(watch.id)

    def call(self, message: Message, stay: Stay) -> Call:
        """Send a request to it; ``stay`` is of who is served by that."""
        self.load.add(1)
        return Call(self, message.id, self._channel.open(message.id, message), stay)

    def close_call(self, call_id: str, computed: int, release: bool) -> None:
        self.load.add(-1, computed)
        self._channel.forget(call_id)
        if release:
            self._release(call_id)

    def _release(self, call_id: str) -> None:
        self.tell(Release(call_id))

    def tell(self, message: Release | Transferred) -> None:
        """Nobody waits for the answer.

        If it is lost, a prefill's lease ends it, and a decode's request runs to its end.
        """
        call = f"{message.id}-over"
        self._channel.open(call, message)
        self._channel.forget(call)

    def lose(self, epoch: bytes) -> None:
        """A process of it is gone; see ``Channel.lose``."""
        self._channel.lose(epoch)

    async def close(self) -> None:
        await self._channel.close()
