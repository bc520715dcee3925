"""Tests for Arena: no overlap, nothing lost, coalescing, eviction order, states of a range."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.kvcache.arena import ALIGNMENT, Arena, Range, State
from pdserve.kvcache.free_list import FreeList

PAGES = 24
MAX_RANGES = 6
READABLE = (State.LEASED, State.IN_TRANSFER, State.QUARANTINED)
"""States in which a receiver may be reading."""


def gaps(capacity: int, held: list[Range]) -> list[tuple[int, int]]:
    """Return (size, offset) of the gaps between ranges, by a scan of all ranges."""
    found, end = [], 0
    for one in sorted(held, key=lambda one: one.offset):
        if one.offset > end:
            found.append((one.offset - end, end))
        end = one.offset + one.size
    if capacity > end:
        found.append((capacity - end, end))
    return sorted(found)


class ArenaMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.freed: list[Range] = []
        self.arena = Arena(PAGES * ALIGNMENT + 17, MAX_RANGES, self.freed.append)
        self.live: list[Range] = []
        self.lru: list[Range] = []  # ranges in state CACHED, least recently used first
        self.filled: set[Range] = set()
        self.now = 0.0

    def pick(self, data: st.DataObject, *states: State, pinned: bool | None = None) -> Range | None:
        found = [
            one
            for one in self.live
            if one.state in states and (pinned is None or bool(one.pins) == pinned)
        ]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(nbytes=st.integers(1, (PAGES + 1) * ALIGNMENT))
    def allocate(self, nbytes: int) -> None:
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        live, victims = list(self.live), []
        evictable = [one for one in self.lru if not one.pins]
        safe = [one for one in live if one not in evictable]
        while not any(gap >= size for gap, _ in gaps(self.arena.capacity, live)) or (
            len(live) == MAX_RANGES
        ):
            if not evictable:
                break
            victims.append(evictable.pop(0))
            live.remove(victims[-1])
        holes = [hole for hole in gaps(self.arena.capacity, live) if hole[0] >= size]
        self.freed.clear()
        got = self.arena.allocate(nbytes)
        if not holes or len(live) == MAX_RANGES:
            assert got is None
            assert self.freed == [], "an eviction was not needed"
            return
        assert got is not None
        assert got.state is State.ALLOCATED
        assert (got.nbytes, got.size) == (nbytes, size)
        assert got.offset == min(holes)[1], "this is not the best fit"
        assert self.freed == victims, (
            "not the least recently used range, or more ranges than needed"
        )
        assert all(
            got.offset >= one.offset + one.size or one.offset >= got.offset + size for one in safe
        )
        assert all(one.state is State.FREE for one in victims)
        self.live = [*live, got]
        self.lru = [one for one in self.lru if one not in victims]

    def later(self) -> float:
        self.now += 1.0
        return self.now

    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        if one := self.pick(data, State.ALLOCATED):
            self.arena.lease(one, self.later())
            assert (one.state, one.until) == (State.LEASED, self.now)
            self.filled.add(one)

    @rule(data=st.data())
    def transfer(self, data: st.DataObject) -> None:
        if one := self.pick(data, State.ALLOCATED, State.LEASED, State.IN_TRANSFER):
            self.arena.transfer(one, self.later())
            assert (one.state, one.until) == (State.IN_TRANSFER, self.now)
            self.filled.add(one)

    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        if one := self.pick(data, State.ALLOCATED, *READABLE):
            self.arena.quarantine(one, self.later())
            assert (one.state, one.until) == (State.QUARANTINED, self.now)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if one := self.pick(data, State.ALLOCATED, *READABLE):
            self.freed.clear()
            self.arena.release(one)
            if one in self.filled:
                assert one.state is State.CACHED
                assert self.freed == []
                self.lru.append(one)
            else:
                assert one.state is State.FREE
                assert self.freed == [one]
                self.live.remove(one)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        states = State.ALLOCATED, State.QUARANTINED, State.CACHED
        if one := self.pick(data, *states, pinned=False):
            self.arena.free(one)
            assert not one.filled
            self.live.remove(one)
            self.lru = [other for other in self.lru if other is not one]

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        if one := self.pick(data, *READABLE, State.CACHED):
            if one in self.filled:
                self.arena.pin(one)
            else:
                with pytest.raises(ValueError, match="nothing to copy from"):
                    self.arena.pin(one)

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        if one := self.pick(data, *State, pinned=True):
            self.arena.unpin(one)
            if one in self.lru:
                self.lru.remove(one)
                self.lru.append(one)

    @precondition(lambda self: self.live)
    @rule()
    def free_of_a_pinned_one_is_refused(self) -> None:
        for one in self.live:
            if one.pins:
                with pytest.raises(ValueError, match="pinned"):
                    self.arena.free(one)

    @invariant()
    def no_overlap(self) -> None:
        end = 0
        for one in sorted(self.live, key=lambda one: one.offset):
            assert one.offset % ALIGNMENT == 0
            assert one.offset >= end
            end = one.offset + one.size
        assert end <= self.arena.capacity

    @invariant()
    def bytes_are_whole_from_the_lease_on(self) -> None:
        assert {one for one in self.live if one.filled} == self.filled & set(self.live)

    @invariant()
    def nobody_loses_a_range_but_by_eviction(self) -> None:
        assert all(one.state is not State.FREE for one in self.live)

    @invariant()
    def nothing_is_lost_and_holes_are_coalesced(self) -> None:
        counts = self.arena.counts()
        assert sum(size for _, size in counts.values()) == self.arena.capacity
        holes = gaps(self.arena.capacity, self.live)
        assert counts[State.FREE] == (len(holes), sum(size for size, _ in holes))
        for state in set(State) - {State.FREE}:
            held = [one for one in self.live if one.state is state]
            assert counts[state] == (len(held), sum(one.size for one in held))


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=40)


WAYS = {
    "allocated": (),
    "leased": ("lease",),
    "in_transfer": ("lease", "transfer"),
    "in_transfer, followed": ("transfer",),
    "quarantined": ("lease", "quarantine"),
    "quarantined, unfilled": ("quarantine",),
    "cached": ("lease", "release"),
    "free": ("free",),
    "free, once filled": ("lease", "release", "free"),
}
TIMED = ("lease", "transfer", "quarantine")


def at(way: str) -> tuple[Arena, Range]:
    arena = Arena(4 * ALIGNMENT, 8)
    held = arena.allocate(100)
    assert held is not None
    for verb in WAYS[way]:
        getattr(arena, verb)(*((held, 1.0) if verb in TIMED else (held,)))
    assert held.state.value == way.partition(",")[0]
    return arena, held


@pytest.mark.parametrize(
    ("way", "legal"),
    [
        ("allocated", {"lease", "transfer", "quarantine", "free", "release"}),
        ("leased", {"transfer", "quarantine", "release", "pin"}),
        ("in_transfer", {"transfer", "quarantine", "release", "pin"}),
        ("in_transfer, followed", {"transfer", "quarantine", "release", "pin"}),
        ("quarantined", {"quarantine", "release", "free", "pin"}),
        ("quarantined, unfilled", {"quarantine", "release", "free"}),
        ("cached", {"free", "pin"}),
        ("free", set()),
        ("free, once filled", set()),
    ],
)
def test_only_the_drawn_transitions_are_allowed(way: str, legal: set[str]) -> None:
    for verb in (*TIMED, "release", "free", "pin", "unpin"):
        arena, held = at(way)
        state, before = held.state, arena.counts()
        arguments = (held, 3.0) if verb in TIMED else (held,)
        if verb in legal:
            getattr(arena, verb)(*arguments)
        else:
            with pytest.raises(ValueError, match=f"range at {held.offset} is "):
                getattr(arena, verb)(*arguments)
            assert held.state is state
            assert arena.counts() == before


@pytest.mark.parametrize(
    ("way", "end"),
    [
        ("leased", State.CACHED),
        ("in_transfer", State.CACHED),
        ("in_transfer, followed", State.CACHED),
        ("quarantined", State.CACHED),
        ("quarantined, unfilled", State.FREE),
        ("allocated", State.FREE),
    ],
)
def test_what_was_filled_ends_as_a_source_and_the_rest_is_free(way: str, end: State) -> None:
    arena, held = at(way)
    arena.release(held)
    assert held.state is end
    assert held.filled == (end is State.CACHED)


@pytest.mark.parametrize("verb", ["transfer", "quarantine"])
def test_a_receiver_at_work_moves_the_end(verb: str) -> None:
    arena, held = at("leased")
    for until in (2.0, 3.0, 4.0):
        getattr(arena, verb)(held, until)
        assert held.until == until


@pytest.mark.parametrize("way", ["leased", "in_transfer", "quarantined", "quarantined, unfilled"])
def test_a_range_that_may_be_read_is_never_room(way: str) -> None:
    arena, held = at(way)
    assert arena.allocate(arena.capacity) is None
    for _ in range(3):
        other = arena.allocate(ALIGNMENT)
        assert other is not None
        assert other.offset != held.offset
    assert arena.allocate(ALIGNMENT) is None
    arena.release(held)
    other = arena.allocate(ALIGNMENT)
    assert other is not None
    assert other.offset == held.offset


def test_a_pinned_range_survives_its_lease_and_every_eviction() -> None:
    """TensorRT-LLM#12542: a block was evicted before its reader had read it."""
    arena = Arena(4 * ALIGNMENT, 8)
    source = arena.allocate(2 * ALIGNMENT)
    assert source is not None
    arena.lease(source, 1.0)
    arena.pin(source)
    arena.release(source)
    assert arena.allocate(3 * ALIGNMENT) is None
    assert source.state is State.CACHED
    arena.unpin(source)
    assert arena.allocate(3 * ALIGNMENT) is not None
    assert source.state is State.FREE


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_range_has_bytes(nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"not {nbytes}"):
        Arena(1 << 20, 8).allocate(nbytes)


def test_more_than_the_capacity_is_none() -> None:
    assert Arena(1 << 20, 8).allocate((1 << 20) + 1) is None


def test_an_empty_free_list() -> None:
    assert FreeList(0).take(1) is None
    assert FreeList(0).largest == 0


def test_ten_thousand_operations_take_well_under_a_second() -> None:
    draw = random.Random(1)
    arena = Arena(1 << 30, 512)
    leased: list[Range] = []
    began = time.process_time()
    for _ in range(10_000):
        held = arena.allocate(draw.randrange(1, 8 << 20))
        if held is not None:
            arena.lease(held, 1.0)
            leased.append(held)
        if held is None or len(leased) > 64:
            arena.release(leased.pop(draw.randrange(len(leased))))
    assert time.process_time() - began < 1.0
