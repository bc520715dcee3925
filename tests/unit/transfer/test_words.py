"""Tests for the words of a lease slot, and for the holder's side of the lease table."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import Unavailable
from pdserve.transfer.lease import words
from pdserve.transfer.lease.region import SharedRegion
from pdserve.transfer.lease.table import LeaseTable
from pdserve.transfer.lease.words import NO_GRANT, RECEIVER_WORD, SLOT_BYTES, Grant, Pull

SLOTS = 3
nonces = st.binary(min_size=16, max_size=16)
grants = st.builds(
    Grant,
    nonces,
    st.floats(0, 1e12),
    st.integers(0, (1 << 32) - 1),
    st.integers(-1, (1 << 31) - 1),
)


@pytest.fixture
def region() -> Iterator[SharedRegion]:
    region = SharedRegion.create(f"pdserve-test-{secrets.token_hex(6)}", 4096, SLOTS, bytes(8))
    yield region
    region.unlink()
    region.close()


@pytest.fixture
def leases(region: SharedRegion) -> LeaseTable:
    return LeaseTable(region)


def slot_of(grant: Grant, word: int = 0) -> bytes:
    """Return a slot's bytes."""
    slot = bytearray(SLOT_BYTES)
    slot[: words.HOLDER_BYTES] = grant.pack()
    slot[RECEIVER_WORD : RECEIVER_WORD + 8] = words.pack_word(word)
    return bytes(slot)


def say(region: SharedRegion, slot: int, nonce: bytes, state: Pull, beat: int = 0) -> None:
    """Write the words that a receiver writes."""
    region.mark(slot, words.word(nonce, state, beat))


# ------------------------------------------------------------------------------ what the bytes mean


@given(grants, nonces, st.sampled_from(Pull), st.integers(0, 1000))
def test_both_sides_words_share_a_slot(grant: Grant, nonce: bytes, state: Pull, beat: int) -> None:
    slot = slot_of(grant, words.word(nonce, state, beat))
    assert words.grant(slot) == words.grant(memoryview(slot)) == grant
    assert words.pulled(slot, nonce) == (state, beat % 256)


@given(nonces, st.sampled_from(Pull), st.integers(0, 255))
def test_a_word_is_one_aligned_word(nonce: bytes, state: Pull, beat: int) -> None:
    assert RECEIVER_WORD % 8 == 0
    assert words.HOLDER_BYTES <= RECEIVER_WORD
    assert len(words.pack_word(words.word(nonce, state, beat))) == 8


@given(nonces, nonces, st.sampled_from(Pull))
def test_what_was_said_of_another_lease_is_ignored(nonce: bytes, other: bytes, state: Pull) -> None:
    """vllm#46289: late signals are ignored."""
    if nonce[:6] != other[:6]:
        slot = slot_of(Grant(nonce, 1.0), words.word(other, state, 3))
        assert words.pulled(slot, nonce) == (Pull.IDLE, 0)


@given(nonces, st.integers(3, 255))
def test_a_state_that_is_none_keeps_the_range(nonce: bytes, state: int) -> None:
    """No range is freed because of a word that is not understood."""
    found = words.word(nonce, Pull.IDLE) | state
    assert words.pulled(slot_of(Grant(nonce, 1.0), found), nonce)[0] is Pull.PULLING


@given(grants, nonces)
def test_a_grant_is_of_its_nonce_only(grant: Grant, nonce: bytes) -> None:
    assert grant.is_of(grant.nonce) == (grant.nonce != words.NO_NONCE)
    assert not grant.is_of(nonce) or grant.nonce == nonce
    assert not NO_GRANT.is_of(nonce)
    assert not NO_GRANT.is_of(words.NO_NONCE), "a free slot belongs to no lease"


@given(st.binary(min_size=SLOT_BYTES, max_size=SLOT_BYTES), nonces)
def test_any_bytes_say_something(slot: bytes, nonce: bytes) -> None:
    found = words.grant(slot)
    assert len(found.nonce) == 16
    assert words.pulled(slot, nonce)[0] in Pull


