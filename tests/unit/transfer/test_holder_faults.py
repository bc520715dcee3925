"""Tests for holders that die, stop or restart, and links that fail: bounded, and without leaks."""

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
from tests.unit.transfers import TOKENS, WAYS, Child, MidPull, Prefill, Puller, Sender, pick


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
    """Mapped memory stays until its reader is done."""
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
    """TensorRT-LLM#15363, dynamo#13088: there is a timely error, and the decode keeps serving."""
    way, over_tcp = pick(over, monkeypatch), over == "nixl over tcp"
    monkeypatch.setattr(remote, "WORD_S", 0.5)
    timeout_s, tokens = 0.6, 40_000 if when == "in mid-transfer" else TOKENS
    prefill = Prefill(way, data_bytes=32 << 20)
    puller = Puller(way, rows=tokens, strategy="whole", timeout_s=timeout_s)
    puller.receiver.connect(prefill.endpoint)
    digest, sealed = prefill.offer(tokens)
    handle, transfer = puller.receiver.open(sealed), None

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
            transfer = puller.receiver.pull(handle, [(0, tokens)])
        elif when == "in mid-pull":
            pull = MidPull(puller.receiver, handle)
            end()
            began = time.monotonic()
            transfer = pull.end()
        else:
            watching = threading.Thread(
                target=_when_something_has_arrived, args=(puller, end), daemon=True
            )
            watching.start()
            try:
                transfer = puller.receiver.pull(handle, [(0, tokens)])
            finally:
                watching.join()
    except TransferError:
        # One more deadline each for the words that report the beginning and the end.
        assert time.monotonic() - began < timeout_s + 2 * remote.WORD_S + 0.5
        with pytest.raises(NoLink):
            puller.receiver.open(sealed)
        assert way == "nixl"
    # Mapped memory, and that of a stopped process, can be read without its help.
    if way == "shm" or (stops and not over_tcp):
        assert transfer is not None
    if over_tcp:
        assert transfer is None
    if transfer is not None:
        assert hashlib.sha256(puller.pool.tobytes()).hexdigest() == digest
    assert puller.staging.free == puller.staging.memory.nbytes
    before = puller.pool.copy()
    if stops:
        prefill.signal(signal.SIGCONT)
        time.sleep(0.1)
        assert (puller.pool == before).all(), "bytes came after the error had been raised"
        # The holder is alive, and can be connected again.
        puller.receiver.connect(prefill.endpoint)
        digest, sealed = prefill.offer(TOKENS)
        puller.pull(sealed)
        arrived = puller.pool[:, :TOKENS].tobytes()
        assert hashlib.sha256(arrived).hexdigest() == digest
    prefill.kill()
    puller.close()


def _when_something_has_arrived(puller: Puller, end: Callable[[], None]) -> None:
    deadline = time.monotonic() + 5
    while not puller.pool[0, 0, 0]:
        assert time.monotonic() < deadline
        time.sleep(1e-4)
    end()


def test_a_link_that_fails_is_left_and_made_again() -> None:
    sender, puller = Sender("memcpy"), Puller("memcpy")
    puller.connect(sender)
    assert isinstance(puller.transport, MemcpyTransport)
    offer, later = sender.offer(), sender.offer()
    [link] = puller.transport.links

    def fail(number: int) -> None:
        raise TransferError("cable cut")

    link.before = fail
    with pytest.raises(TransferError):
        puller.pull(offer)
    assert link.closed
    with pytest.raises(NoLink):
        puller.pull(later)
    puller.connect(sender)
    assert len(puller.transport.links) == 2
    with pytest.raises(HandleError, match="was used before"):
        puller.pull(offer)
    puller.pull(later)
    assert (puller.pool[:, :TOKENS] == later.whole).all()
    now = time.monotonic()
    sender.tick(now)  # no message about the first one has come since
    sender.tick(now + QUIET_S)
    assert sender.held() == {}
    puller.close()
    sender.close()
