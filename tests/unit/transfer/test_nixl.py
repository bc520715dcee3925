"""Tests for the `nixl` transport between this process and real others, over CMA and over TCP."""

from __future__ import annotations

import gc
import importlib.util
import os
import secrets
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from pdserve.transfer.lease.words import RECEIVER_WORD, SLOT_BYTES, pack_word
from pdserve.transfer.protocol import Memory, TransferError, Unreachable
from pdserve.transfer.transports.nixl import agent as nixl_agent
from pdserve.transfer.transports.nixl import transport as nixl
from pdserve.transfer.transports.nixl.asking import AskingLink
from pdserve.transfer.transports.nixl.asks import Hello, Mark, Peek, Push
from pdserve.transfer.transports.nixl.transport import NixlTransport
from tests.unit.nixl_processes import DATA, LIMIT_S, MIB, RECEIVER, SLOTS, Holder, Process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pdserve.transfer.protocol import Link, Spans

if not any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13")):
    pytest.skip("neither nixl-cu12 nor nixl-cu13 is installed", allow_module_level=True)

CMA, TCP = "cma,tcp", "tcp"
both = pytest.mark.parametrize("tls", [CMA, TCP], indirect=True)
over_tcp = pytest.mark.parametrize("tls", [TCP], indirect=True)


@pytest.fixture(scope="module")
def tls(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", request.param)
        yield request.param


@pytest.fixture(scope="module")
def holder(tls: str) -> Iterator[Holder]:
    """Start a holder for many tests, which must survive all of them."""
    holder = Holder()
    yield holder
    try:
        assert holder.alive, f"ended with {holder.process.returncode}"
        assert holder.close() == "closed"
    finally:
        holder.end()


@pytest.fixture
def other(tls: str) -> Iterator[Holder]:
    """Start a holder that a test may kill."""
    holder = Holder()
    yield holder
    holder.end()


@dataclass
class Receiver:
    transport: NixlTransport
    arrival: np.ndarray

    def open(self, holder: Holder) -> Link:
        return self.transport.open(holder.way)

    def span(self, offset: int = 0, nbytes: int = DATA, at: int = 0) -> Spans:
        return np.array([[offset, self.arrival.ctypes.data + at, nbytes]], np.int64)


@pytest.fixture
def receiver(tls: str) -> Iterator[Receiver]:
    arrival = np.zeros(DATA, np.uint8)
    transport = NixlTransport()
    transport.register(Memory.of(arrival))
    yield Receiver(transport, arrival)
    transport.close()


def soon(seconds: float = LIMIT_S) -> float:
    return time.monotonic() + seconds


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    taken = time.monotonic() - began
    assert taken < seconds, f"took {taken:.3f} s"


# ------------------------------------------------------------------------------------- moving bytes


@both
def test_a_contiguous_range_arrives_and_nothing_beside_it(
    holder: Holder, receiver: Receiver
) -> None:
    link = receiver.open(holder)
    link.pull(receiver.span(12345, 10 * MIB + 1, at=777), soon()).wait()
    arrived = receiver.arrival[777 : 777 + 10 * MIB + 1]
    assert np.array_equal(arrived, holder.region.data[12345 : 12345 + 10 * MIB + 1])
    assert not receiver.arrival[:777].any()
    assert not receiver.arrival[777 + 10 * MIB + 1 :].any()


@both
def test_many_ranges_arrive_each_in_its_place(holder: Holder, receiver: Receiver) -> None:
    draw = np.random.default_rng(1)
    sizes = draw.integers(1, 8000, 4000)
    spans = np.empty((len(sizes), 3), np.int64)
    spans[:, 0] = draw.integers(0, DATA - 8000, len(sizes))
    spans[:, 1] = receiver.arrival.ctypes.data + draw.permutation(len(sizes)) * 8192
    spans[:, 2] = sizes
    wanted = np.zeros_like(receiver.arrival)
    for offset, address, size in spans.tolist():
        at = address - receiver.arrival.ctypes.data
        wanted[at : at + size] = holder.region.data[offset : offset + size]
    receiver.open(holder).pull(spans, soon()).wait()
    assert np.array_equal(receiver.arrival, wanted)


@both
def test_slots_are_read_and_words_written(holder: Holder, receiver: Receiver) -> None:
    link = receiver.open(holder)
    for slot in (0, 3, SLOTS - 1):
        word = secrets.randbits(64)
        before = holder.region.peek(slot)
        link.mark(slot, word, soon())
        after = before[:RECEIVER_WORD] + pack_word(word) + before[RECEIVER_WORD + 8 :]
        assert holder.region.peek(slot) == after
        assert link.peek(slot, soon()) == after
    with pytest.raises(TransferError, match=f"no lease slot {SLOTS}; the holder has {SLOTS}"):
        link.peek(SLOTS, soon())
    with pytest.raises(TransferError, match="no lease slot -1"):
        link.mark(-1, 0, soon())
    assert len(link.peek(0, soon())) == SLOT_BYTES, "a wrong number has closed the link"


@both
def test_a_link_says_what_it_runs_over(tls: str, holder: Holder, receiver: Receiver) -> None:
    link = receiver.open(holder)
    assert link.transport == "nixl"
    assert link.data is None
    if tls == TCP:
        assert link.detail.startswith("tcp/")
    else:
        assert link.detail == "cma"


@both
@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(-1, 1), (DATA, 1), (DATA - 1, 2), (0, 0), (0, -1), (1 << 62, 1), (2, (1 << 63) - 1)],
)
def test_what_is_not_the_holder_s_is_refused(
    holder: Holder, receiver: Receiver, offset: int, nbytes: int
) -> None:
    link = receiver.open(holder)
    with pytest.raises(TransferError, match=f"are not in the holder's {DATA}"):
        link.pull(receiver.span(offset, nbytes), soon())
    link.peek(0, soon())


