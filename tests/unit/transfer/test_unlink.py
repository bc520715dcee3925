"""Tests for closing the link to a holder that gives its memory back, over every transport."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import pytest

from pdserve.errors import HandleError
from pdserve.kvcache.handle import seal
from pdserve.transfer.consumer import peers
from pdserve.transfer.consumer.peers import NoLink
from pdserve.transfer.consumer.receiver import Receiver
from pdserve.transfer.consumer.staging import Staging
from pdserve.transfer.endpoint import Endpoint, host_id
from pdserve.transfer.protocol import TransferError, Unreachable
from pdserve.transfer.transports.nixl.transport import NixlTransport
from tests.fakes.cuda_processes import NOTHING, SIZE, A, Process, held
from tests.unit.memcpy import MemcpyTransport
from tests.unit.transfers import (
    KEY,
    LAYOUT,
    LIMIT_S,
    ROWS,
    WAYS,
    MidPull,
    Puller,
    Sender,
    pick,
    terms,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.memcpy import MemcpyLink

FIRST = 1


def mapped(sender: Sender) -> int:
    """Return how often this process has mapped the sender's region."""
    name = sender.holder.region.name
    return Path("/proc/self/maps").read_text().count(f"/dev/shm/{name}")


def unlink(puller: Puller, sender: Sender, number: int = FIRST, within_s: float = 1.0) -> None:
    puller.receiver.unlink(sender.holder.epoch, number, within_s)


def unlinking(puller: Puller, sender: Sender) -> threading.Thread:
    thread = threading.Thread(target=unlink, args=(puller, sender, FIRST, LIMIT_S), daemon=True)
    thread.start()
    return thread


def wait(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_the_link_is_left(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = pick(way, monkeypatch)
    sender, other = (Sender(name, instance=one) for one in ("prefill_0", "prefill_1"))
    puller = Puller(name)
    before = mapped(sender)
    for one in (sender, other):
        puller.connect(one)
        puller.pull(one.offer())
    link = puller.receiver.peers.find(sender.holder.epoch).link
    assert (mapped(sender) > before) == (name == "shm")
    offer = sender.offer()
    unlink(puller, sender)
    assert mapped(sender) == before
    assert not puller.receiver.linked("prefill_0")
    with pytest.raises(NoLink):
        puller.receiver.open(offer.sealed)
    if isinstance(puller.transport, NixlTransport):  # the agent has ended, with all it could access
        with pytest.raises(TransferError, match="closed"):
            link.peek(0, time.monotonic() + LIMIT_S)
    puller.pull(other.offer())


def test_it_is_no_error_if_there_is_no_link() -> None:
    sender, puller = Sender(), Puller()
    unlink(puller, sender)
    puller.connect(another := Sender())
    unlink(puller, sender)
    assert puller.receiver.linked("prefill")
    unlink(puller, another)
    unlink(puller, another)
    assert not puller.receiver.linked("prefill")


def test_a_link_to_a_later_assignment_stays() -> None:
    sender, puller = Sender(), Puller()
    sender.holder.assign(3)
    puller.connect(sender)
    unlink(puller, sender, number=2)
    puller.pull(sender.offer())


def test_a_connect_that_comes_late_is_refused_for_a_while() -> None:
    """It would keep the memory; but if the holder serves again, it is connected again."""
    sender, puller = Sender(), Puller()
    unlink(puller, sender)
    with pytest.raises(Unreachable, match=r"prefill was unlinked, .* again for 30 s"):
        puller.connect(sender)
    assert mapped(sender) == 2, "the holder's own, of its table and of its data"
    sender.holder.assign(2)
    puller.connect(sender)
    unlink(puller, sender, number=2)
    later = time.monotonic() + peers.UNLINKED_S + 1
    with mock.patch.object(puller.receiver.peers, "_clock", mock.Mock(monotonic=lambda: later)):
        puller.connect(sender)


def test_pulls_in_progress_end_first() -> None:
    sender, puller = Sender(), Puller()
    puller.connect(sender)
    offer, waiting = sender.offer(), sender.offer()
    pull = MidPull(puller.receiver, puller.receiver.open(offer.sealed))
    thread = unlinking(puller, sender)
    wait(lambda: not puller.receiver.linked("prefill"))
    with pytest.raises(NoLink):
        puller.pull(waiting)
    assert thread.is_alive()
    pull.end()
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    puller.check(offer, [(0, 50)])
    assert mapped(sender) == 2


@pytest.mark.parametrize("name", ["shm", "memcpy"])
def test_a_pull_that_does_not_end_fails_within_a_bound(name: str) -> None:
    sender, puller = Sender(name), Puller(name)
    puller.connect(sender)
    offer = sender.begin()
    handle, failed = puller.receiver.open(offer.sealed), list[Exception]()

    def follow() -> None:  # of a prefill that computes no more
        try:
            puller.receiver.pull(handle, [(0, handle.tokens)])
        except (HandleError, TransferError) as error:
            failed.append(error)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    wait(lambda: puller.receiver.peers.find(handle.epoch).pulls == 1)
    began = time.monotonic()
    unlink(puller, sender, within_s=0.2)
    thread.join(LIMIT_S)
    assert 0.2 <= time.monotonic() - began < 2
    assert len(failed) == 1


def test_a_link_that_is_being_made_is_closed_again() -> None:
    sender, puller = Sender("memcpy"), Puller("memcpy")
    transport = puller.transport
    assert isinstance(transport, MemcpyTransport)
    opened = transport.open

    def late(way: bytes) -> MemcpyLink:
        unlink(puller, sender)
        return opened(way)

    with (
        mock.patch.object(transport, "open", late),
        pytest.raises(Unreachable, match="was unlinked"),
    ):
        puller.connect(sender)
    assert [link.closed for link in transport.links] == [True]
    assert not puller.receiver.linked("prefill")


def test_the_handle_of_cuda_ipc_is_closed(tmp_path: Path) -> None:
    with held(tmp_path) as holder:
        receiver = Process(tmp_path, A)
        pool, staging = (np.zeros(shape, np.uint8) for shape in (LAYOUT.shape(ROWS), (2, 4096)))
        made = Receiver(terms(), [receiver.transport], pool, Staging(staging))
        described = Endpoint(
            name="prefill",
            host=host_id(),
            epoch=bytes(8),
            number=FIRST,
            fingerprint="tiny",
            layout=LAYOUT,
            slots=4,
            data_bytes=SIZE,
            ways={"cuda_ipc": holder.way},
        )
        holder.finish(holder.compute())
        made.connect(seal(described, KEY))
        assert receiver.fake.left()["mappings"] == 1
        made.unlink(bytes(8), FIRST, 1.0)
        gc.collect()
        assert receiver.fake.left() == NOTHING | {"pinned": 2}, "its own memory, for other links"
        made.close()
        assert receiver.fake.left() == NOTHING
