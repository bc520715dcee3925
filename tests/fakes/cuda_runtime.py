"""A fake of what `pdserve.transfer` uses of `cuda.bindings.runtime` and `.driver`, without a GPU.

One `FakeCuda` is one process; those with the same folder are on one machine, in one real process
or in several. Device memory is a file there, mapped at another address by each who opens it: an
IPC handle names the file, so the allocation's base. A device works only when it is asked how far
it is (a query, a synchronise): so nothing is complete by luck. Stricter than CUDA: what CUDA leaves
undefined is an error here; so are opening a handle twice and copying to memory that is not known.
"""
# ruff: noqa: N802, N803, N815 - CUDA's names

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from struct import Struct
from typing import Any
from uuid import UUID

from tests.fakes.cuda_values import (
    CUpointer_attribute,
    CUresult,
    Handle,
    cudaDeviceAttr,
    cudaError_t,
    cudaIpcEventHandle_t,
    cudaIpcMemHandle_t,
    cudaMemcpyKind,
    cudaMemoryType,
)

_COUNTS = Struct("<QQQ")
"""Counts of an event in its file: records enqueued, records done, destroyed by its maker."""


class _Failed(Exception):
    pass


def _fail(name: str) -> None:
    raise _Failed(cudaError_t[name])


def _call(values: int) -> Callable[[Callable[..., Any]], Callable[..., tuple[Any, ...]]]:
    """Make a call that returns (error, value...), and that a test can make fail."""

    def decorate(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        name = function.__name__
        success: IntEnum = cudaError_t(0) if name.startswith("cuda") else CUresult(0)

        @functools.wraps(function)
        def wrapped(self: FakeCuda, *args: Any) -> tuple[Any, ...]:
            with self.lock:
                try:
                    if name in self.fails:
                        raise _Failed(self.fails[name])
                    result = function(self, *args)
                except _Failed as failed:
                    return (failed.args[0], *[None] * values)
            return (success, result)[: 1 + values] if values < 2 else (success, *result)

        wrapped.values = values  # type: ignore[attr-defined]
        return wrapped

    return decorate


@dataclass(eq=False)
class _Range:
    """Memory that this process can name: its own, or opened memory of another process."""

    path: Path
    device: int
    kind: str
    map: mmap.mmap
    exported: Any = None

    def __post_init__(self) -> None:
        self.exported = ctypes.c_char.from_buffer(self.map)
        self.base = ctypes.addressof(self.exported)
        self.nbytes = len(self.map)

    def close(self) -> None:
        self.exported = None
        self.map.close()


@dataclass(eq=False)
class _Event:
    path: Path
    device: int
    flags: int
    mine: bool
    map: mmap.mmap

    def counts(self) -> tuple[int, int, int]:
        return _COUNTS.unpack_from(self.map)

    def change(self, **changes: int) -> None:
        counts = dict(zip(("enqueued", "done", "destroyed"), self.counts(), strict=True))
        _COUNTS.pack_into(self.map, 0, *(counts | changes).values())


@dataclass
class _Stream:
    device: int
    work: deque[Callable[[], bool]] = field(default_factory=deque)
    """Each returns whether it is done; one that is not blocks the rest."""


class FakeCuda:
    """Runtime and driver of one process.

    Args:
        folder: the machine's.
        gpus: UUIDs of those that CUDA_VISIBLE_DEVICES leaves to this process.
        peers: whether GPUs reach each other's memory.
    """

    cudaError_t = cudaError_t
    cudaMemoryType = cudaMemoryType
    cudaMemcpyKind = cudaMemcpyKind
    cudaDeviceAttr = cudaDeviceAttr
    CUpointer_attribute = CUpointer_attribute
    cudaIpcMemHandle_t = cudaIpcMemHandle_t
    cudaIpcEventHandle_t = cudaIpcEventHandle_t
    cudaEventDisableTiming = 2
    cudaEventInterprocess = 4
    cudaStreamNonBlocking = 1
    cudaHostRegisterPortable = 1
    cudaIpcMemLazyEnablePeerAccess = 1

    def __init__(self, folder: Path, gpus: Sequence[UUID], *, peers: bool = True) -> None:
        self.folder = folder
        self.gpus = gpus
        self.peers = peers
        self.fails: dict[str, IntEnum] = {}
        """The error that calls of a name return."""
        self.copying = threading.Event()
        """When cleared, copies do not proceed."""
        self.copying.set()
        self.events_between_processes = True
        self.lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._thread = threading.local()
        self.ranges: dict[int, _Range] = {}
        self.pinned: dict[int, int] = {}
        self.events: dict[int, _Event] = {}
        self.streams: dict[int, _Stream] = {0: _Stream(0)}

    def left(self) -> dict[str, int]:
        """Return the resources that have not been released."""
        mine = sum(r.path.name.startswith(self._prefix(r.device)) for r in self.ranges.values())
        return {
            "allocations": mine,
            "mappings": len(self.ranges) - mine,
            "pinned": len(self.pinned),
            "events": len(self.events),
            "streams": len(self.streams) - 1,
        }

    def allocate(self, nbytes: int, kind: str = "cudaMalloc") -> int:
        """Return memory on the current device; kinds: cudaMalloc, pool, pages, managed."""
        path = self._new(nbytes)
        made = _Range(path, self._device, kind, _mapped(path))
        self.ranges[made.base] = made
        return made.base

    def launch(self, stream: int, address: int, data: bytes, go: threading.Event) -> None:
        """Enqueue a kernel that writes `data` when `go` is set."""

        def work() -> bool:
            if go.is_set():
                ctypes.memmove(address, data, len(data))
            return go.is_set()

        self.streams[stream].work.append(work)

    def read(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    # ------------------------------------------------------------------ devices

    @_call(1)
    def cudaGetDeviceCount(self) -> int:
        return len(self.gpus) or _fail("cudaErrorNoDevice")

    @_call(0)
    def cudaSetDevice(self, device: int) -> None:
        self._check(0 <= device < len(self.gpus), "cudaErrorInvalidDevice")
        self._thread.device = device

    @_call(1)
    def cudaGetDeviceProperties(self, device: int) -> Any:
        @dataclass
        class Named:
            uuid: Any

        return Named(self.gpus[device])

    @_call(1)
    def cudaDeviceGetAttribute(self, attr: cudaDeviceAttr, device: int) -> int:
        return int(self.events_between_processes)

    @_call(1)
    def cudaDeviceCanAccessPeer(self, device: int, peerDevice: int) -> int:
        return int(self.peers)

    # ------------------------------------------------------------------- memory

    @_call(1)
    def cudaMalloc(self, size: int) -> int:
        return self.allocate(size)

    @_call(0)
    def cudaFree(self, devPtr: int) -> None:
        if not devPtr:
            return
        self._check(devPtr in self.ranges, "cudaErrorInvalidValue")
        gone = self.ranges.pop(devPtr)
        gone.close()
        gone.path.unlink()

    @_call(0)
    def cudaHostRegister(self, ptr: int, size: int, flags: int) -> None:
        self.pinned[ptr] = size

    @_call(0)
    def cudaHostUnregister(self, ptr: int) -> None:
        self._check(ptr in self.pinned, "cudaErrorInvalidValue")
        del self.pinned[ptr]

    @_call(1)
    def cudaPointerGetAttributes(self, ptr: int) -> Any:
        @dataclass
        class Attributes:
            type: cudaMemoryType
            device: int

        found = self._range(ptr, 1)
        if found is None:
            pinned = any(p <= ptr < p + n for p, n in self.pinned.items())
            return Attributes(cudaMemoryType(int(pinned)), -2)
        kind = "Managed" if found.kind == "managed" else "Device"
        return Attributes(cudaMemoryType[f"cudaMemoryType{kind}"], found.device)

    @_call(1)
    def cuPointerGetAttribute(self, attribute: CUpointer_attribute, ptr: int) -> Any:
        found = self._range(ptr, 1)
        if found is None:
            raise _Failed(CUresult.CUDA_ERROR_INVALID_VALUE)
        if attribute == CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
            return 7 if found.kind == "pool" else 0
        return found.kind == "cudaMalloc"

    @_call(2)
    def cuMemGetAddressRange(self, dptr: int) -> tuple[int, int]:
        found = self._range(dptr, 1)
        if found is None:
            raise _Failed(CUresult.CUDA_ERROR_INVALID_VALUE)
        return found.base, found.nbytes

    # -------------------------------------------------------------------- IPC

    @_call(1)
    def cudaIpcGetMemHandle(self, devPtr: int) -> cudaIpcMemHandle_t:
        found = self._range(devPtr, 1)
        if found is None or found.kind != "cudaMalloc":
            _fail("cudaErrorInvalidValue")
        return _named(cudaIpcMemHandle_t(), found.path)

    @_call(1)
    def cudaIpcOpenMemHandle(self, handle: cudaIpcMemHandle_t, flags: int) -> int:
        self._check(flags == self.cudaIpcMemLazyEnablePeerAccess, "cudaErrorInvalidValue")
        path = self._path(handle)
        self._check(path.exists(), "cudaErrorInvalidResourceHandle")
        for known in self.ranges.values():
            if known.path == path:
                own = path.name.startswith(self._prefix(known.device))
                _fail("cudaErrorDeviceUninitialized" if own else "cudaErrorAlreadyMapped")
        uuid = UUID(path.name.split("-")[0])
        near = self.gpus[self._device] == uuid
        self._check(near or self.peers, "cudaErrorPeerAccessUnsupported")
        device = self.gpus.index(uuid) if uuid in self.gpus else self._device
        made = _Range(path, device, "mapped", _mapped(path))
        self.ranges[made.base] = made
        return made.base

    @_call(0)
    def cudaIpcCloseMemHandle(self, devPtr: int) -> None:
        known = self.ranges.get(devPtr)
        self._check(known is not None and known.kind == "mapped", "cudaErrorInvalidValue")
        self.ranges.pop(devPtr).close()

    @_call(1)
    def cudaIpcGetEventHandle(self, event: int) -> cudaIpcEventHandle_t:
        known = self._known(event)
        shareable = self.cudaEventInterprocess | self.cudaEventDisableTiming
        self._check(known.flags == shareable, "cudaErrorInvalidResourceHandle")
        return _named(cudaIpcEventHandle_t(), known.path)

    @_call(1)
    def cudaIpcOpenEventHandle(self, handle: cudaIpcEventHandle_t) -> int:
        path = self._path(handle)
        self._check(path.exists(), "cudaErrorMapBufferObjectFailed")
        return self._event(_Event(path, self._device, 0, False, _mapped(path)))

    # ------------------------------------------------------------------ streams

    @_call(1)
    def cudaStreamCreateWithFlags(self, flags: int) -> int:
        self._check(flags == self.cudaStreamNonBlocking, "cudaErrorInvalidValue")
        number = next(self._numbers)
        self.streams[number] = _Stream(self._device)
        return number

    @_call(0)
    def cudaStreamDestroy(self, stream: int) -> None:
        self._check(stream in self.streams, "cudaErrorInvalidResourceHandle")
        del self.streams[stream]

    @_call(0)
    def cudaStreamQuery(self, stream: int) -> None:
        self.work()
        self._check(not self.streams[stream].work, "cudaErrorNotReady")

    @_call(0)
    def cudaStreamSynchronize(self, stream: int) -> None:
        self.work()
        assert not self.streams[stream].work, "this would block"

    @_call(0)
    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        known = self._known(event)
        newest = known.counts()[0]
        self.streams[stream].work.append(lambda: known.counts()[1] >= newest)

    @_call(0)
    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: int
    ) -> None:
        for address in (dst, src):
            pinned = any(p <= address <= p + n - count for p, n in self.pinned.items())
            self._check(pinned or self._range(address, count) is not None, "cudaErrorInvalidValue")

        def work() -> bool:
            if not self.copying.is_set():
                return False
            ctypes.memmove(dst, src, count)
            return True

        self.streams[stream].work.append(work)

    @_call(0)
    def cudaMemsetAsync(
        self,
        devPtr: int,
        value: int,
        count: int,
        stream: int,
    ) -> None:
        self._check(self._range(devPtr, count) is not None, "cudaErrorInvalidValue")
        self.streams[stream].work.append(lambda: bool(ctypes.memset(devPtr, value, count)))

    # ------------------------------------------------------------------- events

    @_call(1)
    def cudaEventCreateWithFlags(self, flags: int) -> int:
        path = self._new(_COUNTS.size)
        return self._event(_Event(path, self._device, flags, True, _mapped(path)))

    @_call(0)
    def cudaEventRecord(self, event: int, stream: int) -> None:
        known, on = self._known(event), self.streams[stream]
        # Stream 0 is that of the current device.
        device = on.device if stream else self._device
        self._check(known.device == device, "cudaErrorInvalidResourceHandle")
        enqueued = known.counts()[0] + 1
        known.change(enqueued=enqueued)

        def work() -> bool:
            known.change(done=enqueued)
            return True

        on.work.append(work)

    @_call(0)
    def cudaEventQuery(self, event: int) -> None:
        known = self._known(event)
        self.work()
        enqueued, done, _ = known.counts()
        self._check(done >= enqueued, "cudaErrorNotReady")

    @_call(0)
    def cudaEventDestroy(self, event: int) -> None:
        known = self.events.pop(event, None)
        if known is None:
            _fail("cudaErrorInvalidResourceHandle")
        if known.mine:
            known.change(destroyed=1)
            known.path.unlink()

    # -------------------------------------------------------------------------

    def work(self) -> None:
        """Let every stream proceed as far as it can."""
        moved = True
        while moved:
            moved = False
            for stream in list(self.streams.values()):
                while stream.work and stream.work[0]():
                    stream.work.popleft()
                    moved = True

    @property
    def _device(self) -> int:
        return getattr(self._thread, "device", 0)

    def _prefix(self, device: int) -> str:
        return f"{self.gpus[device].hex}-{os.getpid():x}-{id(self):x}-"

    def _new(self, nbytes: int) -> Path:
        path = self.folder / f"{self._prefix(self._device)}{next(self._numbers):x}"
        path.write_bytes(bytes(nbytes))
        return path

    def _path(self, handle: Handle) -> Path:
        return self.folder / ctypes.string_at(handle.getPtr(), 64).rstrip(b"\0").decode()

    def _range(self, address: int, nbytes: int) -> _Range | None:
        fits = (r for r in self.ranges.values() if r.base <= address <= r.base + r.nbytes - nbytes)
        return next(fits, None)

    def _event(self, event: _Event) -> int:
        number = next(self._numbers)
        self.events[number] = event
        return number

    def _known(self, event: int) -> _Event:
        known = self.events.get(event)
        if known is None or known.counts()[2]:
            _fail("cudaErrorInvalidResourceHandle")
        return known

    def _check(self, good: bool, otherwise: str) -> None:
        if not good:
            _fail(otherwise)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def _named(handle: Any, path: Path) -> Any:
    ctypes.memmove(handle.getPtr(), path.name.encode(), len(path.name))
    return handle
