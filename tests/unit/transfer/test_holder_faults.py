"""Holders that die, stand still or restart, and links that fail: bounded, and nothing leaks."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable

import pytest

from pdserve.errors import HandleError
from pdserve.transfer.consumer.peers import NoLink
from pdserve.transfer.lease import remote
from pdserve.transfer.producer.lease_manager import QUIET_S
from pdserve.transfer.protocol import TransferError
from tests.unit.memcpy import MemcpyTransport
from tests.unit.transfers import TOKENS, WAYS, Child, MidPull, Prefill, Sender, Taker, pick


def test_handles_of_a_former_life_are_refused(way: str, child: Child) -> None:
    first = Sender(way)
    child.connect(first)
    used, old = first.offer(), first.offer()
    assert child.pull(used.sealed) == used.digest
    first.close()
    second = Sender(way)
    child.connect(second)
    for offer in (used, old):
        assert child.pull(offer.sealed).startswith(
            f"NoLink there is no link to holder {first.holder.epoch.hex()}"
        )
    fresh = second.offer()
    assert child.pull(fresh.sealed) == fresh.digest
    second.close()


def test_a_restart_in_mid_pull_is_harmless() -> None:
    """What is mapped stays, until its reader has done."""
    first, child = Sender(), Child()
    child.connect(first)
    offer = first.offer()
    assert child.begin(offer.sealed) == "pulling"
    first.close()
    second = Sender()
    second.holder.data[:] = 0
    assert child.end() == offer.digest
    child.kill()
    second.close()


@pytest.mark.parametrize(
    ("over", "when", "stops"),
    [
        *((way, "in mid-transfer", stops) for way in WAYS for stops in (False, True)),
        pytest.param("nixl over tcp", "before the pull", True, marks=pytest.mark.full),
        pytest.param("nixl over tcp", "in mid-pull", False, marks=pytest.mark.full),
    ],
)
def test_a_prefill_that_is_killed_or_stops(
    over: str, when: str, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-LLM#15363, dynamo#13088: an error within a bound, and the decode goes on."""
    way, over_tcp = pick(over, monkeypatch), over == "nixl over tcp"
    monkeypatch.setattr(remote, "WORD_S", 0.5)
    timeout_s, tokens = 0.6, 40_000 if when == "in mid-transfer" else TOKENS
    prefill = Prefill(way, data_bytes=32 << 20)
    taker = Taker(way, rows=tokens, strategy="whole", timeout_s=timeout_s)
    taker.receiver.connect(prefill.endpoint)
    digest, sealed = prefill.offer(tokens)
    handle, transfer = taker.receiver.open(sealed), None

    def end() -> None:
        if stops:
            prefill.signal(signal.SIGSTOP)
        else:
            prefill.kill()

    began = time.monotonic()
    try:
        if when == "before the pull":
            end()
            began = time.monotonic()
            transfer = taker.receiver.pull(handle, [(0, tokens)])
        elif when == "in mid-pull":
            pull = MidPull(taker.receiver, handle)
            end()
            began = time.monotonic()
            transfer = pull.end()
        else:
            watching = threading.Thread(target=_when_something_has_arrived, args=(taker, end))
            watching.start()
            try:
                transfer = taker.receiver.pull(handle, [(0, tokens)])
            finally:
                watching.join()
    except TransferError:
        # Once more the deadline's worth for the words: that it begins, and that it is done.
        assert time.monotonic() - began < timeout_s + 2 * remote.WORD_S + 0.5
        with pytest.raises(NoLink):
            taker.receiver.open(sealed)
        assert way == "nixl"
    # Memory that is mapped, and that of a stopped process, can be read without its help.
    if way == "shm" or (stops and not over_tcp):
        assert transfer is not None
    if over_tcp:
        assert transfer is None
    if transfer is not None:
        assert hashlib.sha256(taker.pool.tobytes()).hexdigest() == digest
    assert taker.staging.free == taker.staging.memory.nbytes
    before = taker.pool.copy()
    if stops:
        prefill.signal(signal.SIGCONT)
        time.sleep(0.1)
        assert (taker.pool == before).all(), "bytes came after the error was told"
        # It lives, and may be connected to again.
        taker.receiver.connect(prefill.endpoint)
        digest, sealed = prefill.offer(TOKENS)
        taker.take(sealed)
        arrived = taker.pool[:, :TOKENS].tobytes()
        assert hashlib.sha256(arrived).hexdigest() == digest
    prefill.kill()
    taker.close()


def _when_something_has_arrived(taker: Taker, end: Callable[[], None]) -> None:
    deadline = time.monotonic() + 5
    while not taker.pool[0, 0, 0]:
        assert time.monotonic() < deadline
        time.sleep(1e-4)
    end()


def test_a_link_that_fails_is_left_and_made_again() -> None:
    sender, taker = Sender("memcpy"), Taker("memcpy")
    taker.connect(sender)
    assert isinstance(taker.transport, MemcpyTransport)
    offer, later = sender.offer(), sender.offer()
    [link] = taker.transport.links

    def fail(number: int) -> None:
        raise TransferError("cable cut")

    link.before = fail
    with pytest.raises(TransferError):
        taker.take(offer)
    assert link.closed
    with pytest.raises(NoLink):
        taker.take(later)
    taker.connect(sender)
    assert len(taker.transport.links) == 2
    with pytest.raises(HandleError, match="was used before"):
        taker.take(offer)
    taker.take(later)
    assert (taker.pool[:, :TOKENS] == later.whole).all()
    now = time.monotonic()
    sender.tick(now)  # nothing was heard of the first since
    sender.tick(now + QUIET_S)
    assert sender.held() == {}
    taker.close()
    sender.close()
