"""The room of a decode: which requests are accepted, what is open, and who waits for room.

A request is *open* from its acceptance to its last reply. The replies of an open request carry the
room that is left, and each that frees some of it wakes the gateways that wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec
import numpy as np

from pdserve import config, errors
from pdserve.instances.acceptance import AFTER_S
from pdserve.instances.accepted_call import AcceptedCall
from pdserve.instances.protocol import Send
from pdserve.instances.slot_watches import WATCHED_S, RoomWatches
from pdserve.instances.slots import TimeIntegral
from pdserve.rpc.messages import (
    SUSPECT,
    Accepted,
    Busy,
    DecodeRequest,
    Failed,
    Reply,
    Room,
    Tokens,
    Watch,
)

C = TypeVar("C", bound=AcceptedCall)


class RoomAdmission(Generic[C]):
    """Gives the room of one decode to requests; used in its event loop.

    Times are ``loop.time()`` seconds, given by the caller.

    Args:
        blocks: returns the number of KV blocks that a request could have.
    """

    def __init__(self, limits: config.Decode, blocks: Callable[[], int]) -> None:
        self.open: dict[str, C] = {}
        """The open requests, by their ids."""
        self.watches = RoomWatches(self.room)
        self.seconds = TimeIntegral()
        self._limits = limits
        self._blocks = blocks

    def room(self) -> Room:
        """Return the room that is left."""
        return Room(self._limits.slots - len(self.open), self._blocks())

    def refusal(self, request: DecodeRequest) -> Failed | Busy | None:
        """Return why a request cannot be accepted now, blocks aside; None if it can."""
        if request.id in self.open:
            return Failed(errors.InvalidRequest.code, f"request id {request.id} is in use")
        if len(self.open) >= self._limits.slots:
            return self.busy("slots")
        if request.suspect and any(call.on_trial for call in self.open.values()):
            return self.busy(SUSPECT)
        return None

    def busy(self, reason: str) -> Busy:
        """Return the refusal of a request for lack of a resource, whose gateway may watch."""
        self.watches.refused()
        return Busy(reason, self.room())

    def take_in(self, call: C, now: float) -> None:
        """Accept a request, and tell its gateway: at once if that is urgent, else after AFTER_S."""
        self.open[call.request.id] = call
        self.seconds.change(len(self.open), now)
        if call.request.suspect or call.request.hurry:
            self._accept(call)
        else:
            call.timer = asyncio.get_running_loop().call_later(AFTER_S, self._accept, call)

    def _accept(self, call: C) -> None:
        call.send(Accepted(room=self.room()), False)

    def watch(self, request: Watch, stream: str, send: Send, now: float) -> None:
        """Report once that a request has ended since; at once if none is open."""
        self.watches.wait(request, stream, send, len(self.open), self._limits.slots, now)
        asyncio.get_running_loop().call_later(WATCHED_S, self.watches.release, request.id)

    def tokens(self, call: C, start: int, reason: str) -> Tokens:
        """Return the reply with a call's unsent tokens.

        Args:
            start: index of the first of them in the answer.
            reason: why the answer ends with them; empty: it goes on.
        """
        ids = np.array(call.unsent, "<i4").tobytes()
        room = self.room() if call.transfer is not None and not reason else None
        return Tokens(start, ids, reason, call.transfer, room)

    def tell(self, call: C, reply: Tokens, now: float) -> None:
        """Send a reply of ``tokens`` that is not the last one."""
        call.tell(reply, False)
        call.unsent.clear()
        if call.on_trial:
            self.watches.ended(now)  # another suspect may be tried
        call.transfer = None
        call.sent_at = now

    def end(self, call: C, reply: Reply, now: float) -> None:
        """Send the last reply of a request, whose blocks are free again."""
        del self.open[call.request.id]
        self.seconds.change(len(self.open), now)
        if isinstance(reply, Tokens):
            reply = msgspec.structs.replace(reply, room=self.room())
        call.tell(reply, True)
        self.watches.ended(now)
