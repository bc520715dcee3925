"""A receiver's link over CUDA IPC, and the way to its holder. It has not run on hardware."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from pdserve.transfer.protocol import Memory, Pending, Spans, Stuck, TransferError
from pdserve.transfer.transports.cuda_ipc.calls import HANDLE_BYTES, UUID_BYTES, Cuda, handle_of
from pdserve.transfer.transports.cuda_ipc.lane import Lane
from pdserve.transfer.transports.cuda_ipc.mapping import Mapping
from pdserve.transfer.transports.shm import ShmLink

_Handle = Annotated[bytes, Meta(min_length=HANDLE_BYTES, max_length=HANDLE_BYTES)]


class CudaIpcWay(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Location of a holder's data."""

    table: bytes
    """The `shm` way to the lease table: region name and epoch."""
    device: Annotated[bytes, Meta(min_length=UUID_BYTES, max_length=UUID_BYTES)]
    """UUID of the device, whose number differs between processes."""
    memory: _Handle
    """IPC handle of the allocation with the data."""
    offset: Annotated[int, Meta(ge=0)]
    """Offset of the data in the allocation."""
    nbytes: Annotated[int, Meta(ge=0)]
    event: _Handle


class CudaIpcLink:
    """Implements `Link`.

    Args:
        device: the receiver's device.
        table: link to the lease table, closed with this link.
        readable: whether kernels of the receiver may read the holder's memory; see `data`.

    Raises:
        Unreachable: the holder's event cannot be opened, or the device provides no streams.
    """

    transport = "cuda_ipc"

    def __init__(
        self,
        cuda: Cuda,
        device: int,
        table: ShmLink,
        mapping: Mapping,
        way: CudaIpcWay,
        detail: str,
        readable: bool,
    ) -> None:
        self.detail = detail
        self._table = table
        self._mapping: Mapping | None = mapping
        self._address = mapping.address + way.offset
        self._nbytes = way.nbytes
        self._device = device
        self._readable = readable
        cuda.use(device)
        event = cuda.call(
            "cudaIpcOpenEventHandle", handle_of(cuda.runtime.cudaIpcEventHandle_t, way.event)
        )
        self._lane = Lane(cuda, device, event, self.close)

    @property
    def data(self) -> Memory | None:
        """Return the holder's memory, if it is on the device that pulls arrive on.

        `ready` returns when it may be read. It stays mapped while its `owner` lives. For another
        device there is no `data`: a kernel would read it word by word over the bus, where copy
        engines are faster, and torch expects a tensor on the device of its memory.
        """
        mapping = self._mapping
        if not self._readable or mapping is None:
            return None
        return Memory(self._address, self._nbytes, mapping, self._device)

    def ready(self, deadline: float) -> None:
        """Return when all that the holder's words have reported as filled is written.

        Raises:
            TransferError: not by `deadline` (seconds on CLOCK_MONOTONIC); the link is closed.
        """
        self._lane.begin((), deadline).wait()

    def peek(self, slot: int, deadline: float) -> bytes:
        return self._table.peek(slot, deadline)

    def mark(self, slot: int, word: int, deadline: float) -> None:
        self._table.mark(slot, word, deadline)

    def pull(self, spans: Spans, deadline: float) -> Pending:
        offsets, _, sizes = spans.T
        # An address beyond the allocation is illegal, and ends every context of this process.
        if ((offsets < 0) | (sizes < 0) | (offsets > self._nbytes - sizes)).any():
            raise TransferError(f"spans reach beyond the holder's {self._nbytes} bytes")
        base = self._address
        copies = [(base + offset, address, size) for offset, address, size in spans.tolist()]
        return self._lane.begin(copies, deadline)

    def close(self) -> None:
        """Close the link; nothing arrives any more when this returns.

        Raises:
            Stuck: a copy does not end; its destination must not be reused.
        """
        self._table.close()
        mapping, self._mapping = self._mapping, None
        try:
            self._lane.close()
        except Stuck:
            if mapping is not None:
                mapping.keep()
            raise
