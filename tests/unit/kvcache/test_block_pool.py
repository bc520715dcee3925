"""Tests for BlockPool: no block in two tables, nothing lost, few runs, eviction order, copies."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.kvcache.block_pool import BlockPool, BlockTable, copies

BLOCKS = 20
SIZE = 4


def holes(used: set[int]) -> list[int]:
    """Return the lengths of the runs of unused blocks."""
    line = "".join("x" if block in used else "." for block in range(BLOCKS))
    return sorted(len(hole) for hole in line.split("x") if hole)


def blocks(tables: list[BlockTable]) -> set[int]:
    return {block for table in tables for block in table.blocks}


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.freed: list[BlockTable] = []
        self.pool = BlockPool(BLOCKS, SIZE, self.freed.append)
        self.running: list[BlockTable] = []
        self.parked: list[BlockTable] = []  # least recently used first

    def spare(self) -> list[BlockTable]:
        return [table for table in self.parked if not table.pins]

    @rule(tokens=st.integers(1, 5 * SIZE) | st.integers(1, (BLOCKS + 1) * SIZE))
    def allocate(self, tokens: int) -> None:
        wanted = -(-tokens // SIZE)
        spare, every = self.spare(), blocks(self.running + self.parked)
        staying = every - blocks(spare)
        self.freed.clear()
        table = self.pool.allocate(tokens)
        if wanted > BLOCKS - len(staying):
            assert table is None
            assert self.freed == [], "an eviction was not needed"
            return
        assert table is not None
        assert len(table.blocks) == len(set(table.blocks)) == wanted
        assert table.capacity == wanted * SIZE >= tokens
        assert not staying & set(table.blocks)
        self.check_runs(table, holes(staying), holes(every))
        self.check_evicted(table, spare, every)
        self.running.append(table)

    def check_runs(self, table: BlockTable, room: list[int], free: list[int]) -> None:
        fewest, found = 0, 0
        while found < len(table.blocks):
            fewest += 1
            found += room[-fewest]
        assert len(table.runs) == fewest
        if free and free[-1] >= len(table.blocks):
            best = min(hole for hole in free if hole >= len(table.blocks))
            left = holes(blocks([*self.running, *self.parked, table]))
            free.remove(best)
            rest = best - len(table.blocks)
            assert left == sorted([*free, *([rest] if rest else [])])
        rows = [row for first, count in table.runs for row in range(first, first + count)]
        assert rows == [
            row for block in table.blocks for row in range(block * SIZE, (block + 1) * SIZE)
        ]

    def check_evicted(self, table: BlockTable, spare: list[BlockTable], every: set[int]) -> None:
        assert set(self.freed) <= set(spare)
        assert len(self.freed) == len(set(self.freed))
        for one in self.freed:
            assert set(one.blocks) & set(table.blocks), "an eviction was not needed"
            self.parked.remove(one)
        if len(table.runs) == 1 and self.freed:
            # Without the most recently used of the evicted tables there would have been no run.
            last = spare.index(max(self.freed, key=spare.index))
            wanted = len(table.blocks)
            assert max(holes(every - blocks(spare[:last])), default=0) < wanted
            assert max(holes(every - blocks(spare[: last + 1]))) >= wanted

    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        if self.running:
            table = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            tokens = data.draw(st.integers(1, table.capacity))
            before = table.rows(tokens)
            self.pool.park(table, tokens)
            assert table.rows(tokens) == before
            assert table.capacity - tokens < SIZE
            self.parked.append(table)
            with pytest.raises(ValueError, match="not in use"):
                self.pool.park(table, tokens)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        held = [table for table in self.running + self.parked if not table.pins]
        if held:
            table = data.draw(st.sampled_from(held))
            self.freed.clear()
            self.pool.free(table)
            assert self.freed == [table]
            (self.running if table in self.running else self.parked).remove(table)
            for verb in (self.pool.free, self.pool.pin):
                with pytest.raises(ValueError, match="freed before"):
                    verb(table)
            with pytest.raises(ValueError, match="freed before"):
                self.pool.park(table, 1)

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        if held := self.running + self.parked:
            table = data.draw(st.sampled_from(held))
            self.pool.pin(table)
            with pytest.raises(ValueError, match="is pinned by"):
                self.pool.free(table)

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        if pinned := [table for table in self.running + self.parked if table.pins]:
            table = data.draw(st.sampled_from(pinned))
            self.pool.unpin(table)
            if table in self.parked:
                self.parked.remove(table)
                self.parked.append(table)

    @invariant()
    def every_block_has_one_holder(self) -> None:
        held = [block for table in self.running + self.parked for block in table.blocks]
        assert len(held) == len(set(held)) == BLOCKS - self.pool.free_blocks
        assert set(held) <= set(range(BLOCKS))
        assert self.pool.cached_blocks == len(blocks(self.spare()))
        assert self.pool.used_blocks == len(held) - self.pool.cached_blocks
        assert list(self.pool._evictor.evictable) == self.spare()


TestBlockPool = PoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=5), st.data())
def test_rows_are_the_first_tokens_of_the_runs(
    runs: list[tuple[int, int]], data: st.DataObject
) -> None:
    table = BlockTable(tuple((first * SIZE, count * SIZE) for first, count in runs), SIZE)
    tokens = data.draw(st.integers(0, table.capacity))
    every = [row for first, rows in table.runs for row in range(first, first + rows)]
    cut = table.rows(tokens)
    assert [row for first, rows in cut for row in range(first, first + rows)] == every[:tokens]
    assert all(rows > 0 for _, rows in cut)


@pytest.mark.parametrize("tokens", [-1, 9])
def test_rows_of_more_than_the_table_holds(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{tokens} tokens; the blocks hold 0 to 8"):
        BlockTable(((0, 8),), SIZE).rows(tokens)


def test_a_table_of_another_pool_is_refused() -> None:
    table = BlockPool(4, SIZE).allocate(1)
    assert table is not None
    with pytest.raises(ValueError, match="another's"):
        BlockPool(4, SIZE).free(table)


def test_a_sequence_has_tokens() -> None:
    with pytest.raises(ValueError, match="not 0"):
        BlockPool(4, SIZE).allocate(0)


def test_long_runs_come_first_when_there_is_no_single_one() -> None:
    pool = BlockPool(8, 1)
    tables = [pool.allocate(1) for _ in range(8)]
    for block in (0, 1, 2, 4, 6, 7):
        table = tables[block]
        assert table is not None
        pool.free(table)
    table = pool.allocate(5)
    assert table is not None
    assert table.runs == ((0, 3), (6, 2))


def filled(pool: BlockPool) -> list[BlockTable]:
    """Return one table for each block, in the order of the blocks."""
    tables = [pool.allocate(1) for _ in range(pool.blocks)]
    assert all(table is not None for table in tables)
    return [table for table in tables if table is not None]


def test_a_pinned_source_stays_when_its_sequence_ends() -> None:
    pool = BlockPool(4, SIZE)
    source = pool.allocate(2 * SIZE)
    assert source is not None
    pool.pin(source)
    pool.park(source, 2 * SIZE)
    assert (pool.used_blocks, pool.cached_blocks, pool.free_blocks) == (2, 0, 2)
    assert pool.allocate(3 * SIZE) is None
    pool.unpin(source)
    assert (pool.used_blocks, pool.cached_blocks, pool.free_blocks) == (0, 2, 2)
    assert pool.allocate(3 * SIZE) is not None
    assert (pool.used_blocks, pool.cached_blocks, pool.free_blocks) == (3, 0, 1)


def test_what_lies_beside_the_run_is_not_evicted() -> None:
    """Blocks 4, 2 and 3 are the least recently used ones and form a run, of which two are taken."""
    pool = BlockPool(6, SIZE)
    tables = filled(pool)
    for block in (4, 2, 3, 0, 1, 5):
        pool.park(tables[block], 1)
    table = pool.allocate(2 * SIZE)
    assert table is not None
    assert table.runs == ((2 * SIZE, 2 * SIZE),)
    assert list(pool._evictor.evictable) == [tables[block] for block in (4, 0, 1, 5)]


def test_unused_blocks_of_a_short_answer_are_free_at_once() -> None:
    pool = BlockPool(8, SIZE)
    tables = filled(pool)
    for block in (0, 1, 2, 4, 6, 7):
        pool.free(tables[block])
    table = pool.allocate(6 * SIZE)
    assert table is not None
    assert table.runs == ((0, 3 * SIZE), (6 * SIZE, 2 * SIZE), (4 * SIZE, SIZE))
    pool.park(table, 3 * SIZE + 1)
    assert table.runs == ((0, 3 * SIZE), (6 * SIZE, SIZE))
    assert (pool.used_blocks, pool.cached_blocks, pool.free_blocks) == (2, 4, 2)


def test_more_tokens_than_the_blocks_hold_are_not_kept() -> None:
    pool = BlockPool(4, SIZE)
    table = pool.allocate(SIZE)
    assert table is not None
    with pytest.raises(ValueError, match="the blocks hold 0 to 4"):
        pool.park(table, SIZE + 1)
    assert pool.used_blocks == 1


run_lists = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=4)


@given(run_lists, run_lists, st.data())
def test_copies_pair_the_rows_of_the_same_tokens(
    ours: list[tuple[int, int]], theirs: list[tuple[int, int]], data: st.DataObject
) -> None:
    source, target = (
        BlockTable(tuple((first * SIZE, count * SIZE) for first, count in runs), SIZE)
        for runs in (ours, theirs)
    )
    most = min(source.capacity, target.capacity)
    tokens = data.draw(st.integers(0, most))
    pieces = copies(source, target, tokens)
    pairs = [(here + i, there + i) for here, there, rows in pieces for i in range(rows)]
    rows = [
        [row for first, count in table.rows(tokens) for row in range(first, first + count)]
        for table in (source, target)
    ]
    assert pairs == list(zip(*rows, strict=True))
    assert len(pieces) <= len(ours) + len(theirs)
    with pytest.raises(ValueError, match=f"{most + 1} tokens"):
        copies(source, target, most + 1)
