"""Tests for PrefixIndex against a naive model, with an arena and a block pool that evict."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.kvcache.arena import ALIGNMENT, Arena, Range, State
from pdserve.kvcache.block_pool import BlockPool, BlockTable, copies
from pdserve.kvcache.prefix_index import (
    BLOCK_TOKENS,
    DIGEST_BYTES,
    SHORT_BYTES,
    PrefixIndex,
    chain,
    shorten,
)

BLOCK = 2
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=9)
salts = st.sampled_from(["", "a", "b"])


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


def shared(tokens: list[int], others: list[int]) -> int:
    """Return the length of the common prefix in whole blocks, without the last token."""
    length = 0
    while tokens[: length + BLOCK] == others[: length + BLOCK] and (
        length + BLOCK <= min(len(tokens) - 1, len(others))
    ):
        length += BLOCK
    return length


class PrefixMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index: PrefixIndex[Range] = PrefixIndex(BLOCK)
        self.arena = Arena(6 * ALIGNMENT, 6, self.index.remove)
        self.content: dict[Range, tuple[list[int], str]] = {}

    @rule(tokens=prompts, salt=salts, size=st.integers(1, 3), keep=st.booleans())
    def compute(self, tokens: list[int], salt: str, size: int, keep: bool) -> None:
        held = self.arena.allocate(size * ALIGNMENT)
        if held is None:
            return
        self.arena.lease(held, 1.0)
        self.index.add(held, array(tokens), salt)
        if not keep:
            self.arena.release(held)
        self.content[held] = tokens, salt

    @rule(data=st.data(), more=prompts)
    def goes_on(self, data: st.DataObject, more: list[int]) -> None:
        """Add the next turn of a conversation, which takes the place of the previous one."""
        live = [held for held in self.content if held.state is not State.FREE]
        if live:
            held = data.draw(st.sampled_from(live))
            tokens, salt = self.content[held]
            self.content[held] = tokens + more, salt
            self.index.add(held, array(tokens + more), salt)

    @rule()
    def leases_end(self) -> None:
        for held in self.content:
            if held.state is State.LEASED:
                self.arena.release(held)

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
        assert {held for found in self.index._holding.values() for held in found} <= set(live)


TestPrefixIndex = PrefixMachine.TestCase
TestPrefixIndex.settings = settings(max_examples=60, stateful_step_count=40)


def kv(tokens: list[int], salt: str) -> np.ndarray:
    """Return int64 [n] in place of K and V: each value depends on all tokens up to it."""
    digest, rows = hashlib.sha256(salt.encode()), []
    for token in tokens:
        digest.update(bytes([token]))
        rows.append(int.from_bytes(digest.digest()[:7], "big"))
    return np.array(rows, np.int64)


@dataclass(eq=False)
class Sequence:
    """A sequence in a decode: `rows` of its tokens are in the pool."""

    table: BlockTable
    tokens: list[int]
    salt: str
    most: int
    rows: int = 0
    source: tuple[BlockTable, int] | None = None


class DecodeMachine(RuleBasedStateMachine):
    """A decode that copies a prefix, pulls the tail, generates, and keeps all of it cached."""

    def __init__(self) -> None:
        super().__init__()
        self.index: PrefixIndex[BlockTable] = PrefixIndex(BLOCK)
        self.pool = BlockPool(6, 4, self.freed)
        self.memory = np.zeros(24, np.int64)
        self.arriving: list[Sequence] = []
        self.running: list[Sequence] = []
        self.parked: dict[BlockTable, tuple[list[int], str]] = {}

    def freed(self, table: BlockTable) -> None:
        self.index.remove(table)
        self.parked.pop(table, None)

    def write(self, one: Sequence, end: int) -> None:
        rows = [row for first, n in one.table.rows(end) for row in range(first, first + n)]
        self.memory[rows[one.rows :]] = kv(one.tokens, one.salt)[one.rows : end]
        one.rows = end

    def check(self, table: BlockTable, tokens: list[int], salt: str) -> None:
        rows = [row for first, n in table.rows(len(tokens)) for row in range(first, first + n)]
        assert np.array_equal(self.memory[rows], kv(tokens, salt))

    @rule(prompt=prompts, salt=salts, more=st.integers(1, 6))
    def arrive(self, prompt: list[int], salt: str, more: int) -> None:
        found = self.index.find(array(prompt), salt)
        if found is not None:
            self.pool.pin(found[0])
        table = self.pool.allocate(len(prompt) + more)
        if table is not None:
            self.arriving.append(Sequence(table, prompt, salt, len(prompt) + more, source=found))
        elif found is not None:
            self.pool.unpin(found[0])

    @rule(data=st.data())
    def pulled(self, data: st.DataObject) -> None:
        if self.arriving:
            one = self.arriving.pop(data.draw(st.integers(0, len(self.arriving) - 1)))
            if one.source is not None:
                source, one.rows = one.source
                for here, there, rows in copies(source, one.table, one.rows):
                    self.memory[there : there + rows] = self.memory[here : here + rows]
                self.pool.unpin(source)
            self.write(one, len(one.tokens))
            self.index.add(one.table, array(one.tokens), one.salt)
            self.running.append(one)

    @rule(data=st.data())
    def failed(self, data: st.DataObject) -> None:
        if self.arriving:
            one = self.arriving.pop(data.draw(st.integers(0, len(self.arriving) - 1)))
            if one.source is not None:
                self.pool.unpin(one.source[0])
            self.pool.free(one.table)

    @rule(token=st.integers(0, 1))
    def step(self, token: int) -> None:
        for one in self.running:
            if len(one.tokens) < one.most:
                self.write(one, len(one.tokens))
                one.tokens = [*one.tokens, token]

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.running:
            one = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            self.index.add(one.table, array(one.tokens[: one.rows]), one.salt)
            self.pool.park(one.table, one.rows)
            self.parked[one.table] = one.tokens[: one.rows], one.salt

    @invariant()
    def every_row_is_what_its_owner_takes_it_for(self) -> None:
        for one in self.running:
            self.check(one.table, one.tokens[: one.rows], one.salt)
        for table, (tokens, salt) in self.parked.items():
            self.check(table, tokens, salt)

    @invariant()
    def what_is_found_is_there(self) -> None:
        assert set(self.index._digests) == {one.table for one in self.running} | set(self.parked)

    def teardown(self) -> None:
        while self.arriving:
            one = self.arriving.pop()
            if one.source is not None:
                self.pool.unpin(one.source[0])
            self.pool.free(one.table)
        for one in self.running:
            self.pool.free(one.table)
        assert self.pool.used_blocks == 0
        assert self.pool.allocate(24) is not None
        assert len(self.index) == 0


TestDecode = DecodeMachine.TestCase
TestDecode.settings = settings(max_examples=60, stateful_step_count=40)


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


def test_chain_is_of_all_tokens_before_and_of_the_tenant() -> None:
    tokens = np.arange(200, dtype=np.int32)
    digests = list(chain(tokens, "a", 200))
    assert len(digests) == 200 // BLOCK_TOKENS
    assert len(set(digests)) == len(digests)
    assert {len(digest) for digest in digests} == {DIGEST_BYTES}
    assert list(chain(tokens[:100], "a", 100)) == digests[:3]
    assert list(chain(tokens.astype(">i4"), "a", 95)) == digests[:2]
    other = tokens.copy()
    other[40] = 7
    differ = [a != b for a, b in zip(digests, chain(other, "a", 200), strict=True)]
    assert differ == [False] + [True] * 5
    assert not set(digests) & set(chain(tokens, "b", 200))


def test_chain_is_the_same_in_every_process_and_version() -> None:
    """A gateway compares its own chain with the one that a prefill reports."""
    digests = chain(np.arange(64, dtype=np.int32), "acme", 64)
    assert shorten(digests).hex() == "86c2845c7ef8437ffb81f324be28b0d3"


def test_what_is_told_of_what_is_added() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    tokens = np.arange(100, dtype=np.int32)
    told = shorten(index.add("one", tokens, "a"))
    assert len(told) == 3 * SHORT_BYTES
    assert told == shorten(chain(tokens, "a", len(tokens)))
    assert shorten(index.add("two", tokens[:31], "a")) == b""


def test_what_is_added_last_takes_the_place_of_what_was_there() -> None:
    index: PrefixIndex[str] = PrefixIndex(BLOCK)
    index.add("one", array([1, 2, 3]), "")
    index.add("one", array([4, 5, 6, 7]), "")
    assert index.find(array([1, 2, 3]), "") is None
    assert index.find(array([4, 5, 6, 7, 8]), "") == ("one", 4)
    assert len(index) == 1


def test_a_used_prefix_outlives_one_that_is_not() -> None:
    index = PrefixIndex(BLOCK)
    arena = Arena(2 * ALIGNMENT, 4, index.remove)
    for first in (1, 2):
        held = filled(arena)
        index.add(held, array([first, 0, 0]), "")
        arena.release(held)
    used = index.find(array([1, 0, 0]), "")
    assert used is not None
    arena.pin(used[0])
    arena.unpin(used[0])
    assert arena.allocate(1) is not None
    assert index.find(array([1, 0, 0]), "") == used
    assert index.find(array([2, 0, 0]), "") is None
