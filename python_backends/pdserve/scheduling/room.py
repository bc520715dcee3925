"""Room in one decode: what it has told, less what is promised of it."""

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
        """That are promised."""
        self.blocks = 0
        """The same."""

    def tell(self, room: messages.Room, now: float) -> None:
        self.told, self.told_at = room, now
        self._changed()

    def promise(self, slots: int, blocks: int) -> None:
        """So much more is promised; a negative number: it is no longer."""
        self.slots += slots
        self.blocks += blocks
        self._changed()

    def forget(self) -> None:
        """It may have a new life."""
        self.told, self.told_at = None, -math.inf
        self._changed()

    def fits(self, blocks: int) -> bool:
        """Whether a request of so many blocks finds room, as far as is known."""
        if self.told is None:
            return True
        return self.slots < self.told.slots and self.blocks + blocks <= self.told.blocks

    @property
    def free(self) -> int:
        """Blocks, as has been told and less what is promised."""
        assert self.told is not None
        return self.told.blocks - self.blocks

    def most(self, blocks: int) -> int:
        """Requests of so many blocks that find room, as has been told."""
        assert self.told is not None
        return max(min(self.told.slots - self.slots, self.free // blocks), 0)


class Promise:
    """A place in a decode, until one has accepted the request or it does not need any.

    Args:
        room: of the decode; None: none is needed, or none has so much.
        over: called once, at its end.
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
        """End it; to end it again is no error."""
        room, self._room = self._room, None
        if room is not None:
            room.promise(-1, -self._blocks)
            self._over()
