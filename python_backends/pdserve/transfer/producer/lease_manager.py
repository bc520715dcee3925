"""Leases of a prefill's KV memory: ranges of its arena, until no receiver reads them any more.

`pdserve.kvcache.arena` draws the states of a range. Once a lease is granted a decode may take it;
every sweep reads the decode's word in the lease table:

    DONE, or never begun by `until`      the lease ends, its range is CACHED
    PULLING, and its beat moves          the lease goes on: the receiver's own deadline bounds it
    PULLING, but silent for QUIET_S      the receiver is dead or stands still: as expired
    given back while PULLING             QUARANTINED until the receiver says DONE or falls silent

A receiver only reads, and looks at the lease again before it uses what it has read: one that was
stopped and resumes later finds its lease gone.
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
    """A range, and after `grant` its lease. Changed by its `LeaseManager` only."""

    range: Range
    slot: int | None = None
    """Slot in the lease table."""
    beat: tuple[Pull, int] = (Pull.IDLE, 0)
    """The receiver's state and beat when they changed last, at `heard_at`."""
    heard_at: float = 0.0


class LeaseManager:
    """Leases the ranges of one holder, and ends the leases.

    Times are seconds on CLOCK_MONOTONIC, given by the caller.

    Args:
        on_free: called with every range that becomes FREE, before its bytes are reused.
    """

    def __init__(self, holder: Holder, on_free: Callable[[Range], None]) -> None:
        self._holder = holder
        self._leases = holder.leases
        self.arena = Arena(len(holder.data), MAX_RANGES, on_free)
        self.quarantined: list[LeasedRange] = []

    def allocate(self, nbytes: int) -> LeasedRange | None:
        """Allocate a range to be filled; None if there is no room now."""
        held = self.arena.allocate(nbytes)
        return LeasedRange(held) if held is not None else None

    def grant(self, leased: LeasedRange, tokens: int, until: float) -> bytes:
        """Grant a lease; return a sealed handle of the KV cache, which may still be being filled.

        Raises:
            Unavailable: every lease slot is in use.
        """
        leased.slot, nonce = self._leases.grant(until)
        return self._holder.handle(leased.range.offset, tokens, leased.slot, nonce, until)

    def fill(self, leased: LeasedRange, planes: int) -> None:
        """Note that ``planes`` planes may be read now. For the computing thread.

        The lease must not end.
        """
        assert leased.slot is not None
        self._holder.written()
        self._leases.fill(leased.slot, planes)

    def complete(
        self, leased: LeasedRange, tokens: int, planes: int, token: int, until: float
    ) -> bytes:
        """Note that the KV cache and the first token are complete.

        A decode may begin until ``until``.

        Returns:
            A sealed handle of the KV cache; empty if ``grant`` has returned one.

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
        """Tell whether a completed lease has ended: taken, not begun in time, or silent."""
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
        """Free what no receiver reads any more; called on every tick."""
        for leased in list(self.quarantined):
            if not self._reading(leased, now):
                self.quarantined.remove(leased)
                self._let_go(leased)

    def counts(self) -> dict[State, tuple[int, int]]:
        """Return the number of ranges and of bytes by state."""
        return self.arena.counts()

    def _let_go(self, leased: LeasedRange) -> None:
        assert leased.slot is not None
        self._leases.free(leased.slot)
        self.arena.release(leased.range)

    def _reading(self, leased: LeasedRange, now: float) -> bool:
        """Tell whether the receiver is PULLING, and has shown life lately."""
        assert leased.slot is not None
        heard = self._leases.heard(leased.slot)
        if heard != leased.beat:
            leased.beat, leased.heard_at = heard, now
        return heard[0] is Pull.PULLING and now < leased.heard_at + QUIET_S
