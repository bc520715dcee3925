"""An instance as the scheduler sees it: a name, a channel, and the calls that are open on it."""

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
    Reassigned,
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
        """True if the instance holds nothing for this call any more."""
        self._computed = False
        self._closed = False

    async def reply(self, timeout: float, until: float) -> Reply:
        """Wait for the next reply and return it.

        Args:
            timeout: seconds of silence after which the instance counts as failed.
            until: the request's own time limit (``loop.time()``), which is no failure of the
                instance.

        Raises:
            InstanceError: the instance failed, or was silent for ``timeout`` seconds.
            Drained: it serves nothing under this assignment any more.
            Suspected: the instance has ended, and the request is not retried.
            Late: ``until`` has passed.
        """
        left = until - asyncio.get_running_loop().time()
        if left <= 0:  # even if a reply has arrived meanwhile
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
        self.done = isinstance(reply, Busy | Failed | NotConnected | Reassigned) or (
            isinstance(reply, Tokens) and bool(reply.finish_reason)
        )
        self._instance.heard(reply)
        return reply

    def blame(self) -> None:
        """Note that the instance has failed at this call, and may fail at the next."""
        self._instance.failed()

    def computed(self) -> None:
        """Note that the instance has computed the result and only holds it now."""
        self._computed = True
        self._instance.load.add(0, 1)

    def transferred(self, tell: bool) -> None:
        """Note that a decode has the result, and close the call.

        With ``tell``, inform the instance.
        """
        self.done = True
        if tell:
            self._instance.tell(Transferred(self._id))
        self.close()

    def close(self) -> None:
        """End the call, and tell the instance to release it unless it has.

        A second call does nothing.
        """
        if not self._closed:
            self._closed = True
            self.stay.over()
            self._instance.close_call(self._id, -self._computed, release=not self.done)


class Instance:
    """A prefill or a decode of this gateway's deployment."""

    def __init__(self, name: str, channel: Channel) -> None:
        self.name = name
        self.listeners: list[Callable[[Instance], None]] = []
        """Called when its load, its room, its circuit breaker or its time for suspects has
        changed."""
        self.load = Load(self._changed)
        self.suspect: Request | None = None
        """The request that is a suspect, has been offered here and has made no progress yet, if
        any."""
        self.suspects_from = 0.0
        """Time (``loop.time()``) from which a suspect may be offered again, if another gateway's
        was here."""
        self.breaker = CircuitBreaker(self._changed)
        self.room = Room(self._changed)
        """Free slots and KV blocks, if this is a decode."""
        self.left = False
        """True if it serves nothing under its assignment any more, as far as it has told."""
        self.reassigned: Callable[[Reassigned], None] = lambda _: None
        """Called when it has told that."""
        self._channel = channel
        self._ids = f"{uuid.uuid4().hex}-{name}"
        self._asked = itertools.count()

    def _changed(self) -> None:
        for listener in self.listeners:
            listener(self)

    def leave_alone(self, until: float) -> None:
        """Offer it no suspect before ``until`` (``loop.time()``)."""
        self.suspects_from = until
        self._changed()

    def back(self) -> None:
        """Note that it serves again under its assignment."""
        self.left = False
        self._changed()

    def heard(self, reply: Reply) -> None:
        """Note what a reply says of the instance itself.

        Raises:
            Drained: it serves nothing under this assignment any more.
        """
        if isinstance(reply, Reassigned):
            self.left = True
            self._changed()
            self.reassigned(reply)
            raise errors.Drained(
                f"{self.name} is {reply.phase.value} with assignment {reply.assignment.number}"
            )
        if (
            isinstance(reply, Busy | Freed | Accepted | Tokens | Connected)
            and reply.room is not None
        ):
            self.room.tell(reply.room, asyncio.get_running_loop().time())

    def failed(self) -> None:
        self.room.forget()
        self.breaker.failed(asyncio.get_running_loop().time())

    def new_id(self) -> str:
        """Return an id, unique over all gateways, for a message to it that is not a call."""
        return f"{self._ids}-{next(self._asked)}"

    async def ask(self, request: Message, timeout: float) -> Reply:
        """Send a message for which the instance holds nothing, and return the reply.

        Raises:
            InstanceError: no reply came within ``timeout`` seconds.
            Drained: see ``heard``.
        """
        replies = self._channel.open(request.id, request)
        try:
            reply = await replies.get(timeout)
        finally:
            self._channel.forget(request.id)
        self.heard(reply)
        return reply

    async def watch(self, gateway: str, timeout: float) -> bool:
        """Wait until something has become free there.

        False: nothing has within ``timeout`` seconds.

        A gateway that watches again keeps its place among the watching gateways.

        Raises:
            InstanceError: the instance cannot be reached any more.
            Drained: see ``heard``.
        """
        watch = Watch(self.new_id(), gateway, self.room.told)
        replies = self._channel.open(watch.id, watch)
        try:
            reply = await replies.get(timeout)
            self.heard(reply)
            freed = isinstance(reply, Freed)
            if not freed:  # its list of watching gateways is full: treated like silence
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
        """Send it a message that opens a call; ``stay`` belongs to the request that is served."""
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
        """Send a message whose reply is not awaited.

        If it is lost, a prefill's lease expires, and a decode's request runs to its end.
        """
        call = f"{message.id}-over"
        self._channel.open(call, message)
        self._channel.forget(call)

    def lose(self, epoch: bytes) -> None:
        """Note that a process of the instance is gone; see ``Channel.lose``."""
        self._channel.lose(epoch)

    async def close(self) -> None:
        await self._channel.close()
