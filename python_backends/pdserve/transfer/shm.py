"""KV hand-off between two processes of one host: the decode copies out of the prefill's memory.

    prefill (holder)                                decode (receiver)
    fills a range of its SharedRegion
    Leases.grant  ->  slot, nonce  -- KVHandle -->  ShmReceiver.pull: validates, marks PULLING
                                                      scatter into its paged pool
    Leases.state: DONE            <-- lease word --   validates again, marks DONE
    Leases.revoke, Leases.free

Neither side waits for the other. A holder that takes a lease back in mid-pull is noticed by the
receiver's second validation, and what was copied is discarded; a receiver that dies in mid-pull
stays PULLING, and the holder waits for its own bound only.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict, deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from pdserve.errors import HandleError, Unavailable
from pdserve.kvcache.handle import NONCE_BYTES
from pdserve.transfer.region import Pull, SharedRegion

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from pdserve.kvcache.handle import KVHandle
    from pdserve.kvcache.layout import KVLayout

__all__ = ["Leases", "Pull", "SharedRegion", "ShmReceiver", "scatter"]


class Leases:
    """The holder's side of a region's lease table. A slot is granted, revoked, then freed.

    Between revoking and freeing, the holder waits for a receiver that is PULLING (bounded by
    itself), since neither the range nor the slot may be used again under its eyes.
    """

    def __init__(self, region: SharedRegion) -> None:
        self._region = region
        self._free = deque(range(region.slots))
        self._nonces: dict[int, bytes] = {}

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._nonces)

    def grant(self, expires: float) -> tuple[int, bytes]:
        """A slot, and the nonce that opens it until `expires` (seconds on CLOCK_MONOTONIC).

        Raises:
            Unavailable: every slot is in use.
        """
        if not self._free:
            raise Unavailable(f"all {self._region.slots} lease slots are in use")
        slot = self._free.popleft()
        nonce = self._nonces[slot] = secrets.token_bytes(NONCE_BYTES)
        self._region.grant(slot, nonce, expires)
        return slot, nonce

    def revoke(self, slot: int) -> Pull:
        """End a lease; what its receiver was doing at that moment. Again is no error."""
        nonce = self._nonces[slot]
        self._region.revoke(slot)
        return self._region.pull(slot, nonce)

    def state(self, slot: int) -> Pull:
        """What the receiver of a granted or revoked lease is doing."""
        return self._region.pull(slot, self._nonces[slot])

    def free(self, slot: int) -> None:
        """Make a slot available to the next lease."""
        self.revoke(slot)
        del self._nonces[slot]
        # The longest unused slot is the next: a late receiver has most likely gone by then.
        self._free.append(slot)


class ShmReceiver:
    """The receiver's side, for one model; keeps at most `mappings` regions mapped. Thread-safe."""

    def __init__(self, fingerprint: str, layout: KVLayout, mappings: int = 16) -> None:
        self._fingerprint = fingerprint
        self._layout = layout
        self._mappings = mappings
        self._regions: OrderedDict[str, SharedRegion] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def pull(self, handle: KVHandle, now: float) -> Iterator[NDArray[np.uint8]]:
        """Read a KV cache: read-only uint8 [layers * 2, tokens, row_bytes], to be copied within.

        `now` in seconds on CLOCK_MONOTONIC. A handle is good for one pull, however that ends.

        Raises:
            HandleError: on entry, the handle is not good (the message says why); on exit, the
                lease ended while the block ran, and what it copied must be discarded.
        """
        handle.check(self._fingerprint, self._layout, now)
        region = self._region(handle.region)
        _check(region, handle, now)
        region.begin(handle.lease, handle.nonce)
        try:
            source = region.data[handle.offset : handle.offset + handle.nbytes]
            yield source.reshape(handle.layout.shape(handle.tokens))
            # Before DONE is said: from then on the holder may revoke.
            if region.epoch != handle.epoch or not region.holds(handle.lease, handle.nonce):
                raise HandleError("lease ended during the transfer; what was copied is not valid")
        finally:
            region.finish(handle.lease, handle.nonce)

    def close(self) -> None:
        """Unmap every region."""
        with self._lock:
            self._regions.clear()

    def _region(self, name: str) -> SharedRegion:
        """The region that has this name now, mapped."""
        with self._lock:
            region = self._regions.pop(name, None)
            # A mapping outlives the file; one of the holder's former life must not be read.
            if region is None or not region.named():
                region = SharedRegion.open(name)
            self._regions[name] = region
            # Dropped, not closed: another thread may be in a pull, and unmaps it by leaving.
            while len(self._regions) > self._mappings:
                self._regions.popitem(last=False)
            return region


def scatter(
    source: NDArray[np.uint8], pool: NDArray[np.uint8], runs: Sequence[tuple[int, int]]
) -> None:
    """Copy uint8 [layers * 2, tokens, row_bytes] into runs of pool [layers * 2, rows, row_bytes].

    `runs` are (first row, rows), together as many rows as there are tokens; the GIL is released.

    Raises:
        ValueError: the runs do not match the source, or are not inside the pool.
    """
    tokens, limit = source.shape[1], pool.shape[1]
    for first, rows in runs:
        # A slice beyond the end would be cut short without a word.
        if first < 0 or rows < 1 or first + rows > limit:
            raise ValueError(f"run {(first, rows)} is not inside the pool's {limit} rows")
    if sum(rows for _, rows in runs) != tokens:
        raise ValueError(f"runs {list(runs)} do not have {tokens} rows")
    start = 0
    for first, rows in runs:
        np.copyto(pool[:, first : first + rows], source[:, start : start + rows])
        start += rows


def _check(region: SharedRegion, handle: KVHandle, now: float) -> None:
    """Make sure that a handle is for this region, and its lease on and unused."""
    if region.epoch != handle.epoch:
        raise HandleError(f"KV handle is of an earlier life of the holder of {region.name}")
    if handle.lease >= region.slots:
        raise HandleError(
            f"KV handle names lease slot {handle.lease}; {region.name} has {region.slots}"
        )
    if handle.offset + handle.nbytes > len(region.data):
        raise HandleError(
            f"KV handle ends at byte {handle.offset + handle.nbytes}; "
            f"{region.name} has {len(region.data)}"
        )
    if not region.holds(handle.lease, handle.nonce):
        raise HandleError(f"lease {handle.lease} of {region.name} has ended, or is another's")
    if not now < region.expires(handle.lease):
        raise HandleError(f"lease {handle.lease} of {region.name} has expired")
    if region.pull(handle.lease, handle.nonce) is not Pull.IDLE:
        raise HandleError(f"KV handle was used before: lease {handle.lease} of {region.name}")