@both
def test_local_memory_that_is_not_registered_is_refused(holder: Holder, receiver: Receiver) -> None:
    link = receiver.open(holder)
    with pytest.raises(TransferError, match="in no registered memory"):
        link.pull(receiver.span(nbytes=2, at=DATA - 1), soon())
    link.peek(0, soon())


@both
def test_threads_share_a_link(holder: Holder, receiver: Receiver) -> None:
    link = receiver.open(holder)
    until, failed = soon(0.7), []

    def pull(number: int) -> None:
        draw = np.random.default_rng(number)
        while time.monotonic() < until:
            size = int(draw.integers(1, 4 * MIB))
            offset = int(draw.integers(0, DATA - size))
            at = number * 8 * MIB
            two = [link.pull(receiver.span(offset, size, at + 4 * MIB * n), soon()) for n in (0, 1)]
            for n, pending in enumerate(two):
                pending.wait()
                arrived = receiver.arrival[at + 4 * MIB * n :][:size]
                assert np.array_equal(arrived, holder.region.data[offset : offset + size])

    def talk(slot: int) -> None:
        word = 0
        while time.monotonic() < until:
            word += 1
            link.mark(slot, word, soon())
            assert link.peek(slot, soon())[RECEIVER_WORD : RECEIVER_WORD + 8] == pack_word(word)

    def guarded(work: object, number: int) -> None:
        try:
            work(number)  # type: ignore[operator]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(pull, n), daemon=True) for n in range(3)]
    threads += [threading.Thread(target=guarded, args=(talk, n), daemon=True) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not failed
    assert not any(thread.is_alive() for thread in threads)


@both
def test_a_waiting_pull_shows_that_it_is_alive(holder: Holder, receiver: Receiver) -> None:
    link = receiver.open(holder)

    def alive() -> None:
        link.mark(1, 7, soon())

    link.pull(receiver.span(), soon()).wait(alive)
    assert np.array_equal(receiver.arrival, holder.region.data)


# ----------------------------------------------------------------------------------------- failures


@over_tcp
def test_a_stopped_holder_is_given_up_and_writes_nothing_later(
    holder: Holder, receiver: Receiver
) -> None:
    """NIXL never reports a stopped peer, and delivers the rest of a pull that was given up."""
    link = receiver.open(holder)
    beside = receiver.open(holder)
    pending = link.pull(receiver.span(), soon(0.4))
    with holder.stopped():
        with within(0.8), pytest.raises(TransferError, match="no answer in"):
            pending.wait()
        with within(0.8), pytest.raises(TransferError, match="no answer in"):
            beside.peek(0, soon(0.2))
        receiver.arrival[:] = 0
    again = receiver.open(holder)
    time.sleep(0.3)
    assert not receiver.arrival.any()
    with pytest.raises(TransferError, match="is closed"):
        link.peek(0, soon())
    again.pull(receiver.span(), soon()).wait()
    assert np.array_equal(receiver.arrival, holder.region.data)


@pytest.mark.parametrize("tls", [CMA], indirect=True)
def test_a_stopped_holder_keeps_nobody_waiting_over_cma(holder: Holder, receiver: Receiver) -> None:
    """Its memory can be read, unless UCX waits for an answer to its own messages."""
    link = receiver.open(holder)
    with holder.stopped(), within(0.8):
        try:
            link.pull(receiver.span(), soon(0.4)).wait()
        except TransferError:
            pass
        else:
            assert np.array_equal(receiver.arrival, holder.region.data)
    receiver.arrival[:] = 0
    time.sleep(0.1)
    assert not receiver.arrival.any()
    receiver.open(holder).pull(receiver.span(), soon()).wait()
    assert np.array_equal(receiver.arrival, holder.region.data)


@both
def test_a_holder_that_does_not_answer_cannot_be_opened(
    holder: Holder, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.open(holder).close()  # the first agent of a process takes longer
    with monkeypatch.context() as patched:
        patched.setattr(nixl, "OPEN_S", 0.3)
        with holder.stopped(), within(1.0), pytest.raises(Unreachable, match="no answer in"):
            receiver.open(holder)
    receiver.open(holder)


@both
def test_a_killed_holder_is_an_error_at_once(tls: str, other: Holder, receiver: Receiver) -> None:
    link = receiver.open(other)
    os.kill(other.pid, signal.SIGSTOP)  # in the middle of the pull, however fast the rest is
    pending = link.pull(receiver.span(), soon()) if tls == TCP else None
    other.process.kill()
    other.process.wait()
    with within(1.0), pytest.raises(TransferError):
        (pending or link.pull(receiver.span(), soon())).wait()
    with pytest.raises(TransferError, match="is closed"):
        link.mark(0, 0, soon())
    with within(nixl.OPEN_S + 1.0), pytest.raises(Unreachable):
        receiver.open(other)


@both
def test_a_link_that_was_closed_in_the_middle_leaves_its_holder_well(
    holder: Holder, receiver: Receiver
) -> None:
    """UCX ends a holder when its receiver leaves during an emulated read (over TCP)."""
    for number in range(12):
        link = receiver.open(holder)
        for offset in (0, DATA // 2):
            link.pull(receiver.span(offset, DATA // 2, at=offset), soon())
        time.sleep(number * 1e-3)
        link.close()
        link.close()
        with pytest.raises(TransferError, match="is closed"):
            link.peek(0, soon())
    assert holder.alive
    receiver.arrival[:] = 0
    receiver.open(holder).pull(receiver.span(), soon()).wait()
    assert np.array_equal(receiver.arrival, holder.region.data)


@both
def test_a_receiver_that_stops_or_dies_in_the_middle_leaves_its_holder_well(
    tls: str, holder: Holder, receiver: Receiver
) -> None:
    link = receiver.open(holder)
    child = Process(RECEIVER, holder.way.hex())
    try:
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        # Longer than the child would have waited: the holder gives it up.
        until = soon(0.8)
        while time.monotonic() < until:
            link.pull(receiver.span(0, MIB), soon(2.0)).wait()
        os.kill(child.pid, signal.SIGCONT)
        assert child.line().startswith("failed: " if tls == TCP else "arrived")
        assert child.line() == "pulling"
        time.sleep(0.1)
        child.process.kill()
        child.process.wait()
        for _ in range(20):
            link.peek(0, soon())
        link.pull(receiver.span(), soon()).wait()
        assert np.array_equal(receiver.arrival, holder.region.data)
    finally:
        child.end()


@both
def test_a_way_that_leads_nowhere_is_refused(
    holder: Holder, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl, "OPEN_S", 0.3)
    way = msgspec.msgpack.decode(holder.way)
    ways = [b"", b"\xc1", holder.way[:-1], holder.way + b"x", msgspec.msgpack.encode({})]
    for metadata in (b"", b"garbage", way["metadata"][:100], way["metadata"][:-5]):
        ways += [msgspec.msgpack.encode(way | {"metadata": metadata})]
    for wrong in ways:
        with within(1.0), pytest.raises(Unreachable, match="nixl: "):
            receiver.transport.open(wrong)
    assert holder.alive


@both
def test_closed_links_leave_nothing_behind(holder: Holder, receiver: Receiver) -> None:
    receiver.open(holder).close()
    gc.collect()  # files that an earlier test has left count, too
    before = len(list(Path("/proc/self/fd").iterdir()))
    at_holder = len(list(Path(f"/proc/{holder.pid}/fd").iterdir()))
    for _ in range(5):
        link = receiver.open(holder)
        link.pull(receiver.span(0, MIB), soon()).wait()
        link.close()
    # the holder looks for receivers that have left when another one comes
    receiver.open(holder).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    deadline = soon(1.0)
    while len(list(Path(f"/proc/{holder.pid}/fd").iterdir())) > at_holder + 4:
        assert time.monotonic() < deadline, "the holder has not released them"
        time.sleep(0.01)


# ---------------------------------------------- requests to a holder, where the network cannot read


@over_tcp
def test_a_holder_checks_what_it_is_asked(holder: Holder, receiver: Receiver) -> None:
    refused: list[tuple[object, str]] = [
        (Peek(1, SLOTS), "no lease slot"),
        (Mark(1, SLOTS, 0), "no lease slot"),
        (Push(1, receiver.span(DATA, 1).tobytes(), None, 1.0), "are not in the holder's"),
        (Push(1, b"odd", None, 1.0), "buffer size must be a multiple"),
        (Push(1, np.array([[0, 4096, 64]]).tobytes(), None, 1.0), "NIXL: "),
    ]
    for ask, message in refused:
        link = receiver.open(holder)
        assert isinstance(link, AskingLink)
        with pytest.raises(TransferError, match=message):
            link._ask(ask, soon(1.0))  # type: ignore[arg-type]


@over_tcp
def test_strangers_get_no_answer(holder: Holder, receiver: Receiver) -> None:
    known = receiver.open(holder)
    way = msgspec.msgpack.decode(holder.way)
    stranger = nixl_agent.Agent()
    peer = stranger.connect(way["metadata"])
    asks = [Peek(1, 0), Hello(2, bytes(16), stranger.metadata()), Hello(3, way["secret"], b"")]
    for note in (b"garbage", *map(msgspec.msgpack.encode, asks)):
        stranger.say(peer, note)
    for _ in range(20):
        known.peek(0, soon())
        assert not stranger.notes()
    stranger.close()
    assert holder.alive
