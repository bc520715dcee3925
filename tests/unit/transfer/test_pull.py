"""Tests for a pull: its checks, its bytes, its report; in two processes, over each transport."""

from __future__ import annotations

import math
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec
import pytest

from pdserve.errors import HandleError
from pdserve.kvcache.arena import State
from pdserve.kvcache.handle import KVHandle, seal, unseal
from pdserve.kvcache.layout import KVLayout
from pdserve.kvcache.sharding import Sharding
from pdserve.transfer.consumer.peers import NoLink
from pdserve.transfer.endpoint import Endpoint
from pdserve.transfer.lease.words import Pull
from pdserve.transfer.producer import holder as holders
from tests.unit.transfers import (
    KEY,
    LAYOUT,
    MODEL,
    ROWS,
    TOKENS,
    Child,
    Offer,
    Puller,
    Sender,
    terms,
)

if TYPE_CHECKING:
    from pdserve.transfer.consumer.cost_model import Strategy

FORGED = 10_000


# ---------------------------------------------------------------------------- between two processes


def test_contents_are_equal_and_the_lease_ends(way: str, child: Child) -> None:
    sender = Sender(way)
    detail = child.connect(sender)
    if way == "nixl":
        assert detail.startswith("tcp") == (os.environ.get("UCX_TLS") == "tcp")
    for _ in range(6):  # more than there are slots or ranges
        offer = sender.offer()
        assert sender.leases.state(offer.slot) is Pull.IDLE
        assert child.begin(offer.sealed) == "pulling"
        assert sender.leases.state(offer.slot) is Pull.PULLING
        assert child.end() == offer.digest
        assert sender.leases.state(offer.slot) is Pull.DONE
        sender.tick()
        assert offer.state is State.CACHED
    assert sender.held() == {}
    sender.close()


def test_a_used_handle_is_refused(way: str, child: Child) -> None:
    sender, puller = Sender(way), Puller(way)
    child.connect(sender)
    puller.connect(sender)
    offer = sender.offer()
    assert child.begin(offer.sealed) == "pulling"
    with pytest.raises(HandleError, match=f"was used before: lease {offer.slot}"):
        puller.pull(offer)
    assert child.end() == offer.digest
    assert child.pull(offer.sealed).startswith("HandleError KV handle was used before")
    assert not puller.pool.any()
    puller.close()
    sender.close()


# ------------------------------------------------------------------------------------------ reports


@pytest.mark.parametrize("strategy", ["whole", "direct"])
def test_what_is_told_of_a_pull(way: str, strategy: Strategy) -> None:
    sender, puller = Sender(way), Puller(way, strategy=strategy)
    puller.connect(sender)
    offer, runs = sender.offer(), [(70, 20), (3, 30)]
    transfer = puller.pull(offer, runs)
    puller.check(offer, runs)
    assert transfer.nbytes == LAYOUT.nbytes(TOKENS)
    assert transfer.transport == way
    # Mapped memory is copied once, whatever strategy is asked for.
    assert transfer.strategy == ("whole" if way == "shm" else strategy)
    assert transfer.token == 7
    assert 0 < transfer.exposed_ms == transfer.ms < 1000
    assert 0 < transfer.expected_ms < 1000
    puller.close()
    sender.close()


@pytest.mark.parametrize("strategy", ["whole", "direct"])
def test_only_the_missing_tail_is_moved(way: str, strategy: Strategy) -> None:
    """The pool has a prefix of the prompt already."""
    sender = Sender(way, slots=8)
    puller = Puller(way, strategy=strategy, piece_bytes=2048)
    puller.connect(sender)
    for first in (1, 16, TOKENS - 1):
        offer, tail = sender.offer(), TOKENS - first
        puller.pool[:] = 0
        runs = [(60, tail // 2), (7, tail - tail // 2)] if tail > 1 else [(7, 1)]
        transfer = puller.pull(offer, runs, first)
        assert transfer.nbytes == LAYOUT.nbytes(tail)
        puller.check(offer, runs, first)
    puller.close()
    sender.close()


@pytest.mark.parametrize("strategy", ["whole", "direct"])
@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(70, 20), (3, 29)], "runs of 49 rows do not have 50 rows"),
        ([(70, 20), (3, 31)], "runs of 51 rows do not have 50 rows"),
        ([(3, 20), (ROWS - 29, 30)], f"not inside the pool's {ROWS} rows"),
    ],
)
def test_rows_that_are_not_this_request_s_are_not_written(
    way: str, strategy: Strategy, runs: list[tuple[int, int]], message: str
) -> None:
    sender, puller = Sender(way), Puller(way, strategy=strategy)
    puller.connect(sender)
    offer = sender.offer()
    with pytest.raises(ValueError, match=message):
        puller.pull(offer, runs)
    assert not puller.pool.any()
    assert sender.leases.state(offer.slot) is Pull.DONE
    puller.close()
    sender.close()


