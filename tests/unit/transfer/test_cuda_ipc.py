"""Tests for CUDA IPC with a fake of cuda-bindings; the last one uses a GPU, if there is one."""

from __future__ import annotations

import gc
import itertools
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from pdserve.transfer.lease.words import Grant
from pdserve.transfer.protocol import Memory, Stuck, TransferError, Unreachable
from pdserve.transfer.transports.cuda_ipc import lane as cuda_lane
from pdserve.transfer.transports.cuda_ipc.calls import load, until
from pdserve.transfer.transports.cuda_ipc.memory import DeviceMemory
from pdserve.transfer.transports.cuda_ipc.transport import CudaIpcTransport
from tests.fakes import cuda_holder
from tests.fakes.cuda_processes import (
    EVENTS,
    NEW,
    NOTHING,
    OLD,
    SIZE,
    A,
    B,
    Holder,
    Pair,
    Process,
    has_gpu,
    held,
    paired,
    soon,
)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    with held(tmp_path) as made:
        yield made


@pytest.fixture
def pair(tmp_path: Path, holder: Holder) -> Iterator[Pair]:
    with paired(tmp_path, holder) as made:
        yield made


def mapped(region_name: str) -> int:
    """Return how often this process has mapped a region."""
    return Path("/proc/self/maps").read_text().count(f"/dev/shm/{region_name}")


# --------------------------------------------------------------------------- what arrives, and when


def test_spans_arrive_in_device_and_in_host_memory(pair: Pair) -> None:
    pair.holder.finish(pair.holder.compute())
    host = np.zeros(SIZE, np.uint8)
    pair.receiver.transport.register(Memory.of(host))
    # The second half first, then the first half in pieces of 1 KiB.
    half, piece = SIZE // 2, 1024
    places = [(half, 0, half), *((n, half + n, piece) for n in range(0, half, piece))]
    for base in (pair.target.address, host.ctypes.data):
        spans = np.array([(offset, base + at, size) for offset, at, size in places], np.int64)
        pair.link.pull(spans, soon()).wait()
    assert pair.arrived == host.tobytes() == NEW[half:] + NEW[:half]
    assert pair.link.detail == "same device"


def test_a_pull_waits_for_what_was_enqueued_before_it(pair: Pair) -> None:
    go = pair.holder.compute()
    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(pair.pull().wait)
        time.sleep(0.05)
        assert not waited.done()
        assert pair.arrived == bytes(SIZE)
        pair.holder.finish(go)
        waited.result(5)
    assert pair.arrived == NEW


def test_a_pull_does_not_wait_for_what_was_enqueued_after_it(pair: Pair) -> None:
    pair.holder.finish(pair.holder.compute())
    pending = pair.pull()
    go = pair.holder.compute(OLD)
    pending.wait()
    assert pair.arrived == NEW
    pair.holder.finish(go)


