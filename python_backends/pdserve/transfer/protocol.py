"""What a transport is: a way from one process to KV memory that another one holds.

    holder (prefill)                              receiver (decode)
    register(table, data)                         register(staging), register(pool)
    offer() -> way  -- Endpoint, on connect -->   open(way) -> Link, probed
    progress(), in its own loop                   Link.peek, Link.mark: words of the lease table
                                                  Link.pull; Link.data where it is mapped

A way is the transport's own message, opaque to everybody else. Everything after ``open`` is
one-sided: the receiver reads the lease table and the bytes, and writes its own word, without a
call of the holder's; see `pdserve.transfer.lease.region` for the words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pdserve.errors import InstanceError

Spans = NDArray[np.int64]
"""What a pull moves, int64 [n, 3]: offset in the holder's data, local address, bytes."""


class TransferError(InstanceError):
    """Bytes could not be moved: the peer is gone, stands still, or refuses."""


class Stuck(TransferError):
    """A device has not finished work long after its deadline, and may still write to memory.

    That memory must not be used again; a process whose device does this had better end.
    """


class Unreachable(InstanceError):
    """A transport cannot work here, or not with that holder; the message says why."""


@dataclass(frozen=True, eq=False, slots=True)
class Memory:
    """A range of memory that transports may register."""

    address: int
    nbytes: int
    owner: Any = field(repr=False)
    """What keeps it alive."""
    device: int | None = None
    """Number of the CUDA device that it is on; None: host memory."""

    @classmethod
    def of(cls, array: NDArray[np.uint8]) -> Memory:
        """A contiguous host array."""
        return cls(array.ctypes.data, array.nbytes, array)


class Pending(Protocol):
    """A pull that has begun."""

    def wait(self, alive: Callable[[], None] = ...) -> None:
        """Return when every byte is there; `alive` is called often meanwhile.

        Raises:
            TransferError: not by the pull's deadline, or the holder is gone. The link is closed
                then, and nothing writes to the local memory any more.
        """


class Link(Protocol):
    """A receiver's way to one holder. Thread-safe."""

    transport: str
    """Name of the transport."""
    detail: str
    """What it runs over: the transport that UCX picked, the device; empty if there is no choice."""

    @property
    def data(self) -> NDArray[np.uint8] | Memory | None:
        """The holder's data as this process sees it, read-only; None if it is not mapped here."""

    def ready(self, deadline: float) -> None:
        """Return when all that the holder's words say is filled can be read from ``data``.

        Raises:
            TransferError: as ``peek``.
        """

    def peek(self, slot: int, deadline: float) -> bytes:
        """A lease slot's SLOT_BYTES as they are now.

        Raises:
            TransferError: not by ``deadline`` (seconds on CLOCK_MONOTONIC), or the holder is gone.
        """

    def mark(self, slot: int, word: int, deadline: float) -> None:
        """Write the receiver's word (unsigned, 8 bytes, at RECEIVER_WORD) of a lease slot.

        Raises:
            TransferError: as ``peek``.
        """

    def pull(self, spans: Spans, deadline: float) -> Pending:
        """Begin to copy from the holder's data into registered local memory.

        Several pulls may be under way at once.

        Raises:
            TransferError: as ``peek``.
        """

    def close(self) -> None:
        """Let go of the holder. What is being pulled over it fails; again is no error."""


class Transport(Protocol):
    """One kind of way, in one process; its own registrations and connections."""

    name: ClassVar[str]

    def register(self, memory: Memory) -> None:
        """Receiver: memory that pulls may arrive in.

        Raises:
            Unreachable: this memory cannot be used with this transport.
        """

    def offer(self, table: Memory, data: Memory) -> bytes:
        """Holder: make a lease table and its data reachable; the way to them.

        Raises:
            Unreachable: this memory cannot be exported; the message says what would.
        """

    def open(self, way: bytes) -> Link:
        """Receiver: connect.

        Raises:
            Unreachable: not from here, or not that holder.
        """

    def written(self) -> None:
        """Holder: what has been written to the data so far is to be seen by pulls from now on."""

    def progress(self) -> None:
        """Holder: let peers' requests move; called often while a lease is on."""

    def close(self) -> None:
        """Let go of every registration and link."""
