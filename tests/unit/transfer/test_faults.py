"""Leases that end, receivers that die or come late: bounded in time, and nothing leaks."""

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
    Sender,
    Taker,
)

EVERYTHING = 1 << 20
"""Bytes of a sender's arena."""


def room(sender: Sender) -> bool:
    """Whether the whole arena can be had; it is given back at once."""
    leased = sender.lease_manager.allocate(EVERYTHING)
    if leased is None:
        return False
    sender.lease_manager.give_back(leased, 0.0)
    return True


# The holder takes a lease back.


def test_a_lease_that_ends_in_mid_pull_is_noticed(way: str, child: Child) -> None:
    """vllm#21570: freed on a timeout and used again; the decode read another's KV cache.

    TensorRT-LLM#12540, #14565: what is being read is not given to anybody.
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


def test_a_rejected_request_gives_its_range_back_at_once(sender: Sender, taker: Taker) -> None:
    """vllm#41269: decode rejected, prefill held the KV cache for 480 s."""
    offer = sender.offer()
    sender.end(offer, 0.0)
    assert offer.state is State.CACHED
    assert sender.held() == {}
    with pytest.raises(HandleError, match="has ended"):
        taker.take(offer)


def test_an_abort_wins_over_a_prefill_that_has_just_finished(sender: Sender, taker: Taker) -> None:
    """vllm#29906: the handle is under way when the request is cancelled."""
    offer = sender.begin()
    handle = taker.receiver.open(offer.sealed)
    sender.lease_manager.complete(offer.leased, TOKENS, LAYOUT.planes, 7, time.monotonic() + 60)
    sender.end(offer, 0.0)
    with pytest.raises(HandleError, match="has ended"):
        taker.receiver.pull(handle, [(0, TOKENS)])
    assert sender.lease_manager.counts()[State.LEASED] == (0, 0)
    assert sender.held() == {}


def test_leases_expire_without_any_new_work(sender: Sender) -> None:
    """TensorRT-LLM#12313: and then there is room again, for all of the arena."""
    for _ in range(4):
        sender.offer(until=10.0)
    sender.tick(9.9)
    assert len(sender.leases) == 4
    assert not room(sender)
    sender.tick(10.0)
    assert sender.held() == {}
    assert room(sender)


def test_a_lease_that_expires_after_its_pull(sender: Sender, taker: Taker) -> None:
    """It has ended before: there is nothing left to expire."""
    until = time.monotonic() + 60
    offer = sender.offer(until=until)
    taker.take(offer)
    sender.tick(until - 50)
    assert sender.held() == {}
    sender.tick(until)
    assert offer.state is State.CACHED
    taker.check(offer, [(0, TOKENS)])


def test_an_arena_that_is_full_of_what_may_be_read(sender: Sender, taker: Taker) -> None:
    """Room comes back with the readers, and not before."""
    offers = [sender.offer(ROWS) for _ in range(4)]
    pulls = [MidPull(taker.receiver, taker.receiver.open(offer.sealed)) for offer in offers[:3]]
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


# A lease goes on while its receiver does, and ends without it.


class Words:
    """A receiver's words alone, said at moments that the test has chosen."""

    def __init__(self, taker: Taker, offer: Offer) -> None:
        handle = taker.receiver.open(offer.sealed)
        self.lease = RemoteLease(
            taker.receiver.peers.find(handle.epoch).link, handle, LAYOUT.planes
        )
        self.lease.look()
        self.say(Pull.PULLING)

    def say(self, state: Pull) -> None:
        self.lease._beat += 1
        self.lease.say(state)


def test_a_receiver_at_work_keeps_its_lease(sender: Sender, taker: Taker) -> None:
    """Longer than the lease: as long as it shows life, until it says that it is done."""
    offer, now = sender.offer(), 0.0
    offer.leased.range.until = 1.0
    receiver = Words(taker, offer)
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


def test_a_silent_receiver_loses_its_lease(sender: Sender, taker: Taker) -> None:
    """vllm#46283 from the other side: who has gone silent does not hold memory forever."""
    offer, now = sender.offer(), 100.0
    receiver = Words(taker, offer)
    sender.tick(now)
    sender.tick(now + QUIET_S - 0.01)
    assert offer.state is State.IN_TRANSFER
    sender.tick(now + QUIET_S)
    assert offer.state is State.CACHED
    assert sender.held() == {}
    with pytest.raises(HandleError, match="has ended"):
        receiver.lease.look()