def test_what_is_waited_for_ends_between_two_looks_at_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One event says both that the source is written and that the copy is done."""
    go = pair.holder.compute()
    query, looks = pair.receiver.fake.cudaEventQuery, itertools.count(1)

    def look(event: int) -> Any:
        found = query(event)
        if next(looks) == 2:
            pair.holder.finish(go)
        return found

    monkeypatch.setattr(pair.receiver.fake, "cudaEventQuery", look)
    pair.pull().wait()
    assert pair.arrived == NEW


def test_recording_in_a_thread_whose_device_is_another(tmp_path: Path) -> None:
    holder = Holder(tmp_path, B, A, device=1)
    try:
        _ = holder.way
        with ThreadPoolExecutor(1) as pool:
            pool.submit(holder.transport.written).result(5)
    finally:
        holder.close()
    assert holder.fake.left() == NOTHING


def test_the_newest_record_covers_every_stream_s(pair: Pair) -> None:
    slow = pair.holder.compute(stream=0)
    quick = pair.holder.compute(b"", stream=1)
    pair.holder.finish(quick)
    with pytest.raises(TransferError, match="not by the deadline"):
        pair.pull(soon(0.05)).wait()
    assert pair.arrived == bytes(SIZE)
    pair.holder.finish(slow)


def test_records_of_two_threads_do_not_pass_each_other(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, both = pair.holder, threading.Barrier(2)
    wait = holder.fake.cudaStreamWaitEvent

    def meet(stream: int, *rest: int) -> Any:
        found = wait(stream, *rest)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.1)
        time.sleep(0.05 * holder.streams.index(stream))
        return found

    monkeypatch.setattr(holder.fake, "cudaStreamWaitEvent", meet)
    with ThreadPoolExecutor(2) as pool:
        slow, quick = pool.map(lambda n: holder.compute(NEW if n == 0 else b"", n), range(2))
    holder.finish(quick)
    with pytest.raises(TransferError, match="not by the deadline"):
        pair.pull(soon(0.05)).wait()
    holder.finish(slow)


def test_while_one_is_waited_for_the_next_is_copied(pair: Pair) -> None:
    pair.holder.finish(pair.holder.compute())
    other = pair.receiver.memory()
    first, second = pair.pull(), pair.link.pull(np.array([[0, other.address, SIZE]]), soon())
    first.wait()
    assert pair.receiver.fake.read(other.address, SIZE) == NEW
    second.wait()
    other.free()


def test_nothing_is_copied_once_a_pull_was_given_up(pair: Pair) -> None:
    """The holder dies or stops before its kernels end, and they end later after all."""
    go = pair.holder.compute()
    began = time.monotonic()
    with pytest.raises(TransferError, match="not by the deadline"):
        pair.pull(soon(0.1)).wait()
    assert 0.1 <= time.monotonic() - began < 1
    pair.holder.finish(go)
    pair.receiver.fake.work()
    assert pair.arrived == bytes(SIZE)
    with pytest.raises(TransferError, match="closed"):
        pair.pull()


def test_a_wait_that_its_caller_breaks_off_copies_nothing(pair: Pair) -> None:
    go = pair.holder.compute()

    def alive() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pair.pull().wait(alive)
    pair.holder.finish(go)
    with pytest.raises(TransferError, match="closed"):
        pair.pull()
    assert pair.arrived == bytes(SIZE)


def test_a_copy_that_does_not_end_is_told_from_one_that_is_late(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_lane, "SETTLE_S", 0.5)
    copying = pair.receiver.fake.copying
    copying.clear()
    pending = pair.pull(soon(0.05))
    timer = threading.Timer(0.1, copying.set)
    timer.start()
    with pytest.raises(TransferError, match="not by the deadline") as late:
        pending.wait()
    assert not isinstance(late.value, Stuck)

    host = np.zeros(SIZE, np.uint8)
    pair.receiver.transport.register(Memory.of(host))
    link = pair.receiver.transport.open(pair.holder.way)
    copying.clear()
    spans = np.array([[0, host.ctypes.data, SIZE]], np.int64)
    for close in (link.pull(spans, soon(0.05)).wait, link.close):
        with pytest.raises(Stuck, match=r"not ended a copy within 0\.5 s"):
            close()
    # It may still be read and written, so it stays mapped and pinned.
    pair.receiver.transport.close()
    del link, pending, close, late
    gc.collect()
    fake = pair.receiver.fake
    assert fake.left() == EVENTS | {"allocations": 1, "pinned": 1, "events": 2}
    copying.set()
    fake.pinned.clear()
    fake.streams = {0: fake.streams[0]}
    fake.events.clear()
    for known in [r for r in fake.ranges.values() if r.kind == "mapped"]:
        fake.cudaIpcCloseMemHandle(known.base)


def test_ready_waits_for_the_holder_and_data_is_its_memory(pair: Pair) -> None:
    go = pair.holder.compute()
    data = pair.link.data
    assert data is not None
    assert data.address != pair.holder.data.address
    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(pair.link.ready, soon())
        time.sleep(0.02)
        assert not ready.done()
        pair.holder.finish(go)
        ready.result(5)
    assert pair.receiver.fake.read(data.address, data.nbytes) == NEW


def test_there_is_no_data_for_a_pool_in_host_memory(tmp_path: Path, holder: Holder) -> None:
    receiver = Process(tmp_path, A)
    receiver.transport.register(Memory.of(np.zeros(SIZE, np.uint8)))
    assert receiver.transport.open(holder.way).data is None
    receiver.transport.close()


def test_data_stays_mapped_while_somebody_has_it(pair: Pair) -> None:
    pair.holder.finish(pair.holder.compute())
    data = pair.link.data
    pair.link.close()
    assert pair.link.data is None
    assert pair.receiver.fake.left()["mappings"] == 1
    assert data is not None
    assert pair.receiver.fake.read(data.address, data.nbytes) == NEW
    del data
    assert pair.receiver.fake.left()["mappings"] == 0


def test_threads_pull_at_once_whatever_their_device(tmp_path: Path, holder: Holder) -> None:
    """A new thread's current device is number 0; here the memory is on number 1."""
    holder.finish(holder.compute())
    receiver = Process(tmp_path, B, A, device=1, peers=False)
    link = receiver.transport.open(holder.way)
    targets = [receiver.memory() for _ in range(8)]

    def pull(target: DeviceMemory) -> bytes:
        for _ in range(20):
            link.pull(np.array([[0, target.address, SIZE]]), soon()).wait()
        return receiver.fake.read(target.address, SIZE)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(pull, targets)) == {NEW}
    assert receiver.fake.left() == EVENTS | {"allocations": 8}
    receiver.transport.close()
    for target in targets:
        target.free()
    assert receiver.fake.left() == NOTHING


