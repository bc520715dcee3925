"""The interface of transports: each reaches, from one process, KV memory that another one holds.

    holder (prefill)                              receiver (decode)
    register(table, data)                         register(staging), register(pool)
    offer() -> way  -- Endpoint, on connect -->   open(way) -> Link, probed
    progress(), in its own loop                   Link.peek, Link.mark: words of the lease table
                                                  Link.pull; Link.data where it is mapped

A way is the transport's own message, opaque to others. Everything after ``open`` is one-sided: the
receiver reads the lease table and the bytes, and writes its own word, without a call by the holder;
see `pdserve.transfer.lease.region` for the words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pdserve.errors import InstanceError

Spans = NDArray[np.int64]
"""The ranges that a pull moves, int64 [n, 3]: offset in the holder's data, local address, bytes."""


class TransferError(InstanceError):
    """Bytes could not be moved: the peer is gone, does not respond, or refuses."""


class Stuck(TransferError):
    """A device has not finished work long after its deadline, and may still write to memory.

    That memory must not be reused; a process whose device does this should end.
    """


class Unreachable(InstanceError):
    """A transport cannot work here, or not with that holder; the message says why."""


@dataclass(frozen=True, eq=False, slots=True)
class Memory:
    """A range of memory that transports may register."""

    address: int
    nbytes: int
    owner: Any = field(repr=False)
    """Object that keeps the memory alive."""
    device: int | None = None
    """Number of its CUDA device; None: host memory."""

    @classmethod
    def of(cls, array: NDArray[np.uint8]) -> Memory:
        """Return the memory of a contiguous host array."""
        return cls(array.ctypes.data, array.nbytes, array)


class Pending(Protocol):
    """A pull that has begun."""

    def wait(self, alive: Callable[[], None] = ...) -> None:
        """Return when every byte has arrived; `alive` is called often meanwhile.

        Raises:
            TransferError: not by the pull's deadline, or the holder is gone. The link is closed
                then, and nothing writes to the local memory any more.
        """


class Link(Protocol):
    """A receiver's connection to one holder. Thread-safe."""

    transport: str
    """Name of the transport."""
    detail: str
    """Underlying transport that UCX has picked, or the device; empty if there is no choice."""

    @property
    def data(self) -> NDArray[np.uint8] | Memory | None:
        """Return the holder's data as this process sees it, read-only.

        None if it is not mapped here.
        """

    def ready(self, deadline: float) -> None:
        """Return when all that the holder's words report as filled can be read from ``data``.

        Raises:
            TransferError: see ``peek``.
        """

    def peek(self, slot: int, deadline: float) -> bytes:
        """Return a lease slot's SLOT_BYTES bytes as they are now.

        Raises:
            TransferError: not by ``deadline`` (seconds on CLOCK_MONOTONIC), or the holder is gone.
        """

    def mark(self, slot: int, word: int, deadline: float) -> None:
        """Write the receiver's word (unsigned, 8 bytes, at RECEIVER_WORD) of a lease slot.

        Raises:
            TransferError: see ``peek``.
        """

    def pull(self, spans: Spans, deadline: float) -> Pending:
        """Begin to copy from the holder's data into registered local memory.

        Several pulls may be in progress at the same time.

        Raises:
            TransferError: see ``peek``.
        """

    def close(self) -> None:
        """Close the link. Pulls over it fail; calling it again is no error."""


class Transport(Protocol):
    """One kind of transport in one process, with its own registrations and connections."""

    name: ClassVar[str]

    def register(self, memory: Memory) -> None:
        """Register memory that pulls may arrive in; called by a receiver.

        Raises:
            Unreachable: this memory cannot be used with this transport.
        """

    def offer(self, table: Memory, data: Memory) -> bytes:
        """Make a lease table and its data reachable, and return the way to them.

        Called by a holder.

        Raises:
            Unreachable: this memory cannot be exported; the message says what could be.
        """

    def open(self, way: bytes) -> Link:
        """Connect to a holder by its way; called by a receiver.

        Raises:
            Unreachable: that holder cannot be reached from here.
        """

    def written(self) -> None:
        """Make what has been written to the data so far visible to later pulls.

        Called by a holder.
        """

    def progress(self) -> None:
        """Let requests of peers make progress.

        Called by a holder, often while a lease is granted.
        """

    def close(self) -> None:
        """Close all links and drop all registrations."""