def test_pulls_at_once_do_not_mix(way: str) -> None:
    """There are more pulls than staging buffers, over one link."""
    sender, puller = Sender(way, slots=16), Puller(way, rows=16 * TOKENS)
    puller.connect(sender)
    offers = [sender.offer() for _ in range(16)]
    with ThreadPoolExecutor(6) as threads:
        transfers = list(
            threads.map(lambda n: puller.pull(offers[n], [(n * TOKENS, TOKENS)]), range(16))
        )
    assert {one.nbytes for one in transfers} == {LAYOUT.nbytes(TOKENS)}
    for number, offer in enumerate(offers):
        assert (puller.pool[:, number * TOKENS : (number + 1) * TOKENS] == offer.whole).all()
        assert sender.leases.state(offer.slot) is Pull.DONE
    puller.close()
    sender.close()


# ----------------------------------------------------------------------------------- layer by layer


def test_planes_are_taken_as_they_are_filled(way: str) -> None:
    """No plane is taken before that: one that is not filled yet is zero."""
    sender, puller = Sender(way), Puller(way)
    puller.connect(sender)
    offer = sender.begin()

    def compute() -> None:
        for planes in range(2, LAYOUT.planes + 1, 2):
            time.sleep(0.05)
            sender.compute(offer, planes)
        sender.lease_manager.complete(
            offer.leased, TOKENS, LAYOUT.planes, 331, time.monotonic() + 60
        )

    computing = threading.Thread(target=compute, daemon=True)
    computing.start()
    transfer = puller.pull(offer)
    computing.join()
    puller.check(offer, [(0, TOKENS)])
    assert (transfer.strategy, transfer.token) == ("layered", 331)
    assert transfer.ms > 140
    assert transfer.exposed_ms < 70
    puller.close()
    sender.close()


def test_the_first_token_is_waited_for(sender: Sender, puller: Puller) -> None:
    offer = sender.begin()
    sender.compute(offer, LAYOUT.planes)
    later = threading.Timer(0.05, sender.leases.fill, (offer.slot, LAYOUT.planes, 9))
    later.start()
    assert puller.pull(offer).token == 9
    later.join()
    puller.check(offer, [(0, TOKENS)])


def test_planes_that_are_never_filled(sender: Sender) -> None:
    """TensorRT-LLM#15363, dynamo#13088: no wait is unbounded."""
    puller = Puller(timeout_s=0.2)
    puller.connect(sender)
    offer, began = sender.begin(), time.monotonic()
    sender.compute(offer, 2)
    with pytest.raises(HandleError, match="only 2 of 6 planes were computed in time"):
        puller.pull(offer)
    assert 0.2 < time.monotonic() - began < 1
    assert sender.leases.state(offer.slot) is Pull.DONE
    puller.close()


def test_a_computation_that_is_given_up(sender: Sender, puller: Puller) -> None:
    offer, began = sender.begin(), time.monotonic()
    sender.compute(offer, 4)
    later = threading.Timer(0.05, sender.end, (offer, began))
    later.start()
    with pytest.raises(HandleError, match=f"lease {offer.slot} has ended"):
        puller.pull(offer)
    assert time.monotonic() - began < 0.5
    later.join()
    assert offer.state is State.QUARANTINED
    sender.tick(began)
    assert offer.state is State.FREE, "it was never filled"
    assert sender.held() == {}


