"""An in-process link, which copies spans within this process as a network would between two.

It replaces NIXL and CUDA IPC where a test needs thousands of pulls, or one that stops or fails at a
given moment. Nothing arrives before it is waited for. Until then the destination is filled with
`NOT_YET`, so that reading it too early is noticed.
"""

from __future__ import annotations

import ctypes
import secrets
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pdserve.transfer.lease.region import SharedRegion
from pdserve.transfer.lease.words import RECEIVER_WORD, SLOT_BYTES, pack_word
from pdserve.transfer.protocol import Memory, Spans, TransferError, Unreachable

NOT_YET = 0xEE


def _bytes(address: int, nbytes: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


class MemcpyLink:
    """Implements `Link`."""

    transport = "memcpy"
    detail = "in process"
    data = None

    def __init__(self, table: NDArray[np.uint8] | None, source: NDArray[np.uint8]) -> None:
        self.source = source
        self.memories: list[Memory] = []
        """Memory that may be written to; empty: any memory."""
        self.closed = False
        self.nap_s = 0.0
        """A pause before each span."""
        self.bytes_per_s = float("inf")
        self.before: Callable[[int], None] = lambda number: None
        """Called before the span of this number, over all pulls, is copied."""
        self.spans = 0
        self.pulls: list[Spans] = []
        self._table = table

    def ready(self, deadline: float) -> None:
        """Do nothing: stores are seen in order."""

    def peek(self, slot: int, deadline: float) -> bytes:
        self.check(deadline)
        return self._slot(slot).tobytes()

    def mark(self, slot: int, word: int, deadline: float) -> None:
        self.check(deadline)
        self._slot(slot)[RECEIVER_WORD : RECEIVER_WORD + 8] = list(pack_word(word))

    def _slot(self, slot: int) -> NDArray[np.uint8]:
        assert self._table is not None
        return self._table[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]

    def pull(self, spans: Spans, deadline: float) -> _Copy:
        self.check(deadline)
        offsets, addresses, sizes = spans.T
        assert (offsets >= 0).all()
        assert (sizes > 0).all()
        assert (offsets + sizes <= len(self.source)).all()
        for address, size in zip(addresses.tolist(), sizes.tolist(), strict=True):
            assert not self.memories or any(
                memory.address <= address and address + size <= memory.address + memory.nbytes
                for memory in self.memories
            ), "outside of the registered memory"
            _bytes(address, size)[:] = NOT_YET
        self.pulls.append(spans)
        return _Copy(self, spans, deadline)

    def check(self, deadline: float) -> None:
        if self.closed:
            raise TransferError("the link is closed")
        if time.monotonic() > deadline:
            self.close()
            raise TransferError("no answer in time")

    def close(self) -> None:
        self.closed = True


class _Copy:
    """Implements `Pending`."""

    def __init__(self, link: MemcpyLink, spans: Spans, deadline: float) -> None:
        self._link, self._spans, self._deadline = link, spans, deadline

    def wait(self, alive: Callable[[], None] = lambda: None) -> None:
        link = self._link
        try:
            for offset, address, size in self._spans.tolist():
                link.before(link.spans)
                link.spans += 1
                seconds = link.nap_s + size / link.bytes_per_s
                if seconds:
                    time.sleep(seconds)
                alive()
                link.check(self._deadline)
                _bytes(address, size)[:] = link.source[offset : offset + size]
        except BaseException:
            link.close()  # as the protocol says
            raise


class MemcpyTransport:
    """Implements `Transport`."""

    name: ClassVar[str] = "memcpy"
    _offered: ClassVar[dict[bytes, tuple[NDArray[np.uint8], NDArray[np.uint8]]]] = {}
    """A lease table and its data, which stay mapped as long as somebody has these arrays."""

    def __init__(self) -> None:
        self.links: list[MemcpyLink] = []
        self._memories: list[Memory] = []
        self._way = b""

    def register(self, memory: Memory) -> None:
        self._memories.append(memory)

    def offer(self, table: Memory, data: Memory) -> bytes:
        self._way = secrets.token_bytes(8)
        region = table.owner
        assert isinstance(region, SharedRegion)
        array = region.data if data.owner is region else data.owner
        self._offered[self._way] = region.table, array
        return self._way

    def open(self, way: bytes) -> MemcpyLink:
        offered = self._offered.get(way)
        if offered is None:
            raise Unreachable("memcpy: its holder has ended")
        link = MemcpyLink(*offered)
        link.memories = self._memories
        self.links.append(link)
        return link

    def written(self) -> None:
        """Do nothing: stores are seen in order."""

    def progress(self) -> None:
        """Do nothing: no progress is needed."""

    def close(self) -> None:
        for link in self.links:
            link.close()
        self._offered.pop(self._way, None)