def test_nonces_are_random() -> None:
    assert len({words.new_nonce() for _ in range(100)}) == 100


# -------------------------------------------------------------------------------- the holder's side


def test_a_lease_as_its_receiver_sees_it(region: SharedRegion, leases: LeaseTable) -> None:
    slot, nonce = leases.grant(12.5)
    assert words.grant(region.peek(slot)) == Grant(nonce, 12.5, filled=0, token=-1)
    leases.fill(slot, 4)
    assert words.grant(region.peek(slot)) == Grant(nonce, 12.5, filled=4, token=-1)
    leases.fill(slot, 6, token=331)
    leases.extend(slot, 99.0)
    assert words.grant(region.peek(slot)) == Grant(nonce, 99.0, filled=6, token=331)
    assert leases.revoke(slot) is Pull.IDLE
    assert words.grant(region.peek(slot)) == NO_GRANT
    leases.free(slot)
    assert len(leases) == 0


def test_what_its_receiver_says(region: SharedRegion, leases: LeaseTable) -> None:
    slot, nonce = leases.grant(1.0)
    assert leases.heard(slot) == (Pull.IDLE, 0)
    for beat in range(3):
        say(region, slot, nonce, Pull.PULLING, beat)
        assert leases.heard(slot) == (Pull.PULLING, beat)
    assert leases.revoke(slot) is Pull.PULLING, "once more is no error"
    assert leases.revoke(slot) is Pull.PULLING
    say(region, slot, nonce, Pull.DONE)
    assert leases.state(slot) is Pull.DONE


def test_a_slot_is_idle_again_with_its_next_lease(region: SharedRegion, leases: LeaseTable) -> None:
    """This holds even if the receiver of the former lease is late."""
    first = leases.grant(1.0)
    say(region, *first, Pull.PULLING)
    leases.free(first[0])
    for _ in range(SLOTS):
        second = leases.grant(1.0)
    assert second[0] == first[0]
    assert leases.state(second[0]) is Pull.IDLE
    say(region, *first, Pull.DONE)
    assert leases.state(second[0]) is Pull.IDLE


def test_slots_do_not_touch_each_other(region: SharedRegion, leases: LeaseTable) -> None:
    granted = [leases.grant(float(number)) for number in range(SLOTS)]
    for number, (slot, nonce) in enumerate(granted):
        leases.fill(slot, number)
        say(region, slot, nonce, Pull.PULLING, number)
    for number, (slot, nonce) in enumerate(granted):
        assert words.grant(region.peek(slot)) == Grant(nonce, float(number), number)
        assert leases.heard(slot) == (Pull.PULLING, number)
    table = region.table
    assert table.shape == (SLOTS * SLOT_BYTES,)
    assert table[:16].tobytes() == words.grant(region.peek(0)).nonce
    assert not region.data.any(), "the data begin behind the table"


def test_slots_run_out_and_come_back(leases: LeaseTable) -> None:
    slots = [leases.grant(1.0)[0] for _ in range(SLOTS)]
    assert sorted(slots) == [0, 1, 2]
    with pytest.raises(Unavailable, match="all 3 lease slots"):
        leases.grant(1.0)
    leases.free(slots[2])
    assert leases.grant(1.0)[0] == slots[2]
    assert len(leases) == 3


def test_the_slot_that_was_free_for_longest_is_next(leases: LeaseTable) -> None:
    for slot, _ in [leases.grant(1.0) for _ in range(SLOTS)]:
        leases.free(slot)
    assert [leases.grant(1.0)[0] for _ in range(SLOTS)] == [0, 1, 2]


def test_a_torn_nonce_is_no_lease(region: SharedRegion, leases: LeaseTable) -> None:
    """The holder writes its words after the nonce, which may be torn into two halves."""
    slot, nonce = leases.grant(math.inf)
    torn = Grant(nonce[:8] + secrets.token_bytes(8), math.inf)
    assert not torn.is_of(nonce)
    seen = np.frombuffer(region.peek(slot), np.uint8)
    leases.revoke(slot)
    assert words.grant(seen.tobytes()).is_of(nonce), "a read is a copy"
