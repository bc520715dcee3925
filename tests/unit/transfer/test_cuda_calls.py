"""Tests for errors of CUDA, and for the fake that raises them against the real cuda-bindings."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pdserve.transfer.protocol import Memory, TransferError, Unreachable
from pdserve.transfer.transports.cuda_ipc import calls
from pdserve.transfer.transports.cuda_ipc.calls import handle_bytes, handle_of, load
from pdserve.transfer.transports.cuda_ipc.link import CudaIpcWay
from pdserve.transfer.transports.cuda_ipc.memory import DeviceMemory
from pdserve.transfer.transports.cuda_ipc.transport import CudaIpcTransport
from tests.fakes import cuda_values
from tests.fakes.cuda_processes import (
    NOTHING,
    OFFSET,
    SIZE,
    A,
    B,
    Holder,
    Pair,
    Process,
    has_gpu,
    held,
    paired,
)
from tests.fakes.cuda_runtime import FakeCuda


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    with held(tmp_path) as made:
        yield made


@pytest.fixture
def pair(tmp_path: Path, holder: Holder) -> Iterator[Pair]:
    with paired(tmp_path, holder) as made:
        yield made


class Clock:
    """A clock that ticks whenever it is asked."""

    def __init__(self, tick_s: float) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self._tick_s = tick_s

    def monotonic(self) -> float:
        self.now += self._tick_s
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.mark.parametrize(("ends_at", "pauses"), [(0.9 * calls.SPIN_S, False), (0.1, True)])
def test_only_a_long_wait_for_the_device_sleeps(
    ends_at: float, pauses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(5e-6)
    monkeypatch.setattr(calls, "time", clock)
    assert calls.until(lambda: clock.now >= ends_at, deadline=1.0)
    assert bool(clock.pauses) == pauses
    assert clock.now < ends_at + 1e-3


def test_a_wait_for_the_device_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(5e-6)
    monkeypatch.setattr(calls, "time", clock)
    assert not calls.until(lambda: False, deadline=0.05)
    assert 0.05 <= clock.now < 0.051


# ------------------------------------------------------------------------------------------- errors


def test_memory_that_cannot_be_exported_is_refused_with_the_reason(holder: Holder) -> None:
    def on_device(kind: str) -> Memory:
        return Memory(holder.fake.allocate(SIZE, kind), SIZE, None, 0)

    host = np.zeros(SIZE, np.uint8)
    refusals = [
        (Memory.of(host), "is host memory, not on a device"),
        (Memory(host.ctypes.data, SIZE, host, 0), "cudaMemoryTypeUnregistered and cannot be"),
        (on_device("managed"), "cudaMemoryTypeManaged and cannot be exported; .*cudaMalloc"),
        (on_device("pool"), "of a pool .cudaMallocAsync;.*what can be is memory of cudaMalloc"),
        (on_device("pages"), "expandable_segments:True.*what can be is memory of cudaMalloc"),
        (Memory(holder.data.address, SIZE, None, 1), "is on device 0"),
        (Memory(holder.data.address, SIZE + 9, None, 0), f"9 bytes beyond its {OFFSET + SIZE}"),
    ]
    for memory, reason in refusals:
        with pytest.raises(Unreachable, match=reason):
            holder.transport.offer(holder.table, memory)
    with pytest.raises(Unreachable, match="is not in shared memory"):
        holder.transport.offer(Memory.of(host), holder.data)
    holder.fake.events_between_processes = False
    with pytest.raises(Unreachable, match=f"GPU-{A} has no events between processes"):
        _ = holder.way
    for base in [r.base for r in holder.fake.ranges.values() if r.kind != "cudaMalloc"]:
        holder.fake.cudaFree(base)


def test_ways_that_lead_nowhere(holder: Holder, tmp_path: Path) -> None:
    transport = Process(tmp_path, A).transport
    good = msgspec.msgpack.decode(holder.way, type=CudaIpcWay)
    ways = {
        "Expected `object`": b"\x01",
        "of another life": msgspec.structs.replace(
            good, table=good.table.replace(bytes(8), b"x" * 8)
        ),
        "No such file": msgspec.structs.replace(good, table=good.table.replace(b"test", b"none")),
        "its holder has ended": msgspec.structs.replace(good, memory=b"x" * 64),
        "length >= 64": msgspec.structs.replace(good, memory=b"x"),
    }
    for reason, way in ways.items():
        with pytest.raises(Unreachable, match=reason):
            transport.open(way if isinstance(way, bytes) else msgspec.msgpack.encode(way))


ERROR = cuda_values.cudaError_t.cudaErrorDevicesUnavailable
DRIVER_ERROR = cuda_values.CUresult.CUDA_ERROR_INVALID_VALUE


@pytest.mark.parametrize(
    "name",
    [
        "cudaSetDevice",
        "cudaPointerGetAttributes",
        "cuPointerGetAttribute",
        "cuMemGetAddressRange",
        "cudaIpcGetMemHandle",
        "cudaGetDeviceProperties",
        "cudaDeviceGetAttribute",
        "cudaEventCreateWithFlags",
        "cudaIpcGetEventHandle",
    ],
)
def test_errors_of_an_offer_have_cuda_s_names(holder: Holder, name: str) -> None:
    error = ERROR if name.startswith("cuda") else DRIVER_ERROR
    holder.fake.fails[name] = error
    with pytest.raises(Unreachable, match=f"{name}: {error.name}"):
        _ = holder.way
    holder.fake.fails.clear()


@pytest.mark.parametrize(
    "name",
    [
        "cudaGetDeviceCount",
        "cudaGetDeviceProperties",
        "cudaDeviceCanAccessPeer",
        "cudaSetDevice",
        "cudaIpcOpenMemHandle",
        "cudaIpcOpenEventHandle",
        "cudaStreamCreateWithFlags",
    ],
)
def test_errors_of_opening_have_cuda_s_names_and_leave_nothing(
    tmp_path: Path, holder: Holder, name: str
) -> None:
    receiver = Process(tmp_path, B, A)
    receiver.fake.fails[name] = ERROR
    with pytest.raises(Unreachable, match=f"{name}: cudaErrorDevicesUnavailable: .*compute mode"):
        receiver.transport.open(holder.way)
    assert receiver.fake.left() == NOTHING


@pytest.mark.parametrize(
    "name",
    [
        "cudaSetDevice",
        "cudaEventCreateWithFlags",
        "cudaStreamWaitEvent",
        "cudaEventRecord",
        "cudaEventQuery",
        "cudaMemcpyAsync",
    ],
)
def test_errors_of_a_pull_have_cuda_s_names(pair: Pair, name: str) -> None:
    go = pair.holder.compute()
    pair.receiver.fake.fails[name] = cuda_values.cudaError_t.cudaErrorIllegalAddress
    pair.holder.finish(go)
    with pytest.raises(TransferError, match=f"{name}: cudaErrorIllegalAddress"):
        pair.pull().wait()
    pair.receiver.fake.fails.clear()


def test_an_error_of_recording_reaches_the_holder(pair: Pair) -> None:
    pair.holder.fake.fails["cudaEventRecord"] = cuda_values.cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(TransferError, match="cudaEventRecord: cudaErrorIllegalAddress"):
        pair.holder.transport.written()
    pair.holder.fake.fails.clear()


# ------------------------------------------------------------------------------------------- memory


def test_host_memory_is_pinned_once_and_until_the_end(tmp_path: Path) -> None:
    receiver = Process(tmp_path, A)
    host = np.zeros(SIZE, np.uint8)
    for _ in range(2):
        receiver.transport.register(Memory.of(host))
    assert receiver.fake.pinned == {host.ctypes.data: SIZE}
    with pytest.raises(Unreachable, match=r"device=1.* is not on device 0"):
        receiver.transport.register(Memory(1, 1, None, 1))
    receiver.transport.close()
    assert receiver.fake.left() == NOTHING


def test_device_memory(tmp_path: Path) -> None:
    receiver = Process(tmp_path, A)
    memory = receiver.memory()
    assert memory.__cuda_array_interface__ == {
        "shape": (SIZE,),
        "typestr": "|u1",
        "data": (memory.address, False),
        "version": 3,
    }
    assert memory.memory.device == 0
    for _ in range(2):
        memory.free()
    assert receiver.fake.left() == NOTHING
    receiver.fake.fails["cudaMalloc"] = cuda_values.cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(Unreachable, match="cudaMalloc: cudaErrorMemoryAllocation"):
        receiver.memory()


# ------------------------------------------------------------------- the fake and the real bindings


def fake_calls() -> dict[str, Callable[..., Any]]:
    return {name: call for name, call in vars(FakeCuda).items() if hasattr(call, "values")}


@pytest.mark.parametrize("name", sorted(fake_calls()))
def test_the_fake_s_calls_are_cuda_s(name: str) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    driver = pytest.importorskip("cuda.bindings.driver")
    real = getattr(runtime if name.startswith("cuda") else driver, name)
    fake = fake_calls()[name]
    assert list(inspect.signature(real).parameters) == list(inspect.signature(fake).parameters)[1:]
    # The values after the error, as the documentation lists them: one line for each call.
    returned = inspect.getdoc(real).split("Returns\n-------\n")[1].split("See Also\n")[0]
    values = [line for line in returned.splitlines() if line and not line.startswith(" ")]
    assert values[0] in ("cudaError_t", "CUresult")
    assert len(values) - 1 == fake.values  # type: ignore[attr-defined]


def test_the_fake_s_values_are_cuda_s() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    driver = pytest.importorskip("cuda.bindings.driver")
    for name, value in vars(FakeCuda).items():
        if isinstance(value, int) and name.startswith("cuda"):
            assert getattr(runtime, name) == value
    for kind in IntEnum.__subclasses__():
        if kind.__module__ == cuda_values.__name__:
            real = getattr(runtime if kind.__name__.startswith("cuda") else driver, kind.__name__)
            for member in kind:
                assert getattr(real, member.name) == member.value
    for handle in (runtime.cudaIpcMemHandle_t, runtime.cudaIpcEventHandle_t):
        data = secrets.token_bytes(64)
        assert handle_bytes(handle_of(handle, data)) == data
    assert len(runtime.cudaDeviceProp().uuid.bytes) == 16
    assert runtime.cudaPointerAttributes().type == runtime.cudaMemoryType(0)


@pytest.mark.skipif(has_gpu(), reason="there is a CUDA device")
def test_without_a_gpu_every_use_says_so() -> None:
    transport = CudaIpcTransport()
    for use in (
        lambda: transport.register(Memory.of(np.zeros(1, np.uint8))),
        lambda: transport.offer(Memory(0, 0, None), Memory(1, 1, None, 0)),
        lambda: DeviceMemory(load(), 1),
    ):
        with pytest.raises(Unreachable, match=r"cudaGetDeviceCount: cudaError|no cuda-bindings"):
            use()
    transport.written()
    transport.close()
