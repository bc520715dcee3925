"""Holders and receivers on the fake's machine; also tells whether there is a real GPU."""

from __future__ import annotations

import ctypes
import gc
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from pdserve.transfer.lease.region import SharedRegion
from pdserve.transfer.protocol import Memory, Unreachable
from pdserve.transfer.transports.cuda_ipc.calls import Cuda, load
from pdserve.transfer.transports.cuda_ipc.link import CudaIpcLink
from pdserve.transfer.transports.cuda_ipc.memory import DeviceMemory
from pdserve.transfer.transports.cuda_ipc.transport import CudaIpcTransport
from tests.fakes.cuda_runtime import FakeCuda

A, B = UUID(int=0xA), UUID(int=0xB)
SIZE, OFFSET = 1 << 16, 1 << 12
OLD, NEW = b"o" * SIZE, bytes(range(256)) * (SIZE // 256)
NOTHING = {"allocations": 0, "mappings": 0, "pinned": 0, "events": 0, "streams": 0}
EVENTS = {"allocations": 0, "mappings": 1, "pinned": 0, "events": 1, "streams": 2}


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


class Process:
    """A process of the fake's machine, with its transport."""

    def __init__(self, folder: Path, *gpus: UUID, device: int = 0, peers: bool = True) -> None:
        self.fake = FakeCuda(folder, gpus, peers=peers)
        self.cuda = Cuda(self.fake, self.fake)
        self.device = device
        self.transport = CudaIpcTransport(device, self.cuda)

    def memory(self, nbytes: int = SIZE) -> DeviceMemory:
        return DeviceMemory(self.cuda, nbytes, self.device)


class Holder(Process):
    """A holder of `data`, `offset` bytes into an allocation; the way to it is `way`."""

    def __init__(self, folder: Path, *gpus: UUID, **options: Any) -> None:
        super().__init__(folder, *gpus, **options)
        name = f"pdserve-test-{secrets.token_hex(6)}"
        self.region = SharedRegion.create(name, 0, 4, bytes(8))
        self.table = Memory(self.region.table.ctypes.data, self.region.table.nbytes, self.region)
        self.whole = self.memory(OFFSET + SIZE)
        self.data = Memory(self.whole.address + OFFSET, SIZE, self.whole, self.device)
        self.streams = [self.cuda.call("cudaStreamCreateWithFlags", 1) for _ in range(2)]
        ctypes.memmove(self.data.address, OLD, SIZE)

    @property
    def way(self) -> bytes:
        return self.transport.offer(self.table, self.data)

    def compute(self, content: bytes = NEW, stream: int = 0) -> threading.Event:
        """Enqueue a kernel that writes the data; it ends when the event is set."""
        go = threading.Event()
        self.fake.launch(self.streams[stream], self.data.address, content, go)
        self.transport.written(self.streams[stream])
        return go

    def finish(self, go: threading.Event) -> None:
        go.set()
        self.fake.work()

    def close(self) -> None:
        self.transport.close()
        self.region.unlink()
        self.whole.free()
        for stream in self.streams:
            self.cuda.call("cudaStreamDestroy", stream)


@dataclass
class Pair:
    holder: Holder
    receiver: Process
    target: DeviceMemory
    link: CudaIpcLink

    def pull(self, deadline: float | None = None) -> Any:
        return self.link.pull(self.spans, deadline or soon())

    @property
    def spans(self) -> Any:
        return np.array([[0, self.target.address, SIZE]], np.int64)

    @property
    def arrived(self) -> bytes:
        return self.receiver.fake.read(self.target.address, SIZE)


@contextmanager
def held(folder: Path) -> Iterator[Holder]:
    """Make a holder on GPU A of a machine with A and B; check at the end that nothing is left."""
    made = Holder(folder, A, B)
    try:
        yield made
    finally:
        made.close()
    assert made.fake.left() == NOTHING


@contextmanager
def paired(folder: Path, holder: Holder) -> Iterator[Pair]:
    """Make the pair with a receiver on the same GPU; check at the end that nothing is left."""
    receiver = Process(folder, A)
    target = receiver.memory()
    receiver.transport.register(target.memory)
    yield Pair(holder, receiver, target, receiver.transport.open(holder.way))
    receiver.transport.close()
    target.free()
    gc.collect()
    assert receiver.fake.left() == NOTHING


def has_gpu() -> bool:
    try:
        load()
    except Unreachable:
        return False
    return True
