"""Contiguous ranges of one memory region: who holds which bytes, and when they come back.

The life of a range:

    FREE --allocate--> ALLOCATED --lease--> LEASED --cache--> CACHED --free, evicted--> FREE
                           |                   |                 ^
                           | free: cancelled,  | quarantine      | cache: the receiver is done,
                           v failed            v                 | or its own bound has passed
                         FREE              QUARANTINED ----------'

ALLOCATED    being filled by the engine
LEASED       filled; a receiver may read it until `until`
QUARANTINED  the lease ended (cancelled, expired) while a receiver was reading: kept until the
             receiver is done, or until `until`, whichever comes first
CACHED       filled, nobody waits for it: a source for prefix reuse, evicted when room is needed

However a lease ends, by transfer, cancel or expiry, the range becomes CACHED and not FREE: its
bytes are whole, a retry of the same prompt finds them, and eviction gives them up at once to
anybody who needs the room.

Nothing here reads a clock or waits; call `due` on every tick, whatever the load.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from pdserve.kvcache.holes import Holes

if TYPE_CHECKING:
    from collections.abc import Callable

ALIGNMENT = 4096


class State(Enum):
    """Of a range; drawn at the head of this module."""

    FREE = "free"
    ALLOCATED = "allocated"
    LEASED = "leased"
    QUARANTINED = "quarantined"
    CACHED = "cached"


_NEXT = {
    State.FREE: (),
    State.ALLOCATED: (State.LEASED, State.FREE),
    State.LEASED: (State.CACHED, State.QUARANTINED),
    State.QUARANTINED: (State.CACHED,),
    State.CACHED: (State.FREE,),
}


@dataclass(eq=False)
class Range:
    """`nbytes` bytes from `offset`; it occupies `size`, a multiple of ALIGNMENT.

    Read by everybody, changed by its arena only.
    """

    offset: int
    size: int
    nbytes: int
    state: State = State.ALLOCATED
    until: float = 0.0
    """When LEASED or QUARANTINED ends by itself, in seconds on the caller's clock."""
    pins: int = 0

    @property
    def filled(self) -> bool:
        """The bytes are whole and may be copied from."""
        return self.state in (State.LEASED, State.QUARANTINED, State.CACHED)


class Arena:
    """Hands out at most `max_ranges` ranges of `capacity` bytes; book-keeping of offsets only.

    `on_free` is called with every range that becomes FREE, before its bytes can be handed out
    again: what is known about its content (`PrefixIndex.remove`) must go then.
    """

    def __init__(
        self,
        capacity: int,
        max_ranges: int,
        on_free: Callable[[Range], None] = lambda _: None,
    ) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.max_ranges = max_ranges
        self._on_free = on_free
        self._holes = Holes(self.capacity)
        self._held: dict[int, Range] = {}
        # Kept, not counted anew: asked for on every tick, of thousands of ranges.
        self._counts = dict.fromkeys(State, (0, 0))
        # CACHED and not pinned, least recently used first.
        self._evictable: OrderedDict[int, Range] = OrderedDict()

    def allocate(self, nbytes: int) -> Range | None:
        """An ALLOCATED range, evicting what is needed for it; None if there is no room now.

        Nothing is evicted in vain: if the room would not be enough, the cache stays as it is.
        """
        if nbytes <= 0:
            raise ValueError(f"a range has at least 1 byte, not {nbytes}")
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if not self._can_make_room(size):
            return None
        while self._holes.largest < size or self._count() == self.max_ranges:
            self.free(next(iter(self._evictable.values())))
        offset = self._holes.take(size)
        assert offset is not None
        taken = Range(offset, size, nbytes)
        self._held[offset] = taken
        self._tally(taken, 1)
        return taken

    def lease(self, held: Range, until: float) -> None:
        """ALLOCATED -> LEASED: the range is filled and may be read until `until`."""
        self._move(held, State.LEASED)
        held.until = until

    def quarantine(self, held: Range, until: float) -> None:
        """LEASED -> QUARANTINED: the lease has ended, but a receiver may read until `until`."""
        self._move(held, State.QUARANTINED)
        held.until = until

    def cache(self, held: Range) -> None:
        """LEASED or QUARANTINED -> CACHED: no receiver reads it, or will."""
        self._move(held, State.CACHED)
        self._park(held)

    def free(self, held: Range) -> None:
        """ALLOCATED or CACHED -> FREE. Nothing may be writing to or copying from the range."""
        if held.pins:
            raise ValueError(f"range at {held.offset} is pinned by {held.pins} and cannot be freed")
        self._move(held, State.FREE)
        self._held.pop(held.offset, None)
        self._evictable.pop(held.offset, None)
        self._on_free(held)
        self._holes.give(held.offset, held.size)

    def pin(self, held: Range) -> None:
        """Keep a filled range from eviction while it is copied from, and mark it as used."""
        if not held.filled:
            raise ValueError(f"range at {held.offset} is {held.state.value}: nothing to copy from")
        held.pins += 1
        if self._evictable.pop(held.offset, None):
            self._held[held.offset] = held

    def unpin(self, held: Range) -> None:
        """End of `pin`; the range is now the most recently used."""
        if not held.pins:
            raise ValueError(f"range at {held.offset} is not pinned")
        held.pins -= 1
        if held.state is State.CACHED:
            self._park(held)

    def counts(self) -> dict[State, tuple[int, int]]:
        """Ranges and bytes per state; FREE counts holes. The bytes add up to the capacity."""
        return self._counts | {State.FREE: (len(self._holes), self._holes.free)}

    def _count(self) -> int:
        return len(self._held) + len(self._evictable)

    def _can_make_room(self, size: int) -> bool:
        """Whether `size` bytes in a row are free once all that can be evicted is."""
        if self._count() == self.max_ranges and not self._evictable:
            return False
        if self._holes.largest >= size:
            return True
        end = 0
        for held in sorted(self._held.values(), key=lambda held: held.offset):
            if held.offset - end >= size:
                return True
            end = held.offset + held.size
        return self.capacity - end >= size

    def _move(self, held: Range, state: State) -> None:
        if state not in _NEXT[held.state]:
            allowed = " or ".join(state.value for state in _NEXT[held.state]) or "nothing"
            raise ValueError(
                f"range at {held.offset} is {held.state.value} and cannot become {state.value}; "
                f"only {allowed}"
            )
        self._tally(held, -1)
        held.state = state
        self._tally(held, 1)

    def _tally(self, held: Range, step: int) -> None:
        ranges, size = self._counts[held.state]
        self._counts[held.state] = ranges + step, size + step * held.size

    def _park(self, held: Range) -> None:
        """Make a CACHED range evictable, as the most recently used, unless it is pinned."""
        if not held.pins:
            self._held.pop(held.offset, None)
            self._evictable[held.offset] = held
