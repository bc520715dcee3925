"""Leases of a prefill's KV memory: ranges of its arena, until nobody reads them any more.

`pdserve.kvcache.arena` draws the states of a range. Once a lease is granted a decode may take it;
what the decode says in the lease table is looked at on every sweep:

    DONE, or never begun by `until`      the lease ends, its range is CACHED
    PULLING, and its beat moves          the lease goes on: the receiver's own deadline bounds it
    PULLING, but silent for QUIET_S      the receiver is dead or stands still: as expired
    given back while PULLING             QUARANTINED until the receiver says DONE or falls silent

A receiver only reads, and looks at the lease again before it uses what it has read: one that
stood still and goes on one day finds its lease gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pdserve.kvcache.arena import Arena, Range, State
from pdserve.transfer.lease.remote import BEAT_S
from pdserve.transfer.lease.words import Pull
from pdserve.transfer.producer.holder import Holder

QUIET_S = 20 * BEAT_S
MAX_RANGES = 4096


@dataclass(slots=True, eq=False)
class LeasedRange:
    """A range, and from `grant` on its lease. Changed by its `LeaseManager` only."""

    range: Range
    slot: int | None = None
    """In the lease table."""
    beat: tuple[Pull, int] = (Pull.IDLE, 0)
    """What was heard last of the receiver, and when."""
    heard_at: float = 0.0


class LeaseManager:
    """Leases the ranges of one holder, and ends the leases.

    Times are seconds on CLOCK_MONOTONIC, given by the caller.

    Args:
        on_free: told of every range that becomes FREE, before its bytes are handed out again.
    """

    def __init__(self, holder: Holder, on_free: Callable[[Range], None]) -> None:
        self._holder = holder
        self._leases = holder.leases
        self.arena = Arena(len(holder.data), MAX_RANGES, on_free)
        self.quarantined: list[LeasedRange] = []

    def allocate(self, nbytes: int) -> LeasedRange | None:
        """A range to be filled; None if there is no room now."""
        held = self.arena.allocate(nbytes)
        return LeasedRange(held) if held is not None else None

    def grant(self, leased: LeasedRange, tokens: int, until: float) -> bytes:
        """Grant a lease; a sealed handle of the KV cache, which may still be being filled.

        Raises:
            Unavailable: every lease slot is in use.
        """
        leased.slot, nonce = self._leases.grant(until)
        return self._holder.handle(leased.range.offset, tokens, leased.slot, nonce, until)

    def fill(self, leased: LeasedRange, planes: int) -> None:
        """So many planes may be read now. For the thread that computes; the lease goes on."""
        assert leased.slot is not None
        self._holder.written()
        self._leases.fill(leased.slot, planes)

    def complete(
        self, leased: LeasedRange, tokens: int, planes: int, token: int, until: float
    ) -> bytes:
        """All is filled, and the first token is known; a decode has until then to begin.

        Returns:
            A sealed handle of the KV cache; empty where ``grant`` has given one.

        Raises:
            Unavailable: every lease slot is in use.
        """
        self._holder.written()
        handle = b""
        if leased.slot is None:
            leased.slot, nonce = self._leases.grant(until, planes, token)
            handle = self._holder.handle(leased.range.offset, tokens, leased.slot, nonce, until)
        else:
            self._leases.extend(leased.slot, until)
            self._leases.fill(leased.slot, planes, token)
        self.arena.lease(leased.range, until)
        return handle

    def over(self, leased: LeasedRange, now: float) -> bool:
        """Whether a completed lease has ended: taken, never begun in time, or its reader silent."""
        if self._reading(leased, now):
            self.arena.transfer(leased.range, leased.heard_at + QUIET_S)
            return False
        return leased.beat[0] is not Pull.IDLE or now >= leased.range.until

    def give_back(self, leased: LeasedRange, now: float) -> None:
        """Take a range back, whatever its state; nothing may be writing to it any more."""
        if leased.slot is None:
            self.arena.free(leased.range)
        elif self._leases.revoke(leased.slot) is Pull.PULLING and self._reading(leased, now):
            self.arena.quarantine(leased.range, leased.heard_at + QUIET_S)
            self.quarantined.append(leased)
        else:
            self._let_go(leased)

    def sweep(self, now: float) -> None:
        """Let go of what nobody reads any more; on every tick, whatever the load."""
        for leased in list(self.quarantined):
            if not self._reading(leased, now):
                self.quarantined.remove(leased)
                self._let_go(leased)

    def counts(self) -> dict[State, tuple[int, int]]:
        """Ranges and bytes by state."""
        return self.arena.counts()

    def _let_go(self, leased: LeasedRange) -> None:
        assert leased.slot is not None
        self._leases.free(leased.slot)
        self.arena.release(leased.range)

    def _reading(self, leased: LeasedRange, now: float) -> bool:
        """Whether its receiver says that it is reading, and has shown life lately."""
        assert leased.slot is not None
        heard = self._leases.heard(leased.slot)
        if heard != leased.beat:
            leased.beat, leased.heard_at = heard, now
        return heard[0] is Pull.PULLING and now < leased.heard_at + QUIET_S