# ------------------------------------------------------ mismatches, which leave the lease untouched


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fingerprint": "other"}, "of model 'other'; this instance has 'tiny'"),
        ({"layout": KVLayout(3, 2, 8, "float16")}, "float16.*this instance has.*float32"),
        ({"sharding": Sharding(2, 1)}, "has .*ranks=2.* expects .*ranks=1"),
        ({"lease": 4}, "names lease slot 4; prefill has 4"),
        ({"offset": (1 << 20) - 1}, "ends at byte 1067775; prefill has 1048576"),
        ({"tokens": 1 << 24}, "ends at byte .*; prefill has 1048576"),
        ({"expires": 1.0}, r"KV handle expired \d+\.\d{3} s ago"),
        ({"nonce": b"x" * 16}, "lease 1 has ended, or is another's"),
        ({"nonce": bytes(16)}, "lease 1 has ended, or is another's"),
        ({"lease": 0}, "lease 0 has ended, or is another's"),
        ({"lease": 3, "nonce": bytes(16)}, "lease 3 has ended, or is another's"),
    ],
)
def test_what_does_not_match_is_named(
    sender: Sender, puller: Puller, fields: dict[str, object], message: str
) -> None:
    """tensorrtllm_backend#653, sglang#15674: one clear error each, and not a hang."""
    sender.offer()
    offer = sender.offer()
    with pytest.raises(HandleError, match=message):
        puller.pull(sender.forge(offer, **fields))
    assert not puller.pool.any()
    assert sender.leases.state(offer.slot) is Pull.IDLE
    puller.pull(offer)
    puller.check(offer, [(0, TOKENS)])


def test_a_holder_without_link(sender: Sender, puller: Puller) -> None:
    offer = sender.offer()
    with pytest.raises(NoLink, match="no link to holder 0000000000000000"):
        puller.pull(sender.forge(offer, epoch=bytes(8)))
    with pytest.raises(NoLink):
        Puller().pull(offer)
    puller.pull(offer)


def test_a_handle_of_an_earlier_version(sender: Sender, puller: Puller) -> None:
    handle = unseal(sender.offer().sealed, KVHandle, KEY)
    fields = msgspec.structs.asdict(handle) | {"version": 1}
    old = msgspec.defstruct("KVHandle", [(name, object) for name in fields])(**fields)
    with pytest.raises(HandleError, match=r"KVHandle .* is malformed: .*\$\.version"):
        puller.pull(seal(old, KEY))


def test_a_lease_that_has_expired(sender: Sender, puller: Puller) -> None:
    """The lease table decides, whatever the handle says; a wrong time has no effect."""
    offer = sender.offer(until=time.monotonic() + 0.05)
    handle = puller.receiver.open(sender.forge(offer, expires=1e9))
    puller.receiver.open(offer.sealed)
    time.sleep(0.06)
    with pytest.raises(HandleError, match=r"KV handle expired 0\.0\d\d s ago"):
        puller.receiver.open(offer.sealed)
    for expires in (time.monotonic(), math.nan):
        sender.leases.extend(offer.slot, expires)
        with pytest.raises(HandleError, match=f"lease {offer.slot} expired"):
            puller.receiver.pull(handle, [(0, TOKENS)])
    assert sender.leases.state(offer.slot) is Pull.IDLE
    sender.leases.extend(offer.slot, time.monotonic() + 60)
    puller.receiver.pull(handle, [(0, TOKENS)])
    puller.check(offer, [(0, TOKENS)])


