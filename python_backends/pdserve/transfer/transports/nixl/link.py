"""The common part of the links over NIXL; see `pdserve.transfer.transports.nixl.transport`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import msgspec

from pdserve.transfer.lease.words import SLOT_BYTES
from pdserve.transfer.protocol import Memory, Spans, TransferError
from pdserve.transfer.transports.nixl import ucx
from pdserve.transfer.transports.nixl.agent import Agent
from pdserve.transfer.transports.nixl.asks import check

Alive = Callable[[], None]


class Way(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    metadata: bytes
    """Metadata of the holder's agent: its name, addresses and memory."""
    table: tuple[int, int]
    """Address and bytes of the lease table."""
    data: tuple[int, int, int | None]
    """Address, bytes and `Memory.device` of the data."""
    secret: bytes


class NixlLink:
    """The common part of the two kinds of link. Any failure ends the link."""

    transport = "nixl"
    data = None
    operation: ClassVar[str]
    """UCX operation by which data arrives."""

    def __init__(self, agent: Agent, peer: str, way: Way, memories: list[Memory]) -> None:
        self.detail = ""
        self._agent = agent
        self._peer = peer
        self._way = way
        self._memories = memories
        self._pulled = False

    @contextmanager
    def _or_close(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _arrival(self, spans: Spans) -> Memory:
        """Return the registered memory that all spans of the holder's data go to."""
        check(spans, self._way.data[1])
        first, last = int(spans[:, 1].min()), int((spans[:, 1] + spans[:, 2]).max())
        for memory in self._memories:
            if memory.address <= first and last <= memory.address + memory.nbytes:
                return memory
        raise TransferError(f"local addresses {first:#x} to {last:#x} are in no registered memory")

    def _slot(self, slot: int) -> int:
        """Return the offset of a lease slot in the table."""
        slots = self._way.table[1] // SLOT_BYTES
        if not 0 <= slot < slots:
            raise TransferError(f"there is no lease slot {slot}; the holder has {slots}")
        return slot * SLOT_BYTES

    def describe(self) -> None:
        self.detail = ucx.picked(self._agent.name, self.operation)

    def arrived(self) -> None:
        """Note that a pull is done.

        The first one shows the data's transport, which for GPUs is separate.
        """
        if not self._pulled:
            self._pulled = True
            self.describe()

    def ready(self, deadline: float) -> None:
        """Do nothing: there is no `data` to wait for."""

    def close(self) -> None:
        """End the agent: nothing writes to this process's memory any more."""
        self._agent.close()


class NixlPull:
    """Implements `Pending`."""

    def __init__(self, link: NixlLink, wait: Callable[[Alive], object]) -> None:
        self._link = link
        self._wait = wait

    def wait(self, alive: Alive = lambda: None) -> None:
        try:
            self._wait(alive)
        except BaseException:
            self._link.close()
            raise
        self._link.arrived()
