"""BlockPool: no block in two tables, conservation, runs that cover the rows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.kvcache.paged import BlockPool, BlockTable

BLOCKS = 20
SIZE = 4


def holes(used: set[int]) -> list[int]:
    """Lengths of the runs of unused blocks."""
    line = "".join("x" if block in used else "." for block in range(BLOCKS))
    return sorted(len(hole) for hole in line.split("x") if hole)


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.tables: list[BlockTable] = []

    def used(self) -> set[int]:
        return {block for table in self.tables for block in table.blocks}

    @rule(tokens=st.integers(1, (BLOCKS + 1) * SIZE))
    def allocate(self, tokens: int) -> None:
        wanted = -(-tokens // SIZE)
        free = holes(self.used())
        table = self.pool.allocate(tokens)
        if wanted > sum(free):
            assert table is None
            return
        assert table is not None
        assert len(table.blocks) == wanted
        assert table.capacity == wanted * SIZE >= tokens
        assert not self.used() & set(table.blocks)
        fewest, room = 0, 0
        while room < wanted:
            fewest += 1
            room += free[-fewest]
        assert len(table.runs) == fewest
        if fewest == 1:
            best = min(hole for hole in free if hole >= wanted)
            left = holes(self.used() | set(table.blocks))
            free.remove(best)
            assert left == sorted([*free, *([best - wanted] if best > wanted else [])])
        rows = [row for first, count in table.runs for row in range(first, first + count)]
        assert rows == [
            row for block in table.blocks for row in range(block * SIZE, (block + 1) * SIZE)
        ]
        self.tables.append(table)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.tables:
            table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
            self.pool.free(table)
            with pytest.raises(ValueError, match="freed twice"):
                self.pool.free(table)

    @invariant()
    def every_block_has_one_holder(self) -> None:
        blocks = [block for table in self.tables for block in table.blocks]
        assert len(blocks) == len(set(blocks)) == self.pool.used_blocks
        assert self.pool.free_blocks == BLOCKS - len(blocks)
        assert all(0 <= block < BLOCKS for block in blocks)


TestBlockPool = PoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(deadline=None)
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
    with pytest.raises(ValueError, match="another pool"):
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