def test_a_holder_with_a_clock_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks of other hosts differ, so the lease table alone decides."""
    monkeypatch.setattr(holders, "host_id", lambda: "another host")
    sender, puller = Sender(), Puller()
    puller.connect(sender)
    offer = sender.offer(until=0.0)
    puller.pull(offer)
    puller.check(offer, [(0, TOKENS)])
    ended = sender.offer(until=0.0)
    sender.leases.revoke(ended.slot)
    with pytest.raises(HandleError, match="has ended"):
        puller.pull(ended)
    puller.close()
    sender.close()


# ------------------------------------------------------------- forged, truncated, altered, replayed


class Forger:
    """Makes invalid handles out of valid ones."""

    def __init__(self, sender: Sender, offer: Offer) -> None:
        self.rng = random.Random(0)
        self.sender, self.offer = sender, offer
        self.used: list[bytes] = []
        """Handles that have been used."""

    def altered(self, sealed: bytes) -> bytes:
        kind = self.rng.randrange(5)
        if kind == 0:
            return sealed[: self.rng.randrange(len(sealed))]
        if kind == 1:
            return self.rng.randbytes(self.rng.randrange(400))
        if kind == 2:
            return sealed + self.rng.randbytes(self.rng.randrange(1, 9))
        if kind == 3:
            return self.rng.randbytes(16) + sealed[16:]
        flipped = bytearray(sealed)
        for bit in self.rng.sample(range(len(sealed) * 8), self.rng.randrange(1, 5)):
            flipped[bit // 8] ^= 1 << bit % 8
        return bytes(flipped)

    def handle(self) -> bytes:
        rng, offer = self.rng, self.offer
        kind = rng.randrange(9)
        if kind == 0:
            return rng.choice(self.used)
        if kind == 1:
            return seal(unseal(offer.sealed, KVHandle, KEY), rng.randbytes(32))
        if kind == 2:
            return self.sender.forge(offer, epoch=rng.randbytes(8))
        if kind == 3:  # made with the key, by guessing
            return self.sender.forge(offer, nonce=rng.randbytes(16))
        if kind == 4:  # one lease's nonce in another's slot
            slots = [slot for slot in range(4) if slot != offer.slot]
            return self.sender.forge(offer, lease=rng.choice(slots))
        return self.altered(rng.choice([offer.sealed, *self.used]))


def test_10_000_invalid_handles(sender: Sender, puller: Puller) -> None:
    """They are forged, truncated, replayed, bit-flipped, or of other keys and epochs."""
    former = Sender()
    puller.connect(former)  # its region stays when its successor comes, whatever its name
    forger = Forger(sender, sender.offer())
    forger.used = [former.offer().sealed, sender.offer().sealed]
    puller.connect(sender)
    puller.pull(forger.used[1])
    sender.tick()
    sender.offer()
    puller.pool[:] = 0
    refused = {HandleError: 0, NoLink: 0}
    for _ in range(FORGED):
        with pytest.raises((HandleError, NoLink)) as raised:
            puller.pull(forger.handle())
        refused[raised.type] += 1
        assert not puller.pool.any(), "bytes were moved"
    assert sum(refused.values()) == FORGED
    assert min(refused.values()) > FORGED / 20
    assert {sender.leases.state(offer.slot) for offer in sender.leased} == {Pull.IDLE}
    assert len(sender.leased) == 2
    puller.pull(forger.offer)
    puller.check(forger.offer, [(0, TOKENS)])
    former.close()


def test_invalid_endpoints(sender: Sender) -> None:
    puller, forger = Puller(), Forger(sender, sender.offer())
    good = sender.holder.endpoint
    described = unseal(good, Endpoint, KEY)
    bad = [forger.altered(good) for _ in range(1000)]
    bad += [seal(described, forger.rng.randbytes(32)), forger.offer.sealed]
    for data in bad:
        with pytest.raises(HandleError, match="its MAC is wrong"):
            puller.receiver.connect(data)
        with pytest.raises(NoLink):
            puller.pull(forger.offer)
    for fields, message in (
        ({"fingerprint": "other"}, f"prefill has model 'other' in .* this instance '{MODEL}'"),
        ({"layout": KVLayout(3, 2, 8, "bfloat16")}, "bfloat16.*this instance .*float32"),
    ):
        with pytest.raises(HandleError, match=message):
            puller.receiver.connect(seal(msgspec.structs.replace(described, **fields), KEY))
    puller.connect(sender)
    puller.pull(forger.offer)
    puller.check(forger.offer, [(0, TOKENS)])
    puller.close()


def test_ends_of_two_deployments(sender: Sender) -> None:
    """With another key, neither the endpoint nor the handle is accepted."""
    foreign = Puller(agreed=terms(key=b"x" * 32))
    with pytest.raises(HandleError, match=r"Endpoint of .* is not of this deployment"):
        foreign.connect(sender)
    with pytest.raises(HandleError, match=r"KVHandle of .* is not of this deployment"):
        foreign.pull(sender.offer())
    foreign.close()
