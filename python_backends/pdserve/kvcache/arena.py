"""Contiguous ranges of one memory region: who holds which bytes, and when they come back.

The life of a range:

    FREE --allocate--> ALLOCATED --free, release--> FREE
                         | | |
           .--transfer---' | '--------quarantine--------.
           |             lease                          |
           |               v                            v
           |             LEASED ------quarantine--> QUARANTINED --release, not filled; free--> FREE
           |               | |                       ^     |
           |        transfer '--release--.           |  release, filled
           |               v             v           |     |
           '-------> IN_TRANSFER ----> CACHED <------+-----'
                           |    release  |           |
                           |             '-- free ---+---> FREE (evicted)
                           '-------quarantine--------'

ALLOCATED    being filled by the engine; a receiver may follow it layer by layer
LEASED       filled; a receiver may take it until `until`
IN_TRANSFER  filled; its receiver says that it is reading. `transfer` again moves `until`, as
             long as the receiver shows that it is at work
QUARANTINED  wanted no longer (cancelled, failed, expired) while a receiver was reading, or may
             be: kept until the receiver is done, or has been silent until `until`; `quarantine`
             again moves that
CACHED       filled and released, nobody waits for it: a source for prefix reuse, evicted when
             room is needed

A range is *filled* when it leaves ALLOCATED for LEASED, or, if a receiver follows already, for
IN_TRANSFER. However its lease ends, by transfer, cancel or expiry, a filled range becomes CACHED
and not FREE: its bytes are whole, a retry of the same prompt finds them, and eviction gives them
up at once to anybody who needs the room. One given up in mid-compute is never filled, and ends as
FREE.

Nothing here reads a clock or waits: the caller sweeps on every tick, whatever the load.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from pdserve.kvcache.evictor import Evictor
from pdserve.kvcache.free_list import FreeList

if TYPE_CHECKING:
    from collections.abc import Callable

ALIGNMENT = 4096


class State(Enum):
    """State of a range; drawn at the head of this module."""

    FREE = "free"
    ALLOCATED = "allocated"
    LEASED = "leased"
    IN_TRANSFER = "in_transfer"
    QUARANTINED = "quarantined"
    CACHED = "cached"


_NEXT = {
    State.FREE: (),
    State.ALLOCATED: (State.LEASED, State.IN_TRANSFER, State.QUARANTINED, State.FREE),
    State.LEASED: (State.IN_TRANSFER, State.QUARANTINED, State.CACHED),
    State.IN_TRANSFER: (State.IN_TRANSFER, State.QUARANTINED, State.CACHED),
    State.QUARANTINED: (State.QUARANTINED, State.CACHED, State.FREE),
    State.CACHED: (State.FREE,),
}


@dataclass(eq=False)
class Range:
    """`nbytes` bytes from `offset`; it occupies `size`, a multiple of ALIGNMENT.

    It may be read by all, and is changed by its arena only.
    """

    offset: int
    size: int
    nbytes: int
    state: State = State.ALLOCATED
    filled: bool = False
    """True if the bytes are complete and may be copied from."""
    until: float = 0.0
    """Time at which LEASED, IN_TRANSFER or QUARANTINED ends, in seconds on the caller's clock."""
    pins: int = 0

    def __str__(self) -> str:
        return f"range at {self.offset}"


class Arena:
    """Hands out at most `max_ranges` ranges of `capacity` bytes; book-keeping of offsets only.

    `on_free` is called with every range that becomes FREE, before its bytes are reused, so that
    what is known about its content is forgotten (`PrefixIndex.remove`).
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
        self._free_list = FreeList(self.capacity)
        self._evictor: Evictor[Range] = Evictor()
        # Maintained, not counted each time: they are read on every tick, for thousands of ranges.
        self._counts = dict.fromkeys(State, (0, 0))

    def allocate(self, nbytes: int) -> Range | None:
        """Return an ALLOCATED range, evicting ranges if needed; None if there is no room now.

        If eviction would not make enough room, nothing is evicted.
        """
        if nbytes <= 0:
            raise ValueError(f"a range has at least 1 byte, not {nbytes}")
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if not self._can_make_room(size):
            return None
        while self._free_list.largest < size or len(self._evictor) == self.max_ranges:
            self.free(next(iter(self._evictor.evictable)))
        offset = self._free_list.take(size)
        assert offset is not None
        taken = Range(offset, size, nbytes)
        self._evictor.add(taken)
        self._tally(taken, 1)
        return taken

    def lease(self, held: Range, until: float) -> None:
        """ALLOCATED -> LEASED: the range is filled, and may be taken until `until`."""
        self._move(held, State.LEASED, until)
        held.filled = True

    def transfer(self, held: Range, until: float) -> None:
        """-> IN_TRANSFER: the range is filled, and its receiver reads it; again moves `until`."""
        self._move(held, State.IN_TRANSFER, until)
        held.filled = True

    def quarantine(self, held: Range, until: float) -> None:
        """-> QUARANTINED: not wanted, but a receiver may read until `until`; again moves that."""
        self._move(held, State.QUARANTINED, until)

    def release(self, held: Range) -> None:
        """-> CACHED, or FREE if it was never filled: nobody writes or reads the range, or will."""
        if held.filled:
            self._move(held, State.CACHED)
            self._evictor.park(held)
        else:
            self.free(held)

    def free(self, held: Range) -> None:
        """-> FREE, as it is: nobody writes or reads the range, or copies from it."""
        if held.pins:
            raise ValueError(f"{held} is pinned by {held.pins} and cannot be freed")
        self._move(held, State.FREE)
        held.filled = False
        self._evictor.remove(held)
        self._on_free(held)
        self._free_list.give(held.offset, held.size)

    def pin(self, held: Range) -> None:
        """Keep a filled range from eviction while it is copied from."""
        if not held.filled:
            raise ValueError(f"{held} is {held.state.value}: nothing to copy from")
        self._evictor.pin(held)

    def unpin(self, held: Range) -> None:
        """End of `pin`; the range is now the most recently used."""
        self._evictor.unpin(held)

    def counts(self) -> dict[State, tuple[int, int]]:
        """Return the ranges and bytes per state; FREE counts holes.

        The bytes add up to the capacity.
        """
        return self._counts | {State.FREE: (len(self._free_list), self._free_list.free)}

    def _can_make_room(self, size: int) -> bool:
        """Tell whether `size` contiguous bytes are free once everything that can be evicted is."""
        if len(self._evictor) == self.max_ranges and not self._evictor.evictable:
            return False
        if self._free_list.largest >= size:
            return True
        end = 0
        for held in sorted(self._evictor.kept, key=lambda held: held.offset):
            if held.offset - end >= size:
                return True
            end = held.offset + held.size
        return self.capacity - end >= size

    def _move(self, held: Range, state: State, until: float = 0.0) -> None:
        if state not in _NEXT[held.state]:
            allowed = " or ".join(state.value for state in _NEXT[held.state]) or "nothing"
            raise ValueError(
                f"{held} is {held.state.value} and cannot become {state.value}; only {allowed}"
            )
        self._tally(held, -1)
        held.state, held.until = state, until
        self._tally(held, 1)

    def _tally(self, held: Range, step: int) -> None:
        ranges, size = self._counts[held.state]
        self._counts[held.state] = ranges + step, size + step * held.size
