"""Tests for leases that end, and receivers that die or are late: bounded, and without leaks."""

from __future__ import annotations

import threading
import time

import pytest

from pdserve.errors import HandleError
from pdserve.kvcache.arena import State
from pdserve.kvcache.block_pool import BlockPool
from pdserve.transfer.lease import remote
from pdserve.transfer.lease.remote import RemoteLease
from pdserve.transfer.lease.words import Pull
from pdserve.transfer.producer import lease_manager
from pdserve.transfer.producer.lease_manager import QUIET_S
from tests.unit.memcpy import MemcpyTransport
from tests.unit.transfers import (
    LAYOUT,
    ROWS,
    TOKENS,
    Child,
    MidPull,
    Offer,
    Puller,
    Sender,
)

EVERYTHING = 1 << 20
"""Bytes of a sender's arena."""


def room(sender: Sender) -> bool:
    """Tell whether the whole arena can be allocated, and free it at once."""
    leased = sender.lease_manager.allocate(EVERYTHING)
    if leased is None:
        return False
    sender.lease_manager.give_back(leased, 0.0)
    return True


# ----------------------------------------------------------------------- the holder cancels a lease


def test_a_lease_that_ends_in_mid_pull_is_noticed(way: str, child: Child) -> None:
    """vllm#21570: a range was freed on a timeout and reused; the decode read another KV cache.

    TensorRT-LLM#12540, #14565: a range that is being read is not given to another prompt.
    """
    sender = Sender(way)
    child.connect(sender)
    offer = sender.offer()
    assert child.begin(offer.sealed) == "pulling"
    sender.end(offer, time.monotonic())
    assert offer.state is State.QUARANTINED
    assert not room(sender)
    assert child.end() == f"HandleError lease {offer.slot} has ended, or is another's"
    sender.tick()
    assert offer.state is State.CACHED
    assert room(sender)
    assert sender.held() == {}
    sender.close()


def test_a_rejected_request_gives_its_range_back_at_once(sender: Sender, puller: Puller) -> None:
    """vllm#41269: the decode had rejected it, and the prefill held the KV cache for 480 s."""
    offer = sender.offer()
    sender.end(offer, 0.0)
    assert offer.state is State.CACHED
    assert sender.held() == {}
    with pytest.raises(HandleError, match="has ended"):
        puller.pull(offer)


def test_an_abort_wins_over_a_prefill_that_has_just_finished(
    sender: Sender, puller: Puller
) -> None:
    """vllm#29906: the handle is under way when the request is cancelled."""
    offer = sender.begin()
    handle = puller.receiver.open(offer.sealed)
    sender.lease_manager.complete(offer.leased, TOKENS, LAYOUT.planes, 7, time.monotonic() + 60)
    sender.end(offer, 0.0)
    with pytest.raises(HandleError, match="has ended"):
        puller.receiver.pull(handle, [(0, TOKENS)])
    assert sender.lease_manager.counts()[State.LEASED] == (0, 0)
    assert sender.held() == {}


def test_leases_expire_without_any_new_work(sender: Sender) -> None:
    """TensorRT-LLM#12313: afterwards the whole arena is free again."""
    for _ in range(4):
        sender.offer(until=10.0)
    sender.tick(9.9)
    assert len(sender.leases) == 4
    assert not room(sender)
    sender.tick(10.0)
    assert sender.held() == {}
    assert room(sender)


def test_a_lease_that_expires_after_its_pull(sender: Sender, puller: Puller) -> None:
    """The lease ended with the pull, so there is nothing left to expire."""
    until = time.monotonic() + 60
    offer = sender.offer(until=until)
    puller.pull(offer)
    sender.tick(until - 50)
    assert sender.held() == {}
    sender.tick(until)
    assert offer.state is State.CACHED
    puller.check(offer, [(0, TOKENS)])


def test_an_arena_that_is_full_of_what_may_be_read(sender: Sender, puller: Puller) -> None:
    """Memory becomes free with the end of the reads, and not before."""
    offers = [sender.offer(ROWS) for _ in range(4)]
    pulls = [MidPull(puller.receiver, puller.receiver.open(offer.sealed)) for offer in offers[:3]]
    now = time.monotonic()
    for offer in offers:
        sender.end(offer, now)
    most = sender.lease_manager.arena.capacity - 3 * offers[0].leased.range.size
    assert sender.lease_manager.allocate(most + 1) is None
    for pull in pulls:
        with pytest.raises(HandleError, match="has ended"):
            pull.end()
    sender.tick(now)
    assert room(sender)
    assert sender.held() == {}


# ------------------------------------------------- a lease lasts as long as its receiver shows life


