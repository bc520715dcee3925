"""The slots of a prefill: which offers get one, and which gateways wait for one.

A request holds a slot from its acceptance until the instance gives it back. Requests whose first
token is not known yet are limited further, by the places in the next forward.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from pdserve import errors
from pdserve.instances.protocol import Send
from pdserve.instances.slot_watches import WATCHED_S, SlotWatches
from pdserve.instances.slots import TimeIntegral
from pdserve.rpc.messages import SUSPECT, Busy, Failed, PrefillRequest, Watch


class Holding(Protocol):
    """A request that holds a slot."""

    @property
    def request(self) -> PrefillRequest: ...

    @property
    def computing(self) -> bool:
        """Tell whether its first token is not known yet."""


H = TypeVar("H", bound=Holding)


class SlotAdmission(Generic[H]):
    """Gives the slots of one prefill to requests; used in its event loop.

    Times are ``loop.time()`` seconds, given by the caller.

    Args:
        slots: the number of slots.
        places: returns the number of further requests for which the next forward has room.
        sweep: called with the time before slots are counted: gives back the slots of what is over,
            and tells whether there may be memory for another request.
    """

    def __init__(
        self, slots: int, places: Callable[[], int], sweep: Callable[[float], bool]
    ) -> None:
        self.held: dict[str, H] = {}
        """The requests that hold a slot, by their ids."""
        self.watches = SlotWatches()
        self.seconds = TimeIntegral()
        self._slots = slots
        self._places = places
        self._sweep = sweep

    def free(self) -> int:
        """Return the number of slots that could be taken."""
        return min(self._places(), self._slots - len(self.held))

    def refusal(self, request: PrefillRequest, now: float) -> Failed | Busy | None:
        """Return why a request cannot have a slot now; None if it can, which ``take`` gives it."""
        if request.id in self.held:
            return Failed(errors.InvalidRequest.code, f"request id {request.id} is in use")
        self.look(now, offering=request.gateway)
        if not self.watches.admits(request.gateway, self.free()):
            return Busy("slots")
        if request.suspect and any(
            held.computing and held.request.suspect for held in self.held.values()
        ):
            return Busy(SUSPECT)
        return None

    def take(self, held: H, now: float) -> None:
        """Give a slot to a request that has not been refused."""
        self.watches.took(held.request.gateway)
        self.held[held.request.id] = held
        self.seconds.change(len(self.held), now)

    def give_back(self, held: H, now: float) -> None:
        """Free the slot of a request."""
        del self.held[held.request.id]
        self.seconds.change(len(self.held), now)

    def reject(self, request: PrefillRequest, message: str, send: Send) -> None:
        """Answer a request that can never be served, and with which its gateway has had a turn."""
        self.watches.took(request.gateway)
        send(Failed(errors.InvalidRequest.code, message), True)

    def watch(self, request: Watch, stream: str, send: Send, now: float) -> None:
        """Report once when a slot is free for this gateway, which may be now."""
        self.watches.add(request, stream, send)
        asyncio.get_running_loop().call_later(WATCHED_S, self.watches.release, request.id)
        self.look(now)

    def look(self, now: float, offering: str | None = None) -> None:
        """Check what has become free, and notify the next gateways but the one ``offering``."""
        memory = self._sweep(now)
        self.watches.tell(self.free() if memory else 0, now, offering)
