"""Transport `cuda_ipc`: one host, device memory. The receiver maps it, and copies on its device.

The lease table is host shared memory, reached as over `shm`. An event of the holder orders the two
processes: it is recorded after the kernels that fill planes and before the words that report them,
and each pull waits for it on the device. It has not run on hardware: written according to the
documented API, and tested against a fake of it.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from typing import Any, ClassVar
from weakref import WeakSet

import msgspec

from pdserve.transfer.protocol import Memory, Stuck, TransferError, Unreachable
from pdserve.transfer.transports.cuda_ipc.calls import Cuda, gpu, handle_bytes, load, visible
from pdserve.transfer.transports.cuda_ipc.link import CudaIpcLink, CudaIpcWay
from pdserve.transfer.transports.cuda_ipc.mapping import Mapping
from pdserve.transfer.transports.cuda_ipc.memory import export
from pdserve.transfer.transports.shm import ShmTransport

_log = logging.getLogger(__name__)


class CudaIpcTransport:
    """Implements `Transport`.

    Args:
        device: the receiver's device, on which pulls arrive, or which copies to host memory.
        cuda: CUDA to use in place of this process's own.
    """

    name: ClassVar[str] = "cuda_ipc"

    def __init__(self, device: int = 0, cuda: Cuda | None = None) -> None:
        self._device = device
        self._given = cuda
        self._pinned: list[int] = []
        self._to_device = False
        """True if pulls arrive on the device, not only in host memory."""
        self._links: WeakSet[CudaIpcLink] = WeakSet()
        self._exported: tuple[int, Any] | None = None
        """The device, and the event that `written` records on it."""
        self._recording = threading.Lock()

    @property
    def _cuda(self) -> Cuda:
        return self._given or load()

    def register(self, memory: Memory) -> None:
        """Register memory.

        Host memory is pinned, since copies to other memory would not be asynchronous.
        """
        cuda = self._cuda
        if memory.device is not None:
            if memory.device != self._device:
                raise Unreachable(f"{memory} is not on device {self._device}")
            self._to_device = True
            return
        cuda.use(self._device)
        runtime = cuda.runtime
        found = cuda.call("cudaPointerGetAttributes", memory.address).type
        if found == runtime.cudaMemoryType.cudaMemoryTypeUnregistered:
            flags = runtime.cudaHostRegisterPortable
            cuda.call("cudaHostRegister", memory.address, memory.nbytes, flags)
            self._pinned.append(memory.address)

    def offer(self, table: Memory, data: Memory) -> bytes:
        if data.device is None:
            raise Unreachable(f"{data} is host memory, not on a device")
        handle, offset = export(self._cuda, data)
        way = CudaIpcWay(
            table=ShmTransport().offer(table, table),
            device=self._cuda.uuid(data.device),
            memory=handle,
            offset=offset,
            nbytes=data.nbytes,
            event=self._event(data.device),
        )
        return msgspec.msgpack.encode(way)

    def _event(self, device: int) -> bytes:
        cuda, runtime = self._cuda, self._cuda.runtime
        if self._exported is None:
            supported = runtime.cudaDeviceAttr.cudaDevAttrIpcEventSupport
            if not cuda.call("cudaDeviceGetAttribute", supported, device):
                raise Unreachable(f"{gpu(cuda.uuid(device))} has no events between processes")
            cuda.use(device)
            flags = runtime.cudaEventInterprocess | runtime.cudaEventDisableTiming
            self._exported = device, cuda.call("cudaEventCreateWithFlags", flags)
        return handle_bytes(cuda.call("cudaIpcGetEventHandle", self._exported[1]))

    def written(self, stream: int = 0) -> None:
        """Make later pulls wait for the work that `stream` has been given so far.

        Called by a holder.

        Call it after the kernels that fill planes are enqueued, and before a lease's words report
        the planes as filled. There is one event for all leases, and a pull waits for its newest
        record: so call it as kernels end rather than far ahead of them, or the pulls of finished KV
        caches wait for others that are still being computed.

        Args:
            stream: a cudaStream_t as a number (torch: `stream.cuda_stream`); 0: the default one.

        Raises:
            TransferError: the device has failed.
        """
        if self._exported is None:
            return
        device, event = self._exported
        cuda = self._cuda
        cuda.call("cudaSetDevice", device, raising=TransferError)
        # Ordered after the previous record, of whichever stream, so that the newest covers them
        # all.
        with self._recording:
            cuda.call("cudaStreamWaitEvent", stream, event, 0, raising=TransferError)
            cuda.call("cudaEventRecord", event, stream, raising=TransferError)

    def open(self, way: bytes) -> CudaIpcLink:
        try:
            wanted = msgspec.msgpack.decode(way, type=CudaIpcWay)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Unreachable(f"cuda_ipc: {error}") from error
        cuda = self._cuda
        number = cuda.number(wanted.device)
        same = number == self._device
        # A device that CUDA_VISIBLE_DEVICES hides can be opened, but not queried.
        if not (
            number is None or same or cuda.call("cudaDeviceCanAccessPeer", self._device, number)
        ):
            raise Unreachable(f"{self._pair(wanted)}: no peer access between them")
        with ExitStack() as undo:
            table = ShmTransport().open(wanted.table)
            undo.callback(table.close)
            try:
                mapping = Mapping(cuda, self._device, wanted.memory)
                undo.callback(mapping.close)
                detail = "same device" if same else f"peer {gpu(wanted.device)}"
                readable = same and self._to_device
                link = CudaIpcLink(cuda, self._device, table, mapping, wanted, detail, readable)
            except Unreachable as error:
                raise Unreachable(f"{self._pair(wanted)}: {error}") from error
            undo.pop_all()
        self._links.add(link)
        return link

    def _pair(self, wanted: CudaIpcWay) -> str:
        here = gpu(self._cuda.uuid(self._device))
        return f"the holder's memory is on {gpu(wanted.device)}, this is {here} ({visible()})"

    def progress(self) -> None:
        """Do nothing: memory needs no help."""

    def close(self) -> None:
        for link in list(self._links):
            try:
                link.close()
            except Stuck as error:
                _log.error("%s; host memory stays pinned", error)
                self._pinned.clear()
        for address in self._pinned:
            self._cuda.discard("cudaHostUnregister", address)
        self._pinned.clear()
        if self._exported is not None:
            self._cuda.discard("cudaEventDestroy", self._exported[1])
            self._exported = None
