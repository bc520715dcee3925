"""Gateways that wait for a free slot: notified in turn, each with a slot kept for a moment.

    watch ──► waiting, one watch to a gateway and to a connection, first come first
                │ a slot is free and kept for nobody
                ▼
              told (Freed), the slot is kept for RESERVED_S
                │ an offer of the gateway, a release, or the time
                ▼
              over

An offer finds a slot unless all free slots are kept for others. So a gateway that comes late, or
often, is not served before one that has waited, and a gateway that uses many names has one turn, as
long as it has one connection.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

from pdserve import errors
from pdserve.instances.protocol import Send
from pdserve.rpc.messages import Failed, Freed, Released, Reply, Room, Watch

# An offer follows within a few milliseconds, ten of them where the gateway is busy. If none does,
# the slot has been idle for this long.
RESERVED_S = 0.02
WATCHED_S = 2.0
"""Seconds after which a watch ends: a gateway that still waits has asked again by then, and the
release of one that does not may have been lost."""
# Each may make those behind it wait for RESERVED_S.
MAX_WATCHES = 256
_FULL = Failed(errors.Unavailable.code, f"{MAX_WATCHES} gateways wait already")


class _Waiting(NamedTuple):
    id: str
    gateway: str
    stream: str
    send: Send


class Kept(NamedTuple):
    """A free slot that is kept for one gateway."""

    id: str
    gateway: str
    until: float


class SlotWatches:
    """Keeps the gateways that wait for a slot of one instance, and notifies them in turn.

    Times are ``loop.time()`` seconds, given by the caller.

    Call ``tell`` after whatever may have made something free, and after every watch.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        """Waiting gateways in the order in which they are notified."""
        self.kept: list[Kept] = []

    def __len__(self) -> int:
        """Return the number of gateways that wait."""
        return len(self._waiting)

    def add(self, watch: Watch, stream: str, send: Send) -> None:
        """Add a gateway's watch.

        A gateway that waits already keeps its place, and its former watch ends.

        Args:
            stream: the gateway's connection, which has one watch, whatever names it gives.
        """
        waiting = _Waiting(watch.id, watch.gateway, stream, send)
        formers = [
            one for one in self._waiting if one.gateway == watch.gateway or one.stream == stream
        ]
        if formers:
            self._waiting[self._waiting.index(formers[0])] = waiting
            self._waiting = [one for one in self._waiting if one not in formers]
        elif len(self._waiting) < MAX_WATCHES:
            self._waiting.append(waiting)
        else:
            send(_FULL, True)
        for former in formers:
            former.send(Released(), True)

    def release(self, watch_id: str) -> None:
        """End a watch, and free the slot that is kept for it."""
        self.kept = [kept for kept in self.kept if kept.id != watch_id]
        for waiting in [one for one in self._waiting if one.id == watch_id]:
            self._waiting.remove(waiting)
            waiting.send(Released(), True)

    def tell(self, free: int, now: float, offering: str | None = None) -> None:
        """Keep each of ``free`` slots for one of the waiting gateways, in order, and notify it.

        The gateway that is ``offering`` at this moment need not be notified: it uses its turn with
        the offer, and waits again behind the others.
        """
        self.kept = [kept for kept in self.kept if now < kept.until]
        while self._waiting and len(self.kept) < free:
            waiting = self._waiting.pop(0)
            self.kept.append(Kept(waiting.id, waiting.gateway, now + RESERVED_S))
            if waiting.gateway == offering:
                self._waiting.append(waiting)
                offering = None
            else:
                waiting.send(self._freed(), True)

    def _freed(self) -> Freed:
        return Freed()

    def admits(self, gateway: str, free: int) -> bool:
        """Tell whether one of ``free`` slots is available to an offer of this gateway."""
        return free > sum(kept.gateway != gateway for kept in self.kept)

    def took(self, gateway: str) -> None:
        """Note that a gateway has had its turn: its offer has been accepted, or can never be."""
        for kept in self.kept:
            if kept.gateway == gateway:
                self.kept.remove(kept)
                return

    def close(self, reply: Reply) -> None:
        """End all watches: nothing will become free any more."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.send(reply, True)


class RoomWatches(SlotWatches):
    """Keeps the gateways that wait for room in a decode.

    A watch does not state how much room it needs, so all are notified when a request has ended."""

    def __init__(self, room: Callable[[], Room]) -> None:
        super().__init__()
        self._room = room
        self._refused = False
        """True if a request has been refused since the last one ended."""

    def refused(self) -> None:
        """Note that a request has been refused, whose gateway may watch."""
        self._refused = True

    def wait(
        self, watch: Watch, stream: str, send: Send, used: int, slots: int, now: float
    ) -> None:
        """Report once that a request has ended since.

        At once if none is open, or there is more room.

        Args:
            used: number of the ``slots`` that are taken.
        """
        self.add(watch, stream, send)
        # A request may have ended while the refusal was on its way to the gateway that watches now.
        if watch.room is not None:
            room = self._room()
            ended = room.slots > watch.room.slots or room.blocks > watch.room.blocks
        else:
            ended = (not self._refused and used < slots) or not used
        if ended:
            self.ended(now)

    def _freed(self) -> Freed:
        return Freed(self._room())

    def ended(self, now: float) -> None:
        """Notify all gateways: a request has ended, or something else has become free."""
        self._refused = False
        self.tell(sys.maxsize, now)