@pytest.mark.parametrize("span", [(-1, 1), (0, SIZE + 1), (SIZE - 1, 2), (0, -1), (2**63 - 1, 1)])
def test_spans_beyond_the_data_are_refused(pair: Pair, span: tuple[int, int]) -> None:
    spans = np.array([[0, pair.target.address, 1], [span[0], pair.target.address, span[1]]])
    with pytest.raises(TransferError, match=f"beyond the holder's {SIZE} bytes"):
        pair.link.pull(spans, soon())


# -------------------------------------------------------------------------------------------- links


def test_the_lease_table_is_reached_as_over_shm(pair: Pair) -> None:
    grant = Grant(b"n" * 16, 1.0, filled=3)
    pair.holder.region.grant(2, grant)
    pair.link.mark(2, 0x1234, soon())
    assert pair.link.peek(2, soon())[:28] == grant.pack()[:28]
    assert pair.holder.region.peek(2)[32:40] == (0x1234).to_bytes(8, "little")


def test_closing_twice_and_opening_again(pair: Pair) -> None:
    pair.holder.finish(pair.holder.compute())
    waiting = pair.pull()
    maps = mapped(pair.holder.region.name)
    for _ in range(2):
        pair.link.close()
    assert mapped(pair.holder.region.name) == maps - 1
    with pytest.raises(TransferError, match="closed"):
        waiting.wait()
    assert pair.receiver.fake.left() == NOTHING | {"allocations": 1}
    # Like older drivers, the fake refuses to open a handle twice.
    links = [pair.receiver.transport.open(pair.holder.way) for _ in range(2)]
    links[0].close()
    links[1].pull(pair.spans, soon()).wait()
    assert pair.arrived == NEW


