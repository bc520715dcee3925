"""A prefill's end of the transfer plane: its memory, its leases, and how receivers reach them."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence

import msgspec

from pdserve.control.assignment import FIRST
from pdserve.errors import DeploymentError
from pdserve.kvcache.handle import EPOCH_BYTES, KVHandle, seal
from pdserve.supervision import Thread
from pdserve.transfer import arrays
from pdserve.transfer.arrays import Array
from pdserve.transfer.endpoint import Endpoint, Terms, host_id
from pdserve.transfer.lease.region import SharedRegion
from pdserve.transfer.lease.table import LeaseTable
from pdserve.transfer.producer.kv_range import KVRange
from pdserve.transfer.protocol import Memory, Transport, Unreachable

_log = logging.getLogger(__name__)

# While a lease is granted, receivers that depend on this process's progress must not wait for it;
# otherwise only their first contact does.
BUSY_S = 500e-6
IDLE_S = 5e-3
CLOSE_S = 2.0
# Pause after an error of a transport, which may well recur.
PAUSE_S = 1.0


class Holder:
    """The memory of one prefill process.

    Args:
        region_name: name of its shared memory, which holds the lease table.
        transports: transports that are offered the memory.
        data: uint8 [data_bytes] on a device. None: host memory, shared if a transport maps it;
            otherwise private, in huge pages, which CMA reads twice as fast.
        free: gives ``data`` back to its device; called when the memory is removed.

    Raises:
        DeploymentError: the memory cannot be allocated, or no transport can export it.
    """

    def __init__(
        self,
        name: str,
        region_name: str,
        data_bytes: int,
        slots: int,
        terms: Terms,
        transports: Sequence[Transport],
        data: Array | None = None,
        free: Callable[[], None] = lambda: None,
    ) -> None:
        self.epoch = secrets.token_bytes(EPOCH_BYTES)
        shared = data is None and any(transport.name == "shm" for transport in transports)
        in_region = data_bytes if shared else 0
        self.region = SharedRegion.create(region_name, in_region, slots, self.epoch)
        if shared:
            data = self.region.data
        elif data is None:
            data = arrays.aligned((data_bytes,))
        self._free = free
        self.data: Array = data
        """The KV memory, uint8 [data_bytes]."""
        self.leases = LeaseTable(self.region)
        self._terms = terms
        self.token_bytes = terms.sharding.nbytes(terms.layout, 1)
        """Bytes of a token in the data, over all planes and parts."""
        self._transports = transports
        ways = self._offer()
        self._described = Endpoint(
            name=name,
            host=host_id(),
            epoch=self.epoch,
            number=FIRST,
            fingerprint=terms.fingerprint,
            layout=terms.layout,
            slots=slots,
            data_bytes=data_bytes,
            ways=ways,
        )
        self.assign(FIRST)
        self._closing = threading.Event()
        self._thread = Thread(target=self._progress, name="progress", daemon=True)
        # Shared memory needs no progress of its holder.
        if set(ways) - {"shm"}:
            self._thread.start()

    def _offer(self) -> dict[str, bytes]:
        table = self.region.table
        at = Memory(table.ctypes.data, table.nbytes, self.region)
        data = arrays.memory(self.data)
        if self.data is self.region.data:
            data = Memory(data.address, data.nbytes, self.region)
        ways, reasons = {}, []
        for transport in self._transports:
            try:
                ways[transport.name] = transport.offer(at, data)
            except Unreachable as error:
                reasons.append(f"{transport.name}: {error}")
        if not ways:
            self.region.unlink()
            raise DeploymentError(f"the arena can be reached by no transport; {'; '.join(reasons)}")
        return ways

    def kv_range(self, offset: int, nbytes: int) -> KVRange:
        """Return bytes of the data as the KV cache of as many tokens as fit."""
        layout, sharding = self._terms.layout, self._terms.sharding
        tokens = nbytes // self.token_bytes
        return KVRange(self.data[offset : offset + nbytes], layout, sharding, tokens)

    def assign(self, number: int) -> None:
        """Name this assignment of its instance in handles and in the endpoint from now on."""
        self._number = number
        described = msgspec.structs.replace(self._described, number=number)
        self._endpoint = seal(described, self._terms.key)

    @property
    def endpoint(self) -> bytes:
        """Return the sealed `Endpoint` for receivers."""
        return self._endpoint

    def handle(self, offset: int, tokens: int, lease: int, nonce: bytes, expires: float) -> bytes:
        """Return a sealed `KVHandle` of a range of the data."""
        return seal(
            KVHandle(
                fingerprint=self._terms.fingerprint,
                layout=self._terms.layout,
                sharding=self._terms.sharding,
                tokens=tokens,
                epoch=self.epoch,
                number=self._number,
                offset=offset,
                lease=lease,
                nonce=nonce,
                expires=expires,
            ),
            self._terms.key,
        )

    def written(self) -> None:
        """Make what has been written to the data visible to later pulls.

        May be called in a thread.
        """
        for transport in self._transports:
            transport.written()

    def close(self) -> None:
        """Remove the memory.

        Receivers that have mapped it may still read what is leased to them, and keep host memory
        until they close their links. Device memory may not be mapped any more.
        """
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
        for transport in self._transports:
            transport.close()
        self.region.unlink()
        self.region.close()
        self.data = arrays.like(self.data, (0,))
        self._free()

    def _progress(self) -> None:
        while not self._closing.wait(BUSY_S if len(self.leases) else IDLE_S):
            for transport in self._transports:
                try:
                    transport.progress()
                except Exception as error:  # the thread serves every receiver and must not end
                    _log.error("%s makes no progress: %r", transport.name, error)
                    self._closing.wait(PAUSE_S)


def region_name(instance: str) -> str:
    """Return a name for an instance's shared memory, with the launcher's prefix if there is one."""
    prefix = os.environ.get("PDSERVE_SHM_PREFIX", "pdserve")
    return f"{prefix}-{instance}-{secrets.token_hex(8)}".replace("_", "-")
