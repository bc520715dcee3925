"""The holder's side of a lease table: a slot is granted, filled, revoked, then freed."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from pdserve.errors import Unavailable
from pdserve.transfer.lease.region import SharedRegion
from pdserve.transfer.lease.words import NO_GRANT, Grant, Pull, new_nonce, pulled


class LeaseTable:
    """The leases of one holder.

    Between revoking and freeing, the holder waits (within its own bound) for a receiver that is
    PULLING, since neither the range nor the slot may be reused while it reads.
    """

    def __init__(self, region: SharedRegion) -> None:
        self._region = region
        self._free = deque(range(region.slots))
        self._grants: dict[int, Grant] = {}

    def __len__(self) -> int:
        """Return the number of slots in use."""
        return len(self._grants)

    def grant(self, expires: float, planes: int = 0, token: int = -1) -> tuple[int, bytes]:
        """Return a slot, and its lease's nonce, valid until `expires` (CLOCK_MONOTONIC seconds).

        Args:
            planes, token: what is filled already; see `fill`.

        Raises:
            Unavailable: every slot is in use.
        """
        if not self._free:
            raise Unavailable(f"all {self._region.slots} lease slots are in use")
        slot = self._free.popleft()
        grant = Grant(new_nonce(), expires, planes, token)
        self._write(slot, grant)
        return slot, grant.nonce

    def fill(self, slot: int, planes: int, token: int = -1) -> None:
        """Report how many planes are filled, and the first token once it is known.

        May be called in another thread than the other methods, while none of them ends the lease.
        """
        self._write(slot, replace(self._grants[slot], filled=planes, token=token))

    def extend(self, slot: int, expires: float) -> None:
        """Change the end of a lease."""
        self._write(slot, replace(self._grants[slot], expires=expires))

    def revoke(self, slot: int) -> Pull:
        """End a lease; return the receiver's state at that moment. Calling it again is no error."""
        self._region.grant(slot, NO_GRANT)
        return self.state(slot)

    def state(self, slot: int) -> Pull:
        """Return the state of the receiver of a granted or revoked lease."""
        return self.heard(slot)[0]

    def heard(self, slot: int) -> tuple[Pull, int]:
        """Return the state of a lease's receiver, and its beat, which changes while it works."""
        return pulled(self._region.peek(slot), self._grants[slot].nonce)

    def free(self, slot: int) -> None:
        """Make a slot available to the next lease."""
        self.revoke(slot)
        del self._grants[slot]
        # The slot that was unused the longest is the next: a late receiver has most likely gone by
        # then.
        self._free.append(slot)

    def _write(self, slot: int, grant: Grant) -> None:
        self._grants[slot] = grant
        self._region.grant(slot, grant)