def test_quarantine_ends_when_the_receiver_falls_silent(sender: Sender, taker: Taker) -> None:
    """And not sooner: a receiver that shows life may still be reading."""
    offer, now = sender.offer(), 100.0
    receiver = Words(taker, offer)
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
    """In real time: a link so slow that the lease would end five times meanwhile."""
    monkeypatch.setattr(remote, "BEAT_S", 0.02)
    monkeypatch.setattr(lease_manager, "QUIET_S", 0.3)
    sender, taker = Sender("memcpy"), Taker("memcpy", strategy="direct")
    taker.connect(sender)
    assert isinstance(taker.transport, MemcpyTransport)
    offer = sender.offer(until=time.monotonic() + 0.2)
    taker.transport.links[0].nap_s = 0.003
    runs = [(row * 2, 1) for row in range(TOKENS)]  # 300 segments
    pulled: list[float] = []
    pulling = threading.Thread(target=lambda: pulled.append(taker.take(offer, runs).ms))
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
    taker.check(offer, runs)
    sender.tick()
    assert sender.held() == {}
    taker.close()
    sender.close()


def test_a_pull_that_waits_for_staging_shows_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a silent receiver may: other pulls have all of the buffers."""
    monkeypatch.setattr(remote, "BEAT_S", 0.02)
    monkeypatch.setattr(lease_manager, "QUIET_S", 0.3)
    sender, taker = Sender("memcpy"), Taker("memcpy", strategy="whole")
    taker.connect(sender)
    offer, began = sender.offer(until=time.monotonic() + 0.1), time.monotonic()
    with taker.staging.take(2, began + 1):
        pulling = threading.Thread(target=taker.take, args=(offer,))
        pulling.start()
        while time.monotonic() < began + 0.8:
            sender.tick()
            time.sleep(0.01)
        assert offer.state is State.IN_TRANSFER
    pulling.join()
    taker.check(offer, [(0, TOKENS)])
    sender.tick()
    assert sender.held() == {}
    taker.close()
    sender.close()


def test_a_lease_that_ends_beside_a_move_costs_no_other_pull() -> None:
    """A decode that follows a computation: what is cancelled leaves the link to the others."""
    sender, taker = Sender("memcpy"), Taker("memcpy", strategy="whole", rows=2 * ROWS)
    taker.connect(sender)
    assert isinstance(taker.transport, MemcpyTransport)
    [link] = taker.transport.links
    link.nap_s = 0.02
    followed, other = sender.begin(), sender.offer()
    sender.compute(followed, 4)
    failures: list[Exception] = []

    def follow() -> None:
        try:
            taker.take(followed, [(ROWS, TOKENS)])
        except Exception as error:
            failures.append(error)

    link.before = lambda number: sender.end(followed, 0.0) if followed in sender.leased else None
    thread = threading.Thread(target=follow)
    thread.start()
    taker.take(other)
    thread.join()
    assert [type(error) for error in failures] == [HandleError]
    assert "has ended" in str(failures[0])
    assert not link.closed
    assert (taker.pool[:, :TOKENS] == other.whole).all()
    sender.tick(0.0)
    assert sender.held() == {}
    taker.close()
    sender.close()


# A receiver fails.


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
    # The holder goes on, whatever its peer has left behind.
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
    """TensorRT-LLM#12542: one side threw, the other waited forever."""
    sender, taker = Sender(way), Taker(way, strategy="whole")
    taker.connect(sender)
    offer = sender.offer()
    with pytest.raises(ValueError, match="not inside the pool"):
        taker.take(offer, [(ROWS - 1, TOKENS)])
    if way == "shm":
        assert sender.leases.state(offer.slot) is Pull.DONE
        sender.tick()
    else:  # what may still arrive in a buffer costs the link, and the lease ends by silence
        sender.tick(0.0)
        sender.tick(QUIET_S)
    assert offer.state is State.CACHED
    assert sender.held() == {}
    assert taker.staging.free == taker.staging.memory.nbytes
    taker.close()
    sender.close()


def test_a_decode_s_blocks_come_back_when_a_pull_fails(sender: Sender, taker: Taker) -> None:
    """vllm#46283: blocks of an aborted load were never reclaimed."""
    blocks = BlockPool(8, 16)
    table = blocks.allocate(TOKENS)
    assert table is not None
    offer = sender.offer()
    pull = MidPull(taker.receiver, taker.receiver.open(offer.sealed))
    sender.end(offer, 0.0)
    with pytest.raises(HandleError, match="has ended"):
        pull.end()
    blocks.free(table)
    assert blocks.used_blocks == 0
    sender.tick(0.0)
    assert sender.held() == {}


def test_a_late_receiver_does_not_disturb_the_slot_s_next_lease(way: str) -> None:
    """vllm#46289: late signals are ignored."""
    sender, late, prompt = Sender(way), Taker(way), Taker(way)
    late.connect(sender)
    prompt.connect(sender)
    first, now = sender.offer(), time.monotonic()
    pull = MidPull(late.receiver, late.receiver.open(first.sealed))
    sender.end(first, now)
    sender.tick(now)
    sender.tick(now + QUIET_S)
    assert first.state is State.CACHED, "it was waited for for so long"
    for _ in range(4):  # until the slot comes round
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
    for taker in (late, prompt):
        taker.close()
    sender.close()
