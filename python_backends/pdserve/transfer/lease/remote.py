"""A receiver's side of one lease: reads and writes the words of its slot."""

from __future__ import annotations

import time
from contextlib import suppress

from pdserve.errors import HandleError
from pdserve.kvcache.handle import KVHandle
from pdserve.transfer.clock import Clock
from pdserve.transfer.lease.words import NO_GRANT, NO_NONCE, Pull, grant, pulled, word
from pdserve.transfer.protocol import Link

WORD_S = 2.0
"""Longest time of reading or writing a few bytes, in seconds."""
BEAT_S = 0.25
"""Interval at which a receiver shows that it is working, in seconds."""
# Intervals of looks at planes that are not filled yet: without other work, and during a move.
LOOK_S = 1e-3
LOOK_BESIDE_S = 10e-3


class RemoteLease:
    """A receiver's side of the lease of one KV cache; used by one thread.

    Args:
        planes: number of planes of the KV cache of ``handle``.
    """

    def __init__(self, link: Link, handle: KVHandle, planes: int, clock: Clock = time) -> None:
        self.planes = planes
        self.grant = NO_GRANT
        """The holder's words at the last look."""
        self.said = Pull.IDLE
        """The receiver's word in the slot at the last look."""
        self.unfilled_at = 0.0
        """Time of the last look at which planes were still being computed, by the clock."""
        self._link = link
        self._handle = handle
        self._clock = clock
        self._beat = 0
        self._said_at = 0.0
        self._looked_at = 0.0

    @property
    def filled(self) -> bool:
        """Tell whether every plane has been computed, and the first token."""
        return self.grant.filled >= self.planes and self.grant.token >= 0

    def look(self) -> None:
        """Read the slot.

        Raises:
            HandleError: the lease has ended, or the slot has another lease.
            TransferError: the holder does not answer.
        """
        now = self._clock.monotonic()
        slot = self._link.peek(self._handle.lease, now + WORD_S)
        self.grant = grant(slot)
        self._looked_at = self._clock.monotonic()
        if not self.grant.is_of(self._handle.nonce):
            raise HandleError(f"lease {self._handle.lease} has ended, or is another's")
        self.said = pulled(slot, self._handle.nonce)[0]
        if not self.filled:
            self.unfilled_at = now

    def say(self, state: Pull) -> None:
        """Write the receiver's word, unless the slot had another lease at the last look.

        A receiver that was stopped for that long must not overwrite another receiver's word.

        Raises:
            TransferError: the holder does not answer.
        """
        self._said_at = self._clock.monotonic()
        if self.grant.nonce not in (self._handle.nonce, NO_NONCE):
            return
        said = word(self._handle.nonce, state, self._beat)
        self._link.mark(self._handle.lease, said, self._said_at + WORD_S)

    def alive(self) -> None:
        """Show life, and look how far the computation is; called often during a move."""
        now = self._clock.monotonic()
        beats = now - self._said_at > BEAT_S
        if beats or (not self.filled and now - self._looked_at > LOOK_BESIDE_S):
            # Breaking off a move costs the link, and so the other pulls on it. The look after the
            # move tells whether the lease has ended.
            with suppress(HandleError):
                self.look()
        if beats:
            self._beat += 1
            self.say(Pull.PULLING)

    def wait(self) -> None:
        """Wait a moment for more planes."""
        self._clock.sleep(LOOK_S)
        self.look()
        self.alive()
