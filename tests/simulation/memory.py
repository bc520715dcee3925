"""A decode's way to a prefill's memory: mapped, or a network that takes time and may fail.

The memory is real, and so are the words of the leases in it.
"""

from __future__ import annotations

import ctypes
import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pdserve.transfer.consumer.staging import NAP_S, Staging
from pdserve.transfer.lease.remote import BEAT_S
from pdserve.transfer.protocol import Memory, Spans, TransferError
from pdserve.transfer.transports.shm import ShmLink, ShmTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from tests.simulation.loop import Process
    from tests.simulation.threads import Clock


@dataclass
class Network:
    """The network between a decode and the prefills."""

    clock: Clock
    latency_s: float
    """The time that it takes to read a word; 0: the memory is mapped."""
    bytes_per_s: float
    cut: Callable[[str], bool]
    """It returns whether the holder of a region cannot be reached now."""
    alive: Callable[[str], bool]
    """It returns whether the holder of a region is alive."""


class Transport(ShmTransport):
    """A decode's way to all prefills."""

    def __init__(self, process: Process, network: Network) -> None:
        self._process = process
        self._network = network

    def register(self, memory: Memory) -> None:
        """Do nothing."""

    def open(self, way: bytes) -> Link:
        link = Link(super().open(way), self._process, self._network)
        link.check(self._network.clock.monotonic() + BEAT_S)
        return link


class Link(ShmLink):
    """The link to one region."""

    def __init__(self, near: ShmLink, process: Process, network: Network) -> None:
        super().__init__(near._region)
        self._process = process
        self._network = network

    @property
    def data(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        return None if self._network.latency_s else super().data

    def peek(self, slot: int, deadline: float) -> bytes:
        self._reach(deadline)
        return super().peek(slot, deadline)

    def mark(self, slot: int, word: int, deadline: float) -> None:
        self._reach(deadline)
        super().mark(slot, word, deadline)

    def pull(self, spans: Spans, deadline: float) -> _Read:
        self._reach(deadline)
        return _Read(self, spans, deadline)

    def check(self, deadline: float) -> None:
        """Reach the holder. Raises: TransferError: it is gone, or not reached by `deadline`."""
        network, region = self._network, self._region.name
        if not self._process.alive:
            raise TransferError("this process has ended")
        if not network.latency_s:
            return
        while network.cut(region):
            if network.clock.monotonic() >= deadline:
                raise TransferError(f"{region} does not answer")
            network.clock.sleep(NAP_S)
        if not network.alive(region):
            raise TransferError(f"{region} is gone")

    def copy(self, spans: Spans) -> None:
        data = self._region.data
        for offset, address, size in spans.tolist():
            piece = data[offset : offset + size].tobytes()
            assert len(piece) == size, "a read beyond the holder's memory"
            ctypes.memmove(address, piece, size)

    def nap(self, nbytes: int, alive: Callable[[], None], deadline: float) -> None:
        """Wait for as long as these bytes take."""
        clock = self._network.clock
        until = clock.monotonic() + nbytes / self._network.bytes_per_s
        while (left := until - clock.monotonic()) > 0:
            clock.sleep(min(left, BEAT_S / 5))
            self.check(deadline)
            alive()
            if clock.monotonic() > deadline:
                raise TransferError(f"{self._region.name} is too slow")

    def _reach(self, deadline: float) -> None:
        self.check(deadline)
        if self._network.latency_s:
            self._network.clock.sleep(self._network.latency_s)
            self.check(deadline)


class _Read:
    """A read that takes virtual time. It implements `Pending`."""

    def __init__(self, link: Link, spans: Spans, deadline: float) -> None:
        self._link, self._spans, self._deadline = link, spans, deadline

    def wait(self, alive: Callable[[], None] = lambda: None) -> None:
        try:
            self._link.nap(int(self._spans[:, 2].sum()), alive, self._deadline)
            self._link.copy(self._spans)
        except BaseException:
            self._link.close()  # the protocol demands it
            raise


class VirtualStaging(Staging):
    """Staging buffers that are waited for in virtual time."""

    def _one(self, deadline: float, alive: Callable[[], None]) -> NDArray[np.uint8]:
        while True:
            try:
                return self._free.get_nowait()  # type: ignore[return-value]
            except queue.Empty:
                if self._clock.monotonic() >= deadline:
                    raise TransferError("no staging buffer became free in time") from None
                alive()
                self._clock.sleep(NAP_S)
