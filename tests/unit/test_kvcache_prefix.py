"""PrefixIndex against a naive model, wired to an arena that evicts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.kvcache.arena import ALIGNMENT, Arena, Range, State
from pdserve.kvcache.prefix import PrefixIndex

BLOCK = 2
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=9)
salts = st.sampled_from(["", "a", "b"])


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


def shared(tokens: list[int], others: list[int]) -> int:
    """Length of the common prefix in whole blocks, the last token left out."""
    length = 0
    while tokens[: length + BLOCK] == others[: length + BLOCK] and (
        length + BLOCK <= min(len(tokens) - 1, len(others))
    ):
        length += BLOCK
    return length


class PrefixMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(BLOCK)
        self.arena = Arena(6 * ALIGNMENT, 6, self.index.remove)
        self.content: dict[Range, tuple[list[int], str]] = {}

    @rule(tokens=prompts, salt=salts, size=st.integers(1, 3), keep=st.booleans())
    def compute(self, tokens: list[int], salt: str, size: int, keep: bool) -> None:
        held = self.arena.allocate(size * ALIGNMENT)
        if held is None:
            return
        with pytest.raises(ValueError, match="allocated; only a filled one"):
            self.index.add(held, array(tokens), salt)
        self.arena.lease(held, 1.0)
        self.index.add(held, array(tokens), salt)
        if not keep:
            self.arena.cache(held)
        self.content[held] = tokens, salt

    @rule()
    def leases_end(self) -> None:
        for held in self.content:
            if held.state is State.LEASED:
                self.arena.cache(held)

    @rule(tokens=prompts, salt=salts)
    def find(self, tokens: list[int], salt: str) -> None:
        best = max(
            (
                shared(tokens, others)
                for held, (others, other) in self.content.items()
                if held.state is not State.FREE and other == salt
            ),
            default=0,
        )
        found = self.index.find(array(tokens), salt)
        if not best:
            assert found is None
            return
        assert found is not None
        held, cached = found
        assert cached == best < len(tokens)
        assert held.state in (State.LEASED, State.CACHED)
        others, other = self.content[held]
        assert other == salt
        assert others[:cached] == tokens[:cached]

    @invariant()
    def freed_ranges_are_forgotten(self) -> None:
        live = [held for held in self.content if held.state is not State.FREE]
        assert len(self.index) == len(live)
        assert set(self.index._digests) == set(live)
        assert {held for found in self.index._ranges.values() for held in found} <= set(live)


TestPrefixIndex = PrefixMachine.TestCase
TestPrefixIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def filled(arena: Arena) -> Range:
    held = arena.allocate(1)
    assert held is not None
    arena.lease(held, 1.0)
    return held


def test_the_last_token_is_never_cached() -> None:
    index, arena = PrefixIndex(), Arena(1 << 20, 4)
    held = filled(arena)
    tokens = np.arange(64, dtype=np.int32)
    index.add(held, tokens, "")
    assert index.find(tokens, "") == (held, 32)
    assert index.find(np.arange(65, dtype=np.int32), "") == (held, 64)
    assert index.find(tokens[:32], "") is None


def test_tenants_never_share() -> None:
    index, arena = PrefixIndex(BLOCK), Arena(1 << 20, 4)
    index.add(filled(arena), array([1, 2, 3]), "a")
    assert index.find(array([1, 2, 3]), "b") is None


def test_a_range_is_added_once() -> None:
    index, arena = PrefixIndex(BLOCK), Arena(1 << 20, 4)
    held = filled(arena)
    index.add(held, array([1, 2, 3]), "")
    with pytest.raises(ValueError, match="already in the index"):
        index.add(held, array([1, 2, 3]), "")


def test_a_used_prefix_outlives_one_that_is_not() -> None:
    index = PrefixIndex(BLOCK)
    arena = Arena(2 * ALIGNMENT, 4, index.remove)
    for first in (1, 2):
        held = filled(arena)
        index.add(held, array([first, 0, 0]), "")
        arena.cache(held)
    used = index.find(array([1, 0, 0]), "")
    assert used is not None
    arena.pin(used[0])
    arena.unpin(used[0])
    assert arena.allocate(1) is not None
    assert index.find(array([1, 0, 0]), "") == used
    assert index.find(array([2, 0, 0]), "") is None
