"""A receiver's link over CUDA IPC, and the way that leads there. It has not run on hardware."""

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
    """Where the data of a holder is."""

    table: bytes
    """The `shm` way to the lease table: region name and epoch."""
    device: Annotated[bytes, Meta(min_length=UUID_BYTES, max_length=UUID_BYTES)]
    """UUID; its number is another in another process."""
    memory: _Handle
    """Of the allocation that the data is in."""
    offset: Annotated[int, Meta(ge=0)]
    """Of the data in it."""
    nbytes: Annotated[int, Meta(ge=0)]
    event: _Handle


class CudaIpcLink:
    """Implements `Link`.

    Args:
        device: the receiver's.
        table: the lease table, closed with this.
        readable: whether kernels of the receiver may read the holder's memory; see `data`.

    Raises:
        Unreachable: the holder's event cannot be opened, or the device gives no streams.
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
        """The holder's memory, if it is on the device that pulls arrive on.

        `ready` says when it may be read. It stays mapped while its `owner` lives. Of another
        device there is no `data`: a kernel would read it word by word over the bus, where copy
        engines do better, and to torch a tensor is on the device that its memory is on.
        """
        mapping = self._mapping
        if not self._readable or mapping is None:
            return None
        return Memory(self._address, self._nbytes, mapping, self._device)

    def ready(self, deadline: float) -> None:
        """Return when all that the holder's words have said to be filled is written.

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
        # Beyond the allocation is an illegal address, which ends every context of this process.
        if ((offsets < 0) | (sizes < 0) | (offsets > self._nbytes - sizes)).any():
            raise TransferError(f"spans reach beyond the holder's {self._nbytes} bytes")
        base = self._address
        copies = [(base + offset, address, size) for offset, address, size in spans.tolist()]
        return self._lane.begin(copies, deadline)

    def close(self) -> None:
        """Nothing arrives any more when this returns.

        Raises:
            Stuck: a copy does not end; where it arrives must not be used again.
        """
        self._table.close()
        mapping, self._mapping = self._mapping, None
        try:
            self._lane.close()
        except Stuck:
            if mapping is not None:
                mapping.keep()
            raise
