"""Room in one decode: what it has reported, less what is promised."""

from __future__ import annotations

import math
from collections.abc import Callable

from pdserve.rpc import messages


class Room:
    """Room in one decode, as one gateway knows it.

    Args:
        changed: called after each change.
    """

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._changed = changed
        self.told: messages.Room | None = None
        self.told_at = -math.inf
        self.slots = 0
        """Number of slots that are promised."""
        self.blocks = 0
        """Number of blocks that are promised."""

    def tell(self, room: messages.Room, now: float) -> None:
        self.told, self.told_at = room, now
        self._changed()

    def promise(self, slots: int, blocks: int) -> None:
        """Add promised slots and blocks; negative numbers take them off."""
        self.slots += slots
        self.blocks += blocks
        self._changed()

    def forget(self) -> None:
        """Forget what the decode has reported, since it may have restarted."""
        self.told, self.told_at = None, -math.inf
        self._changed()

    def fits(self, blocks: int) -> bool:
        """Tell whether a request of ``blocks`` blocks finds room, as far as is known."""
        if self.told is None:
            return True
        return self.slots < self.told.slots and self.blocks + blocks <= self.told.blocks

    @property
    def free(self) -> int:
        """Return the number of free blocks, as reported, less those that are promised."""
        assert self.told is not None
        return self.told.blocks - self.blocks

    def most(self, blocks: int) -> int:
        """Return how many requests of ``blocks`` blocks find room, as reported."""
        assert self.told is not None
        return max(min(self.told.slots - self.slots, self.free // blocks), 0)


class Promise:
    """A promised place in a decode, until one has accepted the request or it needs none.

    Args:
        room: the room of the decode; None: the request needs none, or no decode has as much.
        over: called once, when the promise ends.
    """

    def __init__(
        self, room: Room | None, blocks: int, over: Callable[[], None] = lambda: None
    ) -> None:
        self._room = room
        self._blocks = blocks
        self._over = over
        if room is not None:
            room.promise(1, blocks)

    def over(self) -> None:
        """End the promise; ending it again is no error."""
        room, self._room = self._room, None
        if room is not None:
            room.promise(-1, -self._blocks)
            self._over()
