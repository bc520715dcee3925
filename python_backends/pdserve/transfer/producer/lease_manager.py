"""A prefill's KV memory on loan: ranges and their leases, until nobody reads them any more.

A loan is a range of the arena (`pdserve.kvcache.arena` draws its states). Once a lease is granted
a decode may take it; what the decode says in the lease table is looked at on every sweep:

    DONE, or never begun by `until`      the loan ends, its range is CACHED
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
    """A range, and from `lend` on its lease. Changed by its `LeaseManager` only."""

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

    def lend(self, loan: LeasedRange, tokens: int, until: float) -> bytes:
        """Grant a lease; a sealed handle of the KV cache, which may still be being filled.

        Raises:
            Unavailable: every lease slot is in use.
        """
        loan.slot, nonce = self._leases.grant(until)
        return self._holder.handle(loan.range.offset, tokens, loan.slot, nonce, until)

    def fill(self, loan: LeasedRange, planes: int) -> None:
        """So many planes may be read now. For the thread that computes; the loan goes on."""
        assert loan.slot is not None
        self._holder.written()
        self._leases.fill(loan.slot, planes)

    def complete(
        self, loan: LeasedRange, tokens: int, planes: int, token: int, until: float
    ) -> bytes:
        """All is filled, and the first token is known; a decode has until then to begin.

        Returns:
            A sealed handle of the KV cache; empty where ``lend`` has given one.

        Raises:
            Unavailable: every lease slot is in use.
        """
        self._holder.written()
        handle = b""
        if loan.slot is None:
            loan.slot, nonce = self._leases.grant(until, planes, token)
            handle = self._holder.handle(loan.range.offset, tokens, loan.slot, nonce, until)
        else:
            self._leases.extend(loan.slot, until)
            self._leases.fill(loan.slot, planes, token)
        self.arena.lease(loan.range, until)
        return handle

    def over(self, loan: LeasedRange, now: float) -> bool:
        """Whether a completed loan has ended: taken, never begun in time, or its reader silent."""
        if self._reading(loan, now):
            self.arena.transfer(loan.range, loan.heard_at + QUIET_S)
            return False
        return loan.beat[0] is not Pull.IDLE or now >= loan.range.until

    def give_back(self, loan: LeasedRange, now: float) -> None:
        """End a loan, whatever its state; nothing may be writing to its range any more."""
        if loan.slot is None:
            self.arena.free(loan.range)
        elif self._leases.revoke(loan.slot) is Pull.PULLING and self._reading(loan, now):
            self.arena.quarantine(loan.range, loan.heard_at + QUIET_S)
            self.quarantined.append(loan)
        else:
            self._let_go(loan)

    def sweep(self, now: float) -> None:
        """Let go of what nobody reads any more; on every tick, whatever the load."""
        for loan in list(self.quarantined):
            if not self._reading(loan, now):
                self.quarantined.remove(loan)
                self._let_go(loan)

    def counts(self) -> dict[State, tuple[int, int]]:
        """Ranges and bytes by state."""
        return self.arena.counts()

    def _let_go(self, loan: LeasedRange) -> None:
        assert loan.slot is not None
        self._leases.free(loan.slot)
        self.arena.release(loan.range)

    def _reading(self, loan: LeasedRange, now: float) -> bool:
        """Whether its receiver says that it is reading, and has shown life lately."""
        assert loan.slot is not None
        heard = self._leases.heard(loan.slot)
        if heard != loan.beat:
            loan.beat, loan.heard_at = heard, now
        return heard[0] is Pull.PULLING and now < loan.heard_at + QUIET_S