def test_closing_lets_no_copy_go_on(pair: Pair) -> None:
    pair.holder.finish(pair.holder.compute())
    pair.receiver.fake.copying.clear()
    pending = pair.pull()

    def close() -> bytes:
        pair.link.close()
        return pair.arrived

    with ThreadPoolExecutor(3) as pool:
        waited = pool.submit(pending.wait)
        closers = [pool.submit(close) for _ in range(2)]
        assert until(lambda: pair.link._lane._closed, soon())
        pair.receiver.fake.copying.set()
        # Not only the first caller of close may use its memory again.
        assert {closer.result(5) for closer in closers} == {NEW}
        with pytest.raises(TransferError, match="closed"):
            waited.result(5)


# ------------------------------------------------------------------------------------- which device


@pytest.mark.parametrize(
    ("gpus", "device", "detail"),
    [((B, A), 1, "same device"), ((B, A), 0, f"peer GPU-{A}"), ((B,), 0, f"peer GPU-{A}")],
)
def test_a_device_is_told_by_its_uuid_and_may_be_hidden(
    tmp_path: Path, holder: Holder, gpus: tuple[UUID, ...], device: int, detail: str
) -> None:
    holder.finish(holder.compute())
    receiver = Process(tmp_path, *gpus, device=device)
    target = receiver.memory()
    receiver.transport.register(target.memory)
    link = receiver.transport.open(holder.way)
    assert link.detail == detail
    assert (link.data is None) == detail.startswith("peer")
    link.pull(np.array([[0, target.address, SIZE]]), soon()).wait()
    assert receiver.fake.read(target.address, SIZE) == NEW
    link.close()
    target.free()
    assert receiver.fake.left() == NOTHING


@pytest.mark.parametrize(
    ("gpus", "why"), [((B, A), "no peer access"), ((B,), "cudaErrorPeerAccessUnsupported")]
)
def test_devices_that_do_not_reach_each_other_are_both_named(
    tmp_path: Path, holder: Holder, gpus: tuple[UUID, ...], why: str
) -> None:
    receiver = Process(tmp_path, *gpus, peers=False)
    with pytest.raises(Unreachable, match=f"GPU-{A}, this is GPU-{B}.*CUDA_VISIBLE_DEV.*{why}"):
        receiver.transport.open(holder.way)
    assert receiver.fake.left() == NOTHING


def test_a_process_cannot_open_its_own(holder: Holder) -> None:
    with pytest.raises(Unreachable, match="has exported itself"):
        holder.transport.open(holder.way)


@pytest.mark.parametrize("real", [False, True], ids=["fake", "gpu"])
def test_two_processes(tmp_path: Path, real: bool) -> None:
    """The holder exports its memory while its device still writes; the final bytes arrive."""
    if real and not has_gpu():
        pytest.skip("no CUDA device")
    name = f"pdserve-test-{secrets.token_hex(6)}"
    fake = [] if real else [str(tmp_path), str(A)]
    command = [sys.executable, "-m", "tests.fakes.cuda_holder", name, *fake]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=env, **pipes) as process:  # type: ignore[call-overload]
        try:
            way = bytes.fromhex(process.stdout.readline().decode())
            cuda = load() if real else Process(tmp_path, A).cuda
            transport = CudaIpcTransport(cuda=cuda)
            host = np.zeros(cuda_holder.CHUNKS * cuda_holder.CHUNK, np.uint8)
            transport.register(Memory.of(host))
            device = DeviceMemory(cuda, host.nbytes)
            link = transport.open(way)
            assert link.detail == "same device"
            expected = np.repeat(np.arange(cuda_holder.CHUNKS, dtype=np.uint8), cuda_holder.CHUNK)
            link.pull(np.array([[0, host.ctypes.data, host.nbytes]]), soon()).wait()
            assert (host == expected).all()
            link.pull(np.array([[0, device.address, host.nbytes]]), soon()).wait()
            if real:
                import torch

                if torch.cuda.is_available():
                    assert (torch.as_tensor(device, device="cuda").cpu().numpy() == expected).all()
            transport.close()
            device.free()
        finally:
            process.stdin.close()
            if process.wait(20):
                process.kill()
    assert process.returncode == 0
