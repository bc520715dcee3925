"""Blocks of the decode's paged KV pool, allocated in as few consecutive runs as possible.

    allocate --> used --park: its sequence has ended--> cached --evicted, or free--> free
                   '----free: its rows are not valid--------------------------------> free

A cached table is a source of prefixes until its room is needed. A new sequence copies the rows that
it shares into its own blocks, from a cached table or a used one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from pdserve.kvcache.evictor import Evictor
from pdserve.kvcache.free_list import FreeList

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence, in the order of its tokens.

    `runs` are (first row, rows) in the pool [layers, 2, rows, kv_heads, head_dim]. It may be read
    by all, and is changed by its pool only.
    """

    runs: tuple[tuple[int, int], ...]
    block_size: int
    pins: int = 0

    def __str__(self) -> str:
        return f"table of blocks {self.blocks}"

    @property
    def blocks(self) -> list[int]:
        """Return the block numbers in the order of the sequence's tokens."""
        size = self.block_size
        return [row // size for first, n in self.runs for row in range(first, first + n, size)]

    @property
    def capacity(self) -> int:
        """Return the number of tokens that fit."""
        return sum(rows for _, rows in self.runs)

    def touches(self, first: int, rows: int) -> bool:
        """Tell whether it has any of `rows` rows from `first`."""
        return any(start < first + rows and first < start + n for start, n in self.runs)

    def rows(self, tokens: int) -> list[tuple[int, int]]:
        """Return the runs, cut to the sequence's first `tokens` tokens.

        Raises:
            ValueError: there are more tokens than the blocks hold.
        """
        if not 0 <= tokens <= self.capacity:
            raise ValueError(f"{tokens} tokens; the blocks hold 0 to {self.capacity}")
        cut = []
        for first, rows in self.runs:
            if not tokens:
                break
            cut.append((first, min(rows, tokens)))
            tokens -= cut[-1][1]
        return cut


def copies(source: BlockTable, target: BlockTable, tokens: int) -> list[tuple[int, int, int]]:
    """Return the copies of `tokens` tokens: (first row of source, first row of target, rows).

    Raises:
        ValueError: there are more tokens than one of the tables holds.
    """
    given, taken = iter(source.rows(tokens)), iter(target.rows(tokens))
    pieces = []
    have = room = 0
    while tokens:
        if not have:
            here, have = next(given)
        if not room:
            there, room = next(taken)
        rows = min(have, room)
        pieces.append((here, there, rows))
        here, there = here + rows, there + rows
        have, room, tokens = have - rows, room - rows, tokens - rows
    return pieces


class BlockPool:
    """Hands out `blocks` blocks of `block_size` rows; book-keeping only.

    One run is preferred, because attention then reads a view of the pool instead of gathering.

    `on_free` is called with every table that is freed or evicted, before its blocks are reused:
    `PrefixIndex.remove`.
    """

    def __init__(
        self,
        blocks: int,
        block_size: int,
        on_free: Callable[[BlockTable], None] = lambda _: None,
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._on_free = on_free
        self._free_list = FreeList(blocks)
        self._evictor: Evictor[BlockTable] = Evictor()

    @property
    def free_blocks(self) -> int:
        """Return the number of blocks that belong to no table."""
        return self._free_list.free

    @property
    def cached_blocks(self) -> int:
        """Return the number of blocks of parked tables, which may be evicted."""
        return sum(table.capacity for table in self._evictor.evictable) // self.block_size

    @property
    def used_blocks(self) -> int:
        """Return the number of blocks of running sequences and of pinned parked tables."""
        return self.blocks - self.free_blocks - self.cached_blocks

    def allocate(self, tokens: int) -> BlockTable | None:
        """Return blocks for `tokens` tokens, evicting tables if needed.

        None if there are not enough.

        The runs are as few as possible if parked tables count as free; a single run is taken from
        the smallest hole that has it. Only tables that hold some of the blocks are evicted, each as
        a whole.
        """
        if tokens <= 0:
            raise ValueError(f"a sequence has at least 1 token, not {tokens}")
        wanted = -(-tokens // self.block_size)
        if wanted > self.free_blocks + self.cached_blocks:
            return None
        runs = []
        while wanted:
            first, count = self._take(wanted)
            runs.append((first * self.block_size, count * self.block_size))
            wanted -= count
        table = BlockTable(tuple(runs), self.block_size)
        self._evictor.add(table)
        return table

    def park(self, table: BlockTable, tokens: int) -> None:
        """Keep the first `tokens` rows of a sequence that has ended, while there is room.

        They are valid.

        The blocks after them are free at once.

        Raises:
            ValueError: there are more tokens than the blocks hold, or the table is not in use.
        """
        kept = table.rows(-(-tokens // self.block_size) * self.block_size)
        self._evictor.park(table)
        for (first, rows), (_, left) in zip_longest(table.runs, kept, fillvalue=(0, 0)):
            if left < rows:
                self._give(first + left, rows - left)
        table.runs = tuple(kept)

    def pin(self, table: BlockTable) -> None:
        """Keep a table from eviction while it is copied from, even if its sequence ends.

        Raises:
            ValueError: the table is not of this pool, or has been freed.
        """
        self._evictor.pin(table)

    def unpin(self, table: BlockTable) -> None:
        """End a `pin`; a parked table is now the most recently used."""
        self._evictor.unpin(table)

    def free(self, table: BlockTable) -> None:
        """Free the blocks of a table.

        Raises:
            ValueError: the table is pinned, not of this pool, or has been freed before.
        """
        self._evictor.remove(table)
        self._on_free(table)
        for first, rows in table.runs:
            self._give(first, rows)

    def _give(self, first: int, rows: int) -> None:
        self._free_list.give(first // self.block_size, rows // self.block_size)

    def _take(self, wanted: int) -> tuple[int, int]:
        """Return (first, number) of up to `wanted` consecutive blocks, as many as possible.

        The least recently used tables that together make room are considered, and of these the ones
        that hold some of the blocks are evicted. Evicting in the order of use alone, until there
        are enough blocks, leaves nearly every sequence with several runs (4 to 9 on average) once
        the pool is full.
        """
        trial, oldest = self._free_list.copy(), []
        for table in self._evictor.evictable:
            if trial.largest >= wanted:
                break
            oldest.append(table)
            for first, rows in table.runs:
                trial.give(first // self.block_size, rows // self.block_size)
        count = min(wanted, trial.largest)
        if self._free_list.largest < count:
            start = trial.take(count)
            assert start is not None
            for table in oldest:
                if table.touches(start * self.block_size, count * self.block_size):
                    self.free(table)
        taken = self._free_list.take(count)
        assert taken is not None
        return taken, count