class ReceiverWords:
    """The words of a receiver, written at moments that the test chooses."""

    def __init__(self, puller: Puller, offer: Offer) -> None:
        handle = puller.receiver.open(offer.sealed)
        self.lease = RemoteLease(
            puller.receiver.peers.find(handle.epoch).link, handle, LAYOUT.planes
        )
        self.lease.look()
        self.say(Pull.PULLING)

    def say(self, state: Pull) -> None:
        self.lease._beat += 1
        self.lease.say(state)


def test_a_receiver_at_work_keeps_its_lease(sender: Sender, puller: Puller) -> None:
    """A receiver that shows life keeps it longer than its time, until it reports the end."""
    offer, now = sender.offer(), 0.0
    offer.leased.range.until = 1.0
    receiver = ReceiverWords(puller, offer)
    for _ in range(10):
        sender.tick(now)
        assert offer.state is State.IN_TRANSFER
        assert offer.leased.range.until == now + QUIET_S
        now += QUIET_S - 0.01
        sender.tick(now)
        assert offer.state is State.IN_TRANSFER
        receiver.say(Pull.PULLING)
    receiver.lease.look()  # it is still its own
    receiver.say(Pull.DONE)
    sender.tick(now)
    assert offer.state is State.CACHED
    assert sender.held() == {}


def test_a_silent_receiver_loses_its_lease(sender: Sender, puller: Puller) -> None:
    """vllm#46283, seen from the other side: a silent receiver does not hold memory for ever."""
    offer, now = sender.offer(), 100.0
    receiver = ReceiverWords(puller, offer)
    sender.tick(now)
    sender.tick(now + QUIET_S - 0.01)
    assert offer.state is State.IN_TRANSFER
    sender.tick(now + QUIET_S)
    assert offer.state is State.CACHED
    assert sender.held() == {}
    with pytest.raises(HandleError, match="has ended"):
        receiver.lease.look()


def test_quarantine_ends_when_the_receiver_falls_silent(sender: Sender, puller: Puller) -> None:
    """It does not end sooner, since a receiver that shows life may still be reading."""
    offer, now = sender.offer(), 100.0
    receiver = ReceiverWords(puller, offer)
    sender.end(offer, now)
    for _ in range(3):
        now += QUIET_S - 0.01
        receiver.say(Pull.PULLING)
        sender.tick(now)
        assert offer.state is State.QUARANTINED
    assert not room(sender)
    sender.tick(now + QUIET_S)
    assert offer.state is State.CACHED
    assert room(sender)


def test_a_pull_that_takes_longer_than_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """In real time, the link is so slow that the lease would end five times meanwhile."""
    monkeypatch.setattr(remote, "BEAT_S", 0.02)
    monkeypatch.setattr(lease_manager, "QUIET_S", 0.3)
    sender, puller = Sender("memcpy"), Puller("memcpy", strategy="direct")
    puller.connect(sender)
    assert isinstance(puller.transport, MemcpyTransport)
    offer = sender.offer(until=time.monotonic() + 0.2)
    puller.transport.links[0].nap_s = 0.003
    runs = [(row * 2, 1) for row in range(TOKENS)]  # 300 segments
    pulled: list[float] = []
    pulling = threading.Thread(
        target=lambda: pulled.append(puller.pull(offer, runs).ms), daemon=True
    )
    pulling.start()
    began, states = time.monotonic(), set()
    while pulling.is_alive():
        sender.tick()
        states.add(offer.state)
        assert time.monotonic() - began < 10
        time.sleep(0.01)
    assert State.IN_TRANSFER in states
    assert State.QUARANTINED not in states
    assert pulled[0] > 900
    puller.check(offer, runs)
    sender.tick()
    assert sender.held() == {}
    puller.close()
    sender.close()


