"""A receiver's side of one lease: what it reads in the slot, and what it says there."""

from __future__ import annotations

import time
from contextlib import suppress

from pdserve.errors import HandleError
from pdserve.kvcache.handle import KVHandle
from pdserve.transfer.lease.words import NO_GRANT, NO_NONCE, Pull, grant, pulled, word
from pdserve.transfer.protocol import Link

WORD_S = 2.0
"""Of reading or writing a few bytes, at most."""
BEAT_S = 0.25
"""How often a receiver shows that it is at work."""
# Between two looks at planes that are not filled yet: with nothing else to do, and beside a move.
LOOK_S = 1e-3
LOOK_BESIDE_S = 10e-3


class RemoteLease:
    """A receiver's side of the lease of one KV cache; used by one thread.

    Args:
        planes: of the KV cache of ``handle``.
    """

    def __init__(self, link: Link, handle: KVHandle, planes: int) -> None:
        self.planes = planes
        self.grant = NO_GRANT
        """The holder's words at the last look."""
        self.said = Pull.IDLE
        """What stood in the slot as a receiver's word at the last look."""
        self.unfilled_at = 0.0
        """When it was last seen that planes were still being computed (time.monotonic())."""
        self._link = link
        self._handle = handle
        self._beat = 0
        self._said_at = 0.0
        self._looked_at = 0.0

    @property
    def filled(self) -> bool:
        """Every plane has been computed, and the first token."""
        return self.grant.filled >= self.planes and self.grant.token >= 0

    def look(self) -> None:
        """Read the slot.

        Raises:
            HandleError: the lease has ended, or is another's.
            TransferError: the holder does not answer.
        """
        now = time.monotonic()
        slot = self._link.peek(self._handle.lease, now + WORD_S)
        self.grant = grant(slot)
        self._looked_at = time.monotonic()
        if not self.grant.is_of(self._handle.nonce):
            raise HandleError(f"lease {self._handle.lease} has ended, or is another's")
        self.said = pulled(slot, self._handle.nonce)[0]
        if not self.filled:
            self.unfilled_at = now

    def say(self, state: Pull) -> None:
        """Write the receiver's word, unless the slot was another lease's at the last look.

        A receiver that has stood still for so long may not wipe out what another one says.

        Raises:
            TransferError: the holder does not answer.
        """
        self._said_at = time.monotonic()
        if self.grant.nonce not in (self._handle.nonce, NO_NONCE):
            return
        said = word(self._handle.nonce, state, self._beat)
        self._link.mark(self._handle.lease, said, self._said_at + WORD_S)

    def alive(self) -> None:
        """Called often during a move: shows life, and looks how far the computation is."""
        now = time.monotonic()
        beats = now - self._said_at > BEAT_S
        if beats or (not self.filled and now - self._looked_at > LOOK_BESIDE_S):
            # A move that is broken off costs the link, and so the other pulls on it. That the
            # lease has ended is told by the look after it.
            with suppress(HandleError):
                self.look()
        if beats:
            self._beat += 1
            self.say(Pull.PULLING)

    def wait(self) -> None:
        """For more planes, a moment."""
        time.sleep(LOOK_S)
        self.look()
        self.alive()
