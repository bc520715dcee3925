"""Transport `shm`: one host, host memory. The receiver maps the holder's region and reads it."""

from __future__ import annotations

from typing import ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from pdserve.errors import HandleError
from pdserve.transfer.lease.region import SharedRegion
from pdserve.transfer.protocol import Memory, Pending, Spans, TransferError, Unreachable


class _Way(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    region: str
    epoch: bytes


class ShmLink:
    """Implements `Link`; `data` is the holder's own memory, from which the receiver copies."""

    transport = "shm"
    detail = "mapped"

    def __init__(self, region: SharedRegion) -> None:
        self._region = region

    @property
    def data(self) -> NDArray[np.uint8]:
        return self._region.data

    def ready(self, deadline: float) -> None:
        """Do nothing: stores are seen in order, so what the words report is there."""

    def peek(self, slot: int, deadline: float) -> bytes:
        return self._region.peek(slot)

    def mark(self, slot: int, word: int, deadline: float) -> None:
        self._region.mark(slot, word)

    def pull(self, spans: Spans, deadline: float) -> Pending:
        raise TransferError("shared memory is mapped: read `data`")

    def close(self) -> None:
        """Unmap the region; an array made from `data` keeps it mapped."""
        self._region.close()


class ShmTransport:
    """Implements `Transport`."""

    name: ClassVar[str] = "shm"

    def register(self, memory: Memory) -> None:
        """Do nothing: no transport writes to the memory."""

    def offer(self, table: Memory, data: Memory) -> bytes:
        region = data.owner
        if not isinstance(region, SharedRegion):
            raise Unreachable(f"{data} is not in shared memory")
        return msgspec.msgpack.encode(_Way(region.name, region.epoch))

    def open(self, way: bytes) -> ShmLink:
        try:
            wanted = msgspec.msgpack.decode(way, type=_Way)
            region = SharedRegion.open(wanted.region)
        except (msgspec.MsgspecError, UnicodeDecodeError, HandleError) as error:
            raise Unreachable(f"shm: {error}") from error
        if region.epoch != wanted.epoch:
            raise Unreachable("shm: the region is of another life of its holder")
        return ShmLink(region)

    def written(self) -> None:
        """Do nothing: stores are seen in order."""

    def progress(self) -> None:
        """Do nothing: memory needs no help."""

    def close(self) -> None:
        """Do nothing: links are closed by those who opened them."""