def test_a_pull_that_waits_for_staging_shows_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other pulls use all buffers for longer than a receiver may stay silent."""
    monkeypatch.setattr(remote, "BEAT_S", 0.02)
    monkeypatch.setattr(lease_manager, "QUIET_S", 0.3)
    sender, puller = Sender("memcpy"), Puller("memcpy", strategy="whole")
    puller.connect(sender)
    offer, began = sender.offer(until=time.monotonic() + 0.1), time.monotonic()
    with puller.staging.take(2, began + 1):
        pulling = threading.Thread(target=puller.pull, args=(offer,), daemon=True)
        pulling.start()
        while time.monotonic() < began + 0.8:
            sender.tick()
            time.sleep(0.01)
        assert offer.state is State.IN_TRANSFER
    pulling.join()
    puller.check(offer, [(0, TOKENS)])
    sender.tick()
    assert sender.held() == {}
    puller.close()
    sender.close()


def test_a_lease_that_ends_beside_a_move_costs_no_other_pull() -> None:
    """A cancelled layered transfer leaves the link to the other pulls."""
    sender, puller = Sender("memcpy"), Puller("memcpy", strategy="whole", rows=2 * ROWS)
    puller.connect(sender)
    assert isinstance(puller.transport, MemcpyTransport)
    [link] = puller.transport.links
    link.nap_s = 0.02
    followed, other = sender.begin(), sender.offer()
    sender.compute(followed, 4)
    failures: list[Exception] = []

    def follow() -> None:
        try:
            puller.pull(followed, [(ROWS, TOKENS)])
        except Exception as error:
            failures.append(error)

    link.before = lambda number: sender.end(followed, 0.0) if followed in sender.leased else None
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    puller.pull(other)
    thread.join()
    assert [type(error) for error in failures] == [HandleError]
    assert "has ended" in str(failures[0])
    assert not link.closed
    assert (puller.pool[:, :TOKENS] == other.whole).all()
    sender.tick(0.0)
    assert sender.held() == {}
    puller.close()
    sender.close()


# ------------------------------------------------------------------------------ receivers that fail


def test_a_receiver_killed_in_mid_pull_holds_its_range_for_a_bound(way: str, child: Child) -> None:
    sender = Sender(way)
    victim = Child(way)
    victim.connect(sender)
    offer = sender.offer()
    assert victim.begin(offer.sealed) == "pulling"
    victim.kill()
    now = time.monotonic()
    sender.tick(now)
    sender.tick(now + QUIET_S - 0.1)
    assert offer.state is State.IN_TRANSFER
    sender.tick(now + QUIET_S)
    assert offer.state is State.CACHED
    assert sender.held() == {}
    # The holder keeps serving, whatever the dead receiver has left behind.
    child.connect(sender)
    fresh = sender.offer()
    assert child.pull(fresh.sealed) == fresh.digest
    sender.close()


def test_a_receiver_killed_after_its_pull_holds_nothing(way: str) -> None:
    sender, victim = Sender(way), Child(way)
    victim.connect(sender)
    offer = sender.offer()
    assert victim.pull(offer.sealed) == offer.digest
    victim.kill()
    sender.tick()
    assert offer.state is State.CACHED
    assert sender.held() == {}
    sender.close()


def test_an_error_of_the_receiver_reaches_the_holder(way: str) -> None:
    """TensorRT-LLM#12542: one side raised an error, and the other waited for ever."""
    sender, puller = Sender(way), Puller(way, strategy="whole")
    puller.connect(sender)
    offer = sender.offer()
    with pytest.raises(ValueError, match="not inside the pool"):
        puller.pull(offer, [(ROWS - 1, TOKENS)])
    if way == "shm":
        assert sender.leases.state(offer.slot) is Pull.DONE
        sender.tick()
    else:  # bytes that may still arrive in a buffer cost the link, and the lease ends by silence
        sender.tick(0.0)
        sender.tick(QUIET_S)
    assert offer.state is State.CACHED
    assert sender.held() == {}
    assert puller.staging.free == puller.staging.memory.nbytes
    puller.close()
    sender.close()


def test_a_decode_s_blocks_come_back_when_a_pull_fails(sender: Sender, puller: Puller) -> None:
    """vllm#46283: the blocks of an aborted load were never reclaimed."""
    blocks = BlockPool(8, 16)
    table = blocks.allocate(TOKENS)
    assert table is not None
    offer = sender.offer()
    pull = MidPull(puller.receiver, puller.receiver.open(offer.sealed))
    sender.end(offer, 0.0)
    with pytest.raises(HandleError, match="has ended"):
        pull.end()
    blocks.free(table)
    assert blocks.used_blocks == 0
    sender.tick(0.0)
    assert sender.held() == {}


def test_a_late_receiver_does_not_disturb_the_slot_s_next_lease(way: str) -> None:
    """vllm#46289: late signals are ignored."""
    sender, late, prompt = Sender(way), Puller(way), Puller(way)
    late.connect(sender)
    prompt.connect(sender)
    first, now = sender.offer(), time.monotonic()
    pull = MidPull(late.receiver, late.receiver.open(first.sealed))
    sender.end(first, now)
    sender.tick(now)
    sender.tick(now + QUIET_S)
    assert first.state is State.CACHED, "the range was withheld for this long"
    for _ in range(4):  # until the slot is used again
        second = sender.offer()
        if second.slot == first.slot:
            break
        sender.end(second, now)
    assert second.slot == first.slot
    assert sender.leases.state(second.slot) is Pull.IDLE
    other = MidPull(prompt.receiver, prompt.receiver.open(second.sealed))
    with pytest.raises(HandleError, match=f"lease {first.slot} has ended, or is another's"):
        pull.end()
    assert sender.leases.state(second.slot) is Pull.PULLING
    other.end()
    assert sender.leases.state(second.slot) is Pull.DONE
    prompt.check(second, [(0, TOKENS)])
    for puller in (late, prompt):
        puller.close()
    sender.close()
